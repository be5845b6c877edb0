"""One request on its way through the engine."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omlx_core.mlx_backend import mx

from mlx_lm.models.cache import KVCache

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.pending_restore import PendingRestore
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import (
    Divergence,
    FinishReason,
    GenerationChunk,
    GenerationResult,
    TokenLogprob,
    Usage,
)
from omlx_core.errors import OMLXError, RequestCancelledError, RequestTimeoutError, UnmetConstraintError
from omlx_core.state.prompt_state import PromptCache
from omlx_core.state.recorder import WindowRecorder

if TYPE_CHECKING:
    from omlx_core.engine.constraint_processor import ConstraintProcessor
    from omlx_core.engine.document_reuse import Alone

logger = logging.getLogger(__name__)

Emit = Callable[[GenerationChunk | BaseException], None]
"""Takes an answer's pieces, and in the end a chunk with the result or an exception. Called on the MLX thread."""


@dataclass(frozen=True, slots=True)
class DocumentSpan:
    """The tokens ``[start, stop)`` of a prompt that are a document."""

    start: int
    stop: int


@dataclass(eq=False)
class Request:
    """A validated request and its state. All but `cancel` belongs to the scheduler's thread once submitted.

    Attributes:
        prompt_ids: the prompt.
        params: the options, `max_tokens` already lowered to what the context has left.
        emit: where the answer goes.
        output: the answer so far.
        submitted_s: `time.perf_counter` at the call.
        system_tokens: how many tokens of the prompt belong to its system messages, if that is known.
        pin_tokens: how many tokens of the prompt are to stay in RAM.
        documents: what of the prompt may be put in place approximately and isn't yet, in order; see `DocumentReuse`.
        alone: the document that is being computed by itself.
        approximate_tokens: prompt tokens that were put in place so.
        ends_with_prompt: there is to be no answer: it ends when its prompt is computed and stored.
        on_finished: is given the answer's tokens before the result is; on the MLX thread, so it must be quick.
        divergence: where the prompt left what the cache knows.
        make_constraint: makes what the answer must follow; None is anything.
        constraint: what this answer follows, once it is decoded.
        table: the blocks it holds; None if the model isn't cached.
        pending: the matched prefix while its content is on the way.
        prompt_cache: the layers' state during prefill; handed to mlx-lm's batch after it.
        num_computed: prompt tokens that `prompt_cache` holds.
        steps_under_way: an array for each step of its prefill that isn't known to be done, there when it is.
        recorder: keeps what windows would drop; None if the model has none.
        checkpoints_at: numbers of tokens after which the recurrent layers' state is to be kept.
        last_checkpoint: the newest state at a block boundary of the answer, with its number of tokens.
        samples: this request, and others that want more answers to the same prompt, until they go their own ways.
        deadline_s: `time.perf_counter` when it is to be given up; None is never.
        is_in_line: whether it counts among those that wait.
        is_answering: whether its first token is accounted for.
        matched_at: how much had been stored when it was matched.
        was_matched_anew: whether it was matched again since.
    """

    prompt_ids: list[int]
    params: GenerationParams
    emit: Emit
    output: OutputAssembler
    submitted_s: float = field(default_factory=time.perf_counter)
    system_tokens: int = 0
    pin_tokens: int = 0
    documents: list[DocumentSpan] = field(default_factory=list)
    alone: Alone | None = None
    approximate_tokens: int = 0
    ends_with_prompt: bool = False
    on_finished: Callable[[list[int]], None] | None = None
    divergence: Divergence | None = None
    make_constraint: Callable[[], ConstraintProcessor] | None = None
    constraint: ConstraintProcessor | None = None
    is_cancelled: bool = False
    table: BlockTable | None = None
    pending: PendingRestore | None = None
    prompt_cache: PromptCache | None = None
    num_computed: int = 0
    steps_under_way: deque[mx.array] = field(default_factory=deque)
    recorder: WindowRecorder | None = None
    checkpoints_at: set[int] = field(default_factory=set)
    last_checkpoint: tuple[int, BlockPayload] | None = None
    cached_tokens_hot: int = 0
    cached_tokens_cold: int = 0
    ttft_s: float | None = None
    samples: list[Request] = field(default_factory=list)
    deadline_s: float | None = None
    is_in_line: bool = True
    is_answering: bool = False
    matched_at: int = 0
    was_matched_anew: bool = False

    def __post_init__(self) -> None:
        self.samples = [self]
        if self.params.timeout_s is not None:
            self.deadline_s = self.submitted_s + self.params.timeout_s

    @property
    def capacity_tokens(self) -> int:
        """How many tokens its prompt cache is to have room for: an answer's first ones too, or they would cost a copy
        of it all."""
        return len(self.prompt_ids) + min(self.params.max_tokens, int(KVCache.step))

    def cancel(self) -> None:
        """Ask the scheduler to stop; from any thread, at any time, any number of times."""
        self.is_cancelled = True

    def is_overdue(self, now_s: float) -> bool:
        """Whether it is to be given up, at that time of `time.perf_counter`."""
        return self.is_cancelled or (self.deadline_s is not None and now_s >= self.deadline_s)

    def why_overdue(self, when: str) -> OMLXError:
        """The error for its callers; `when` says at what stage it is."""
        if self.is_cancelled:
            return RequestCancelledError(f"the request was cancelled {when}")
        return RequestTimeoutError(
            f"the request's timeout_s={self.params.timeout_s} ran out {when}: give it more time, or ask again, since "
            "what it has computed of the prompt is cached"
        )

    def why_unmet(self) -> OMLXError | None:
        """The error for its callers, if the answer had to end before it followed its constraint."""
        if self.constraint is None or self.constraint.error is None:
            return None
        return UnmetConstraintError(
            f"the answer can't follow its constraint after token {len(self.output.token_ids)} "
            f"({self.constraint.error}): use a simpler schema or grammar, without characters that the model's "
            "vocabulary lacks"
        )

    def report_prefill(self) -> None:
        """Say how far the prompt is computed; all but its last token, which the first token of the answer needs."""
        if self.params.on_prefill is not None:
            try:
                self.params.on_prefill(self.num_computed, len(self.prompt_ids) - 1)
            except Exception:  # the caller's own; it must not end other requests
                logger.exception("on_prefill failed")

    def emit_token(
        self, token_id: int, logprob: float | None, top_logprobs: list[TokenLogprob] | None, *, is_end_token: bool
    ) -> None:
        """Pass one generated token on."""
        if self.ttft_s is None:
            self.ttft_s = time.perf_counter() - self.submitted_s
        delta = self.output.add(token_id, logprob, top_logprobs, is_end_token=is_end_token)
        self.emit(
            GenerationChunk(
                delta.text,
                [token_id],
                None if logprob is None else [logprob],
                reasoning=delta.reasoning,
                tool_calls=delta.tool_calls,
                invalid_tool_calls=delta.invalid_tool_calls,
                top_logprobs=None if top_logprobs is None else [top_logprobs],
            )
        )

    def emit_result(self, finish_reason: FinishReason) -> None:
        """Pass on what was held back, and the whole answer."""
        delta = self.output.finish(finish_reason)
        if self.on_finished is not None:
            self.on_finished(self.output.token_ids)
        result = GenerationResult(
            text=self.output.text,
            token_ids=self.output.token_ids,
            logprobs=self.output.logprobs if self.params.logprobs else None,
            finish_reason=self.output.finish_reason or finish_reason,
            usage=Usage(
                prompt_tokens=len(self.prompt_ids),
                completion_tokens=len(self.output.token_ids),
                cached_tokens_hot=self.cached_tokens_hot,
                cached_tokens_cold=self.cached_tokens_cold,
                approximate_tokens=self.approximate_tokens,
                reasoning_tokens=self.output.reasoning_tokens,
            ),
            ttft_s=self.ttft_s or 0.0,
            reasoning=self.output.reasoning,
            tool_calls=self.output.tool_calls,
            invalid_tool_calls=self.output.invalid_tool_calls,
            top_logprobs=self.output.top_logprobs if self.params.top_logprobs else None,
            divergence=self.divergence,
            duration_s=time.perf_counter() - self.submitted_s,
        )
        self.emit(
            GenerationChunk(
                delta.text,
                [],
                [] if self.params.logprobs else None,
                result,
                reasoning=delta.reasoning,
                tool_calls=delta.tool_calls,
                invalid_tool_calls=delta.invalid_tool_calls,
            )
        )
