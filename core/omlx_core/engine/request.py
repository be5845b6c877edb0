"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.pending_restore import PendingRestore
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import FinishReason, GenerationChunk, GenerationResult, Usage
from omlx_core.state.prompt_state import PromptCache
from omlx_core.state.recorder import WindowRecorder

Emit = Callable[[GenerationChunk | BaseException], None]
"""Takes an answer's pieces, and in the end a chunk with the result or an exception. Called on the MLX thread."""


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
        table: the blocks it holds; None if the model isn't cached.
        pending: the matched prefix while its content is on the way.
        prompt_cache: the layers' state during prefill; handed to mlx-lm's batch after it.
        num_computed: prompt tokens that `prompt_cache` holds.
        recorder: keeps what windows would drop; None if the model has none.
        checkpoints_at: numbers of tokens after which the recurrent layers' state is to be kept.
        last_checkpoint: the newest state at a block boundary of the answer, with its number of tokens.
    """

    prompt_ids: list[int]
    params: GenerationParams
    emit: Emit
    output: OutputAssembler
    submitted_s: float = field(default_factory=time.perf_counter)
    system_tokens: int = 0
    is_cancelled: bool = False
    table: BlockTable | None = None
    pending: PendingRestore | None = None
    prompt_cache: PromptCache | None = None
    num_computed: int = 0
    recorder: WindowRecorder | None = None
    checkpoints_at: set[int] = field(default_factory=set)
    last_checkpoint: tuple[int, BlockPayload] | None = None
    cached_tokens_hot: int = 0
    cached_tokens_cold: int = 0
    ttft_s: float | None = None

    def cancel(self) -> None:
        """Ask the scheduler to stop; from any thread, at any time, any number of times."""
        self.is_cancelled = True

    def emit_token(self, token_id: int, logprob: float | None, *, is_end_token: bool) -> None:
        """Pass one generated token on."""
        if self.ttft_s is None:
            self.ttft_s = time.perf_counter() - self.submitted_s
        text = self.output.add(token_id, logprob, is_end_token=is_end_token)
        self.emit(GenerationChunk(text, [token_id], None if logprob is None else [logprob]))

    def emit_result(self, finish_reason: FinishReason) -> None:
        """Pass on what was held back, and the whole answer."""
        text = self.output.finish()
        if self.output.has_met_stop_text:
            finish_reason = "stop"
        result = GenerationResult(
            text=self.output.text,
            token_ids=self.output.token_ids,
            logprobs=self.output.logprobs if self.params.logprobs else None,
            finish_reason=finish_reason,
            usage=Usage(
                prompt_tokens=len(self.prompt_ids),
                completion_tokens=len(self.output.token_ids),
                cached_tokens_hot=self.cached_tokens_hot,
                cached_tokens_cold=self.cached_tokens_cold,
            ),
            ttft_s=self.ttft_s or 0.0,
        )
        self.emit(GenerationChunk(text, [], [] if self.params.logprobs else None, result))
