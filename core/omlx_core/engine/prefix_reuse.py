"""What the scheduler does with the prefix cache on a request's way: restore, store as it grows, let go.

A model that runs uncached goes the same way; there is just nothing to do on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from omlx_core.mlx_backend import backend_name, mx

from mlx_lm.generate import generation_stream

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.parts import CHECKPOINT, PartKey
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.tiered_cache import CapturedBlock, TieredCache
from omlx_core.engine.prompt_caches import PromptCaches
from omlx_core.engine.prompt_lookup import last_boundary
from omlx_core.engine.request import Request
from omlx_core.settings import EngineSettings
from omlx_core.state.prompt_state import PromptCache, PromptStateCodec, RowSource
from omlx_core.state.recorder import WindowRecorder

logger = logging.getLogger(__name__)


class PrefixReuse:
    """One model's use of its cache. Belongs to the scheduler's thread.

    Args:
        prompt_caches: makes the model's prompt caches.
        cache: where prefixes are kept.
        codec: how to cut the model's state into blocks; None runs it uncached.
        settings: how often checkpoints are kept, and what is reused of answers.
        wake: makes the scheduler look again; called from other threads.
    """

    def __init__(
        self,
        prompt_caches: PromptCaches,
        cache: TieredCache,
        codec: PromptStateCodec | None,
        *,
        settings: EngineSettings,
        wake: Callable[[], None],
    ) -> None:
        self._prompt_caches = prompt_caches
        self._cache = cache
        self._codec = codec
        self._settings = settings
        reuses_inexact = settings.reuse_inexact_answers
        if reuses_inexact is None:
            reuses_inexact = backend_name() != "cpu"
        self._max_answer_tokens = None if codec is None or reuses_inexact else codec.max_exact_answer_tokens
        self._wake = wake
        self._num_stored = 0
        self._has_said_unpinned = False
        cache.on_progress(wake)

    def tend(self) -> None:
        """Hand on to the SSD tier what it had no room for; between steps, and whenever `wake` was called."""
        self._cache.retry_unsaved()

    def match(self, request: Request) -> None:
        """Find and hold the longest cached prefix of a request's prompt; what is on SSD is read from now on.

        Called again, it goes on with what was found before, and what is being read.
        """
        codec, earlier, earlier_table = self._codec, request.pending, request.table
        if codec is None:
            return
        # What is pinned must be in RAM when the prompt is computed, not some time later.
        allocate = None if request.pin_tokens else partial(codec.allocate, capacity=request.capacity_tokens)
        request.pending = self._cache.match(
            request.prompt_ids,
            request.params.extra_keys,
            codec.needs,
            max_tokens=last_boundary(len(request.prompt_ids), self._cache.block_size, codec),
            allocate=allocate,
            earlier=earlier,
        )
        request.table = request.pending.table
        if earlier_table is not None:
            self._cache.release(earlier_table)
        request.matched_at = self._num_stored
        request.pending.notify(self._wake)

    def is_ready(self, request: Request) -> bool:
        """Whether all that a request's prefix needs is in RAM."""
        return request.pending is None or request.pending.is_ready()

    def begin(self, request: Request) -> bool:
        """Give a matched request its prompt cache, filled from the prefix.

        Returns:
            False if it was matched anew, because more is cached now or something was lost, and is to be read first.
        """
        codec = self._codec
        if codec is None or request.pending is None:
            request.prompt_cache = self._prompt_caches.make()
            return True
        if request.matched_at < self._num_stored and not request.was_matched_anew:
            # What was stored meanwhile may be more of this very prompt. Once only: reads must come to an end.
            request.was_matched_anew = True
            self.match(request)
        if not self.is_ready(request):
            return False
        num_matched = request.pending.num_matched_blocks * self._cache.block_size
        if not self._restore(request, codec):
            # First of all let go: a block that is held counts as found, and this one holds what was lost.
            self.leave(request)
            self.match(request)
            return self.is_ready(request) and self.begin(request)
        if codec.has_windows:
            request.recorder = WindowRecorder(codec, self._cache.block_size, request.num_computed)
        if codec.has_checkpoints:
            request.checkpoints_at = self._plan_checkpoints(request, codec, num_matched)
        return True

    def computed(self, request: Request, token_ids: list[int]) -> None:
        """Keep what a prefill step has filled; the prompt cache holds these tokens now."""
        self._account(request, token_ids)
        if request.prompt_cache is None:
            return
        self._store(request, request.prompt_cache)
        if self._codec is not None and request.num_computed in request.checkpoints_at:
            with mx.stream(generation_stream):
                payload = self._codec.capture_checkpoint(request.prompt_cache)
            self._store_checkpoint(request, request.num_computed, payload)

    def generated(self, request: Request, token_ids: list[int], extract: Callable[[], PromptCache]) -> None:
        """Keep what the layers are about to forget while an answer grows. A failure costs reuse, not the answer.

        Args:
            request: the request.
            token_ids: tokens that its cache holds now and did not at the last call.
            extract: gives its prompt cache; costs time.
        """
        try:
            self._keep_generated(request, token_ids, extract)
        except Exception:
            logger.exception("an answer can't be stored in the cache any further")
            self.leave(request)

    def _keep_generated(self, request: Request, token_ids: list[int], extract: Callable[[], PromptCache]) -> None:
        codec, table = self._codec, request.table
        if codec is None or table is None:
            return
        if self._max_answer_tokens is not None and table.num_tokens + len(token_ids) > self._max_answer_tokens:
            self._end_exact_part(request, table, extract)
            return
        self._account(request, token_ids)
        if not request.params.store:
            return
        is_boundary = table.num_tokens % self._cache.block_size == 0
        quantization = self._prompt_caches.quantization
        if quantization is not None and table.num_tokens == quantization.start_tokens:
            self._store(request, extract())  # from here on only quantized rows can be had
        is_due = is_boundary and (codec.has_windows or codec.has_checkpoints)
        if request.recorder is not None:
            is_due = is_due or table.num_tokens - request.recorder.num_tokens >= codec.smallest_window
        if not is_due:
            return
        prompt_cache = extract()
        with mx.stream(generation_stream):
            if request.recorder is not None:
                request.recorder.record(prompt_cache, table.num_tokens)
            if is_boundary and codec.has_checkpoints:
                request.last_checkpoint = table.num_tokens, codec.capture_checkpoint(prompt_cache)

    def _end_exact_part(self, request: Request, table: BlockTable, extract: Callable[[], PromptCache]) -> None:
        """Keep the rows of the table's last tokens, which windows drop as the answer goes on; it gets no more."""
        recorder = request.recorder
        if recorder is not None and recorder.num_tokens < table.num_tokens and request.params.store:
            with mx.stream(generation_stream):
                recorder.record(extract(), table.num_tokens)

    def finish(self, request: Request, prompt_cache: PromptCache) -> None:
        """Store what an answer has filled, and let go."""
        try:
            self._store(request, prompt_cache)
            if request.last_checkpoint is not None:
                self._store_checkpoint(request, *request.last_checkpoint)
        except Exception:  # the answer is there, and must not be lost to its cache
            logger.exception("an answer could not be stored in the cache")
        self.leave(request)

    def prefilled(self, request: Request) -> None:
        """Pin what is to be kept of a prompt that is computed."""
        if not request.pin_tokens:
            return
        if self._codec is not None and request.table is not None:
            self._cache.pin(request.table, request.pin_tokens, self._codec.needs)
        elif not self._has_said_unpinned:
            # No error: a program that pins, or passes cache_control on, is to run on any model.
            self._has_said_unpinned = True
            logger.warning("a prompt was to be pinned, but the model runs without a prefix cache: nothing is kept")

    def fork(self, request: Request) -> None:
        """Give the further samples of a prefilled request its blocks, to share until they write."""
        for sample in request.samples[1:]:
            sample.cached_tokens_hot, sample.cached_tokens_cold = request.cached_tokens_hot, request.cached_tokens_cold
            if request.table is not None:
                sample.table = self._cache.fork(request.table)
            if request.recorder is not None:
                sample.recorder = request.recorder.fork()

    def leave(self, request: Request) -> None:
        """Let go of a request's blocks; those that are stored stay. Idempotent."""
        if request.pending is not None:
            request.pending.cancel()
        if request.table is not None:
            self._cache.release(request.table)
        request.table = request.prompt_cache = request.pending = request.recorder = request.last_checkpoint = None

    def _restore(self, request: Request, codec: PromptStateCodec) -> bool:
        """Fill the prompt cache from the blocks that were read; False if one was lost and a match finds less."""
        pending, request.pending = request.pending, None
        if pending is None:
            return False
        content = self._cache.finish_restore(pending, len(request.prompt_ids))
        if content is None:
            return False
        num_tokens = pending.table.num_tokens
        request.prompt_cache = self._prompt_caches.make()
        if not num_tokens:
            return True
        try:
            with mx.stream(generation_stream):
                request.prompt_cache, content = codec.restore(
                    content, num_tokens=num_tokens, capacity=request.capacity_tokens
                )
        except Exception:
            # Whatever is wrong with the blocks, the prompt can be computed; the answer must not suffer.
            logger.exception("a prefix of %d tokens could not be restored and is computed again", num_tokens)
            self._cache.discard(pending.table)
            return True
        self._cache.promote(pending.table, content)
        request.num_computed = num_tokens
        request.cached_tokens_hot = pending.num_hot_blocks * self._cache.block_size
        request.cached_tokens_cold = num_tokens - request.cached_tokens_hot
        return True

    def _plan_checkpoints(self, request: Request, codec: PromptStateCodec, num_matched: int) -> set[int]:
        """Where the recurrent state is worth keeping.

        At the prompt's last block boundary, for its next turn; at the end of the system messages, and of what is to be
        pinned, for other conversations; where this prompt was seen to leave an earlier one, for the third that shares
        their beginning; and at a wide stride, wider where it would take too many.
        """
        size = self._cache.block_size
        last = last_boundary(len(request.prompt_ids), size, codec)
        stride = max(self._settings.checkpoint_stride_tokens, -(-last // self._settings.max_stride_checkpoints))
        at_stride = (at // size * size for at in range(stride, last, stride))
        shared = (request.system_tokens // size * size, request.pin_tokens // size * size)
        wanted = {last, *shared, num_matched, *at_stride}
        return {at for at in wanted if request.num_computed < at <= last}

    def _account(self, request: Request, token_ids: list[int]) -> None:
        if request.table is not None:
            self._cache.append_tokens(request.table, token_ids)

    def _store(self, request: Request, prompt_cache: PromptCache) -> None:
        codec, table, recorder = self._codec, request.table, request.recorder
        if codec is None or table is None or not request.params.store:
            return
        size = self._cache.block_size
        copies: RowSource | None = None

        def capture(start: int, stop: int, has_rows: bool) -> CapturedBlock | None:
            nonlocal copies
            window = None
            if recorder is not None:
                window = recorder.take(start // size)
                if window is None:
                    return None
            if has_rows:
                return CapturedBlock(None, window)
            if copies is None:
                copies = codec.rows_of(prompt_cache, table.num_tokens // size * size)
            return CapturedBlock(copies.copy(start, stop), window)

        with mx.stream(generation_stream):
            if recorder is not None:
                recorder.record(prompt_cache, table.num_tokens)
            num_committed = table.num_committed
            self._cache.store(table, capture)
            self._num_stored += table.num_committed - num_committed

    def _store_checkpoint(self, request: Request, num_tokens: int, payload: BlockPayload) -> None:
        if request.table is not None and request.params.store:
            key = PartKey(num_tokens // self._cache.block_size - 1, CHECKPOINT)
            self._cache.store_part(request.table, key, payload)
            self._num_stored += 1
