"""An engine that answers from a script, for tests of what stands on top of it."""

from __future__ import annotations

import threading
import types
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from omlx_core import GenerationChunk, GenerationParams, GenerationResult, Usage
from omlx_core.errors import InvalidPromptError


class FakeTokenizer:
    """One token for each character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


class FakeEngine:
    """Answers every prompt with the same pieces of text.

    `calls` has the prompt and the options of each request; `cancelled` is set when a stream ends before its result
    came; `error`, if set, is raised after the first piece.
    """

    def __init__(self, pieces: Sequence[str] = ("Hel", "", "lo")) -> None:
        self.cache = types.SimpleNamespace(ssd=None)
        self.pieces = list(pieces)
        self.name = "fake-model"
        self.tokenizer: FakeTokenizer | None = FakeTokenizer()
        self.context_length: int | None = 2048
        self.has_chat_template = True
        self.is_closed = False
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.threads: list[int] = []
        self.cancelled = threading.Event()
        self.error: BaseException | None = None

    def generate(self, prompt: Any, **options: Any) -> GenerationResult:
        return self._chunks(prompt, options)[-1].result

    def stream(self, prompt: Any, **options: Any) -> Generator[GenerationChunk, None, None]:
        chunks = self._chunks(prompt, options)

        def stream() -> Generator[GenerationChunk, None, None]:
            is_complete = False
            try:
                for position, chunk in enumerate(chunks):
                    if position == 1 and self.error is not None:
                        raise self.error
                    is_complete = chunk.result is not None
                    yield chunk
            finally:
                if not is_complete:
                    self.cancelled.set()

        return stream()

    async def agenerate(self, prompt: Any, **options: Any) -> GenerationResult:
        return self.generate(prompt, **options)

    def astream(self, prompt: Any, **options: Any) -> AsyncGenerator[GenerationChunk, None]:
        stream = self.stream(prompt, **options)

        async def chunks() -> AsyncGenerator[GenerationChunk, None]:
            try:
                for chunk in stream:
                    yield chunk
            finally:
                stream.close()

        return chunks()

    def count_tokens(self, prompt: Any) -> int:
        if not self.has_chat_template:
            raise InvalidPromptError("no chat template")
        return sum(len(message["content"]) + 3 for message in prompt)

    def close(self) -> None:
        self.is_closed = True

    def _chunks(self, prompt: Any, options: dict[str, Any]) -> list[GenerationChunk]:
        params = GenerationParams.from_options(options)
        self.calls.append((prompt, options))
        self.threads.append(threading.get_ident())
        text = "".join(self.pieces)
        token_ids = [ord(character) for character in text]
        result = GenerationResult(
            text=text,
            token_ids=token_ids,
            logprobs=[-0.5] * len(token_ids) if params.logprobs else None,
            finish_reason="stop",
            usage=Usage(
                prompt_tokens=700, completion_tokens=len(token_ids), cached_tokens_hot=512, cached_tokens_cold=128
            ),
            ttft_s=0.25,
        )
        chunks = [GenerationChunk(text=piece, token_ids=[ord(c) for c in piece]) for piece in self.pieces]
        return [*chunks, GenerationChunk(text="", token_ids=[], result=result)]
