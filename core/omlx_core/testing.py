"""For tests of what stands on an engine: one that answers from a script, at once, without a model and without MLX.

::

    engine = FakeEngine(["Paris.", FakeAnswer(["I ", "don't know."], finish_reason="length")])
    llm = ChatOMLX(engine=engine)
    assert llm.invoke("Capital of France?").content == "Paris."
    assert engine.calls[0].prompt == [{"role": "user", "content": "Capital of France?"}]
"""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omlx_core.cache.pins import PinnedPrefix
from omlx_core.engine.params import GenerationParams, Prompt
from omlx_core.engine.results import (
    Divergence,
    FinishReason,
    GenerationChunk,
    GenerationResult,
    InvalidToolCall,
    ToolCall,
    Usage,
)
from omlx_core.errors import EngineClosedError, InvalidParameterError, InvalidPromptError
from omlx_core.model.text_places import locate


class FakeTokenizer:
    """One token for each character, its code point."""

    bos_token = None
    eos_token_ids = frozenset({0})
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The code points, after a 1 that stands for the special token at the beginning."""
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The characters."""
        return "".join(map(chr, token_ids))


@dataclass(frozen=True)
class FakeAnswer:
    """One answer of a script.

    Attributes:
        pieces: its text, a chunk each.
        reasoning: what is thought before it, in one chunk.
        tool_calls: the tools it calls, in one chunk after the text.
        invalid_tool_calls: what should be calls and isn't.
        finish_reason: why it ends; None is ``"tool_calls"`` with calls, and ``"stop"`` without.
        usage: what it cost; None counts the answer's characters, and a prompt of 700 tokens of which 512 were in RAM
            and 128 on SSD.
        ttft_s: seconds to its first token.
        duration_s: seconds to its end.
        logprob: the log-probability of each of its tokens, if they are asked for.
        divergence: where its prompt left what the cache knows.
        error: raised after the first piece instead of going on.
    """

    pieces: Sequence[str] = ()
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()
    invalid_tool_calls: Sequence[InvalidToolCall] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    ttft_s: float = 0.25
    duration_s: float = 1.25
    logprob: float = -0.5
    divergence: Divergence | None = None
    error: BaseException | None = None


class Call(NamedTuple):
    """A request that a `FakeEngine` was asked."""

    prompt: Prompt
    options: Mapping[str, Any]


@dataclass(eq=False)
class FakeEngine:
    """Has `Engine`'s methods and answers from a script. Options are validated as the real one does.

    Attributes:
        answers: the script: an answer each, or its text; the last is repeated.
        name: the model's name.
        tokenizer: one token for each character; None is an engine without a tokenizer.
        context_length: most tokens of prompt and answer.
        has_chat_template: whether chats can be counted.
        calls: all that it was asked, oldest first.
        prefills: what it was to compute without an answer, oldest first; what is to be pinned of it stays pinned.
        threads: on which thread each call came.
        cancelled: set when a stream ends before its result came.
        is_closed: whether `close` was called; it then refuses requests.
        cache: has ``ssd``, None, ``block_size``, and ``subscribe``, which never calls back.
        cached_documents: the documents that a prompt's head is followed by in the cache, in their order there.
    """

    answers: Sequence[FakeAnswer | str] = ("Hello",)
    name: str = "fake-model"
    tokenizer: FakeTokenizer | None = field(default_factory=FakeTokenizer)
    context_length: int | None = 2048
    has_chat_template: bool = True
    calls: list[Call] = field(default_factory=list)
    prefills: list[Call] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    is_closed: bool = False
    cache: Any = field(
        default_factory=lambda: types.SimpleNamespace(ssd=None, block_size=256, subscribe=lambda _: lambda: None)
    )
    cached_documents: Sequence[str] = ()

    _unpinned: list[Call] = field(default_factory=list, repr=False)

    @property
    def num_active_requests(self) -> int:
        """None: every answer comes at once."""
        return 0

    @property
    def memory_bytes(self) -> int:
        """None to speak of."""
        return 0

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a text, or of all messages' contents, or the ids themselves."""
        if isinstance(prompt, str):
            return FakeTokenizer().encode(prompt)
        if not self.has_chat_template and prompt and isinstance(prompt[0], Mapping):
            raise InvalidPromptError("this model has no chat template: give text or token ids")
        token_ids: list[int] = []
        for item in prompt:
            # A marker before and after each message and one for its role, as templates have them.
            token_ids += [item] if isinstance(item, int) else [2, 3, *map(ord, str(item.get("content") or "")), 4]
        return token_ids

    def count_tokens(self, prompt: Prompt, **options: Any) -> int:
        """How many tokens `encode` gives, and one for each tool."""
        return len(self.encode(prompt)) + len(GenerationParams.from_options(options).tools)

    def count_cached_tokens(self, prompt: Prompt, **options: Any) -> Usage:
        """As if 512 of 700 tokens were in RAM, and 128 on SSD."""
        self.encode(prompt)
        GenerationParams.from_options(options)
        return Usage(prompt_tokens=700, cached_tokens_hot=512, cached_tokens_cold=128)

    def find_cached_order(
        self, prompt: Prompt, texts: Sequence[str], *, any_space: bool = False, **options: Any
    ) -> list[int]:
        """Those of `cached_documents` up to the first that is not among the texts."""
        del any_space
        self.find_starts(prompt, texts, **options)
        chain = itertools.takewhile(lambda text: text in texts, self.cached_documents)
        return [list(texts).index(text) for text in chain]

    def find_starts(self, prompt: Prompt, texts: Sequence[str], **options: Any) -> list[int]:
        """Where their characters begin, which are a token each."""
        GenerationParams.from_options(options)
        return locate("".join(map(chr, self.encode(prompt))), texts)

    def generate(self, prompt: Prompt, **options: Any) -> GenerationResult:
        """The next answer of the script."""
        [result] = [chunk.result for chunk in self.stream(prompt, **options) if chunk.result is not None]
        return result

    async def agenerate(self, prompt: Prompt, **options: Any) -> GenerationResult:
        """The next answer of the script."""
        return self.generate(prompt, **options)

    def sample(self, prompt: Prompt, n: int, **options: Any) -> list[GenerationResult]:
        """The next `n` answers of the script; one call each."""
        if n < 1:
            raise InvalidParameterError(f"n={n!r}: give a whole number of at least 1")
        return [self.generate(prompt, **options) for _ in range(n)]

    async def asample(self, prompt: Prompt, n: int, **options: Any) -> list[GenerationResult]:
        """The next `n` answers of the script; one call each."""
        return self.sample(prompt, n, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Generator[GenerationChunk]:
        """The next answer of the script, piece by piece."""
        self._check_open()
        params = GenerationParams.from_options(options)
        self.calls.append(Call(prompt, options))
        self.threads.append(threading.get_ident())
        answer = self.answers[min(len(self.calls), len(self.answers)) - 1]
        return self._play(FakeAnswer([answer]) if isinstance(answer, str) else answer, params)

    def _check_open(self) -> None:
        if self.is_closed:
            raise EngineClosedError("the engine is closed: make a new one")

    async def _aplay(self, stream: Generator[GenerationChunk]) -> AsyncGenerator[GenerationChunk]:
        try:
            for chunk in stream:
                yield chunk
        finally:
            stream.close()

    def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[GenerationChunk]:
        """The next answer of the script, piece by piece."""
        return self._aplay(self.stream(prompt, **options))

    def prefill(self, prompt: Prompt, **options: Any) -> Usage:
        """As if 512 of 700 tokens had been in RAM, and 128 on SSD."""
        self._check_open()
        GenerationParams.from_options(options)
        self.prefills.append(Call(prompt, options))
        return Usage(prompt_tokens=700, cached_tokens_hot=512, cached_tokens_cold=128)

    async def aprefill(self, prompt: Prompt, **options: Any) -> Usage:
        """The same."""
        return self.prefill(prompt, **options)

    def pins(self) -> list[PinnedPrefix]:
        """One of 640 tokens for each request that pins something."""
        return [PinnedPrefix(640, 640) for call in self._pinning()]

    def unpin(self, prompt: Prompt | None = None, **options: Any) -> int:
        """Forget those of a prompt, or all."""
        GenerationParams.from_options(options)
        unpinned = [call for call in self._pinning() if prompt is None or call.prompt == prompt]
        self._unpinned += unpinned
        return len(unpinned)

    def _pinning(self) -> list[Call]:
        return [
            call
            for call in (*self.calls, *self.prefills)
            if call.options.get("pin") and not any(call is unpinned for unpinned in self._unpinned)
        ]

    def close(self, *, drain: bool = False) -> None:
        """Refuse requests from now on."""
        del drain
        self.is_closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _play(self, answer: FakeAnswer, params: GenerationParams) -> Generator[GenerationChunk]:
        is_complete = False
        try:
            if answer.reasoning:
                yield _chunk("", answer, params, reasoning=answer.reasoning)
            for piece in answer.pieces:
                yield _chunk(piece, answer, params)
                if answer.error is not None:
                    raise answer.error
            if answer.error is not None:
                raise answer.error
            if answer.tool_calls or answer.invalid_tool_calls:
                yield GenerationChunk(
                    "", [], tool_calls=list(answer.tool_calls), invalid_tool_calls=list(answer.invalid_tool_calls)
                )
            is_complete = True
            yield GenerationChunk("", [], [] if params.logprobs else None, _result(answer, params))
        finally:
            if not is_complete:
                self.cancelled.set()


def _chunk(text: str, answer: FakeAnswer, params: GenerationParams, reasoning: str = "") -> GenerationChunk:
    token_ids = [ord(character) for character in text or reasoning]
    logprobs = [answer.logprob] * len(token_ids) if params.logprobs else None
    return GenerationChunk(text, token_ids, logprobs, reasoning=reasoning)


def _result(answer: FakeAnswer, params: GenerationParams) -> GenerationResult:
    text = "".join(answer.pieces)
    token_ids = [ord(character) for character in answer.reasoning + text]
    usage = Usage(
        prompt_tokens=700,
        completion_tokens=len(token_ids),
        cached_tokens_hot=512,
        cached_tokens_cold=128,
        reasoning_tokens=len(answer.reasoning),
    )
    return GenerationResult(
        text=text,
        token_ids=token_ids,
        logprobs=[answer.logprob] * len(token_ids) if params.logprobs else None,
        finish_reason=answer.finish_reason or ("tool_calls" if answer.tool_calls else "stop"),
        usage=usage if answer.usage is None else answer.usage,
        ttft_s=answer.ttft_s,
        reasoning=answer.reasoning,
        tool_calls=list(answer.tool_calls),
        invalid_tool_calls=list(answer.invalid_tool_calls),
        divergence=answer.divergence,
        duration_s=answer.duration_s,
    )
