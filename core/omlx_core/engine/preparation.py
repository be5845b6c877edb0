"""From what a caller asks to requests: everything that can be wrong is found here, before anything has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from omlx_core.cache.neighbour import Neighbour
from omlx_core.engine.calls import MakeRequest
from omlx_core.engine.constraint_compiler import ConstraintCompiler
from omlx_core.engine.constraint_processor import ConstraintProcessor
from omlx_core.engine.divergence import RecentSequences, find_divergence
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationOptions, GenerationParams, Prompt
from omlx_core.engine.progress import PrefillBar
from omlx_core.engine.request import DocumentSpan, Emit, Request
from omlx_core.engine.results import Divergence
from omlx_core.errors import InvalidParameterError
from omlx_core.model.chat import RenderedChat
from omlx_core.model.history import TokenHistory
from omlx_core.model.loading import LoadedModel, context_length
from omlx_core.model.prompts import EncodedPrompt, PromptEncoder
from omlx_core.model.text_places import TokenPlaces
from omlx_core.settings import EngineSettings

FindStored = Callable[[list[int], tuple[str, ...]], Neighbour | None]


class RequestMaker:
    """Makes the requests of one engine. Thread-safe.

    Args:
        loaded: the model.
        settings: how requests are run.
        find_stored: finds the stored sequence that a prompt shares most with, given its extra keys.
        counts_system_tokens: whether it matters where a chat's system messages end.
        check_document_reuse: refuses to put documents in place approximately, if the model doesn't allow it.

    Attributes:
        encoder: turns prompts into token ids.
        context_length: most tokens of prompt and answer together; None if the model doesn't say.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: EngineSettings,
        find_stored: FindStored,
        *,
        counts_system_tokens: bool,
        check_document_reuse: Callable[[], None],
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._max_batch_size = settings.max_batch_size
        self._counts_system_tokens = counts_system_tokens
        self._vocab_size: int | None = getattr(getattr(loaded.model, "args", None), "vocab_size", None)
        self._constraints = ConstraintCompiler(loaded.tokenizer)
        self._recent = RecentSequences()
        self._find_stored = find_stored
        self._check_document_reuse = check_document_reuse
        self.context_length = context_length(loaded.model, loaded.config, loaded.tokenizer)
        self.encoder = PromptEncoder(
            loaded.tokenizer,
            self.context_length,
            self._vocab_size,
            name=loaded.name,
            history=TokenHistory() if settings.token_faithful_history else None,
        )

    def prepare(
        self, prompt: Prompt, n: int, options: GenerationOptions, *, ends_with_prompt: bool = False
    ) -> list[MakeRequest]:
        """Check everything; what is returned makes the requests of `n` samples, and can't fail.

        Args:
            prompt: the prompt.
            n: how many answers.
            options: see `GenerationParams`.
            ends_with_prompt: no answer is wanted, only what the prompt leaves in the cache.

        Raises:
            InvalidRequestError: the prompt or an option can't be served.
        """
        params = self._check(GenerationParams.from_options(options), n)
        encoded = self.encoder.encode(prompt, params)
        if self.context_length is not None:
            room = self.context_length - len(encoded.token_ids)
            params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
        if params.progress:
            params = dataclasses.replace(params, on_prefill=PrefillBar(params.on_prefill))
        make_constraint = self._compile_constraint(params, encoded.chat)
        system_tokens = self.encoder.count_system_tokens(prompt, encoded, params) if self._counts_system_tokens else 0
        pin_tokens = self._count_pin_tokens(encoded, params)
        documents = self._find_documents(encoded, params) if params.is_approximate else []
        divergence = self._find_divergence(encoded.token_ids, params)

        def finished(answer_ids: list[int]) -> None:
            self.encoder.remember(encoded, params, answer_ids)
            if params.store and not documents:
                self._recent.add([*encoded.token_ids, *answer_ids], params.extra_keys)

        def make(sample_params: GenerationParams, emit: Emit) -> Request:
            return Request(
                encoded.token_ids,
                sample_params,
                emit,
                OutputAssembler(self._tokenizer, sample_params, encoded.chat),
                system_tokens=system_tokens,
                pin_tokens=pin_tokens,
                documents=list(documents),
                ends_with_prompt=ends_with_prompt,
                on_finished=finished,
                divergence=divergence,
                make_constraint=make_constraint,
            )

        return [partial(make, _params_of_sample(params, index)) for index in range(n)]

    def _check(self, params: GenerationParams, n: int) -> GenerationParams:
        """Check what depends on the engine."""
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= self._max_batch_size:
            raise InvalidParameterError(f"n={n!r}: give a whole number from 1 to max_batch_size={self._max_batch_size}")
        if params.stop and self._tokenizer is None:
            raise InvalidParameterError(f"stop={params.stop!r}: this engine has no tokenizer and so no text to stop at")
        unknown = [token_id for token_id in params.logit_bias if token_id >= (self._vocab_size or 2**32)]
        if unknown:
            raise InvalidParameterError(
                f"logit_bias: token ids {unknown[:5]} are not in the vocabulary of {self._vocab_size} tokens"
            )
        return params

    def _compile_constraint(
        self, params: GenerationParams, chat: RenderedChat | None
    ) -> Callable[[], ConstraintProcessor] | None:
        """What makes an answer follow its constraint, or call the tool that it must; None if it is free."""
        thinking_start, thinking_end = ([], []) if chat is None else self._thinking_tokens(chat)
        compiled = self._constraints.compile(
            params.constraint,
            tools=() if chat is None else chat.tools,
            tool_choice=params.tool_choice,
            parallel_tool_calls=params.parallel_tool_calls,
            call_format=None if chat is None else chat.call_format,
            thinking_start=thinking_start,
            thinking_end=thinking_end,
        )
        if compiled is None:
            return None
        is_thinking_open = chat is not None and chat.is_thinking_open
        return partial(compiled.make_processor, starts_in_thinking=is_thinking_open)

    def _thinking_tokens(self, chat: RenderedChat) -> tuple[list[int], list[int]]:
        """The tokens by which the answer may open thinking, and those that end it; none if it has been ended."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or chat.text.rstrip().endswith(tokenizer.think_end):
            return [], []
        return [] if chat.is_thinking_open else list(tokenizer.think_start_tokens), list(tokenizer.think_end_tokens)

    def _count_pin_tokens(self, encoded: EncodedPrompt, params: GenerationParams) -> int:
        if isinstance(params.pin, bool):
            return len(encoded.token_ids) if params.pin else 0
        return self.encoder.count_opening_tokens(params.pin, encoded, params)

    def _find_documents(self, encoded: EncodedPrompt, params: GenerationParams) -> list[DocumentSpan]:
        """The tokens of a prompt's documents; but for its last token, which is left to be computed."""
        text = encoded.text_with_documents
        self._check_document_reuse()
        places = TokenPlaces(self.encoder.decode, text, encoded.token_ids)
        end = len(encoded.token_ids) - 1
        spans = places.spans([document.strip() for document in params.documents])  # templates trim what they are given
        return [DocumentSpan(start, min(stop, end)) for start, stop in spans]

    def _find_divergence(self, token_ids: list[int], params: GenerationParams) -> Divergence | None:
        decode = self._tokenizer.decode if params.divergence_text and self._tokenizer is not None else None
        recent = self._recent.find_neighbour(token_ids, params.extra_keys)
        return find_divergence(token_ids, recent, partial(self._find_stored, token_ids, params.extra_keys), decode)


def _params_of_sample(params: GenerationParams, index: int) -> GenerationParams:
    """Each sample draws from a seed of its own."""
    if params.seed is None or not index:
        return params
    return dataclasses.replace(params, seed=(params.seed + index) % 2**64)
