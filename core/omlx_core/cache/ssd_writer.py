"""The writing half of the cold tier: a queue bounded in bytes, and the one thread that empties it.

The thread does everything in the order of the calls, so no child is published before its parent; blocks that have
gathered while it was at work it writes together. An error ends in a block that isn't written, with a counter, and the
first of its kind with a warning.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.parts import CHECKPOINT, Part
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.quantized_payload import quantize
from omlx_core.cache.ssd_budget import DiskLimits, SaveOutcome
from omlx_core.cache.ssd_publisher import BlockPublisher, FileVersion, NewBlock, SaveResult
from omlx_core.cache.ssd_stats import StatsKeeper
from omlx_core.sizes import format_size

logger = logging.getLogger(__name__)

_GIVE_UP_S = 1.0
_WRITE_FAILED = "blocks can't be written to the SSD cache: %r"

# Written together: enough that their waits for the disk are shared, few enough that the first is soon durable.
_MAX_BATCH_BLOCKS = 32
_MAX_BATCH_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """A block that is to be written; see `PagedSSDCacheManager.save_block`."""

    block_hash: BlockHash
    parent_hash: BlockHash | None
    token_ids: tuple[int, ...]
    payload: BlockPayload
    size_bytes: int
    part: Part
    on_complete: Callable[[BlockHash, bool], None] | None


class BlockWriter:
    """Writes the blocks of one namespace in the background. Methods may be called from any thread.

    Args:
        publisher: writes a block; closed by `close`.
        limits: what the folder may take, for messages.
        stats: where to count.
        max_queued_bytes: most payload bytes that wait to be written; a single larger block may wait alone.
        quantizes: write all parts but checkpoints in eight bits.

    Attributes:
        queued: what waits to be written. Read without a lock.
        unreadable: blocks whose file couldn't be read, by its version: not to be found unless written anew.
    """

    def __init__(
        self,
        publisher: BlockPublisher,
        limits: DiskLimits,
        stats: StatsKeeper,
        max_queued_bytes: int,
        *,
        quantizes: bool = False,
    ) -> None:
        self._publisher = publisher
        self._limits = limits
        self._stats = stats
        self._max_queued_bytes = max_queued_bytes
        self._quantizes = quantizes
        self._lock = threading.Lock()  # of the fields below; never held during I/O
        self._has_tasks = threading.Condition(self._lock)
        self.queued: dict[BlockHash, SaveRequest] = {}
        self.unreadable: dict[BlockHash, FileVersion | None] = {}
        self._is_closed = False
        self._is_giving_up = threading.Event()
        self._tasks: deque[SaveRequest | Callable[[], None]] = deque()
        with self._lock:
            self._enqueue("cleaning up", publisher.clean_up)
        # A daemon, so that a hanging disk can't keep the interpreter from ending; close() runs before that.
        self._thread = threading.Thread(target=self._run, name="omlx-ssd-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, request: SaveRequest) -> bool:
        """Queue a block; False if the queue is full or closed."""
        with self._lock:
            if self._is_closed:
                return False
            if request.on_complete is None and request.block_hash in self.queued:
                return True
            queued_bytes = self._stats.current.queued_bytes
            if queued_bytes and queued_bytes + request.size_bytes > self._max_queued_bytes:
                return False
            self.queued[request.block_hash] = request
            self._stats.count(queued_blocks=1, queued_bytes=request.size_bytes)
            self._add(request)
        return True

    def touch(self, block_hashes: tuple[BlockHash, ...]) -> None:
        """Mark a chain as just used."""
        with self._lock:
            self._enqueue("noting the use of blocks", partial(self._publisher.stamp, block_hashes))

    def hide(self, block_hash: BlockHash, version: FileVersion | None, *, drop: bool, is_counted: bool) -> None:
        """Have a block that couldn't be read not be found again.

        Args:
            block_hash: the block.
            version: the version of its file; None if it is missing.
            drop: take it out of the index, and its file away, unless it was replaced meanwhile.
            is_counted: whether it is among the corrupt blocks already.
        """
        self.unreadable[block_hash] = version
        if drop:
            with self._lock:
                self._enqueue("dropping a block", partial(self._drop, block_hash, version, is_counted))

    def flush(self, timeout_s: float | None) -> bool:
        """Wait until everything queued before the call is durable or given up; False if the time was too short."""
        done = threading.Event()
        with self._lock:
            is_closed = self._is_closed
            self._enqueue("flushing", self._publisher.sync)
            self._enqueue("flushing", done.set)
        if is_closed:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued and stop; what isn't written in time is given up. Called again, does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._has_tasks.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._is_giving_up.set()
            logger.warning("the SSD cache could not be written within %.0f s; the rest is given up", timeout_s)
            self._thread.join(_GIVE_UP_S)
        atexit.unregister(self.close)

    def _enqueue(self, what: str, action: Callable[[], None]) -> None:
        if not self._is_closed:
            self._add(partial(self._report_errors, what, action))

    def _add(self, task: SaveRequest | Callable[[], None]) -> None:
        self._tasks.append(task)
        self._has_tasks.notify()

    # What follows runs on the writer's thread.

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                if isinstance(task, list):
                    self._complete(task)
                else:
                    task()
                del task  # or the last payloads would stay in memory until the next one comes
        finally:
            self._publisher.close()

    def _next(self) -> list[SaveRequest] | Callable[[], None] | None:
        """Wait for what comes next: an action, or blocks that are to be written together; None after the last."""
        with self._has_tasks:
            self._has_tasks.wait_for(lambda: self._tasks or self._is_closed)
            if not self._tasks:
                return None
            first = self._tasks.popleft()
            if not isinstance(first, SaveRequest):
                return first
            batch, size_bytes = {first.block_hash: first}, first.size_bytes
            while self._tasks and len(batch) < _MAX_BATCH_BLOCKS:
                task = self._tasks[0]
                if not isinstance(task, SaveRequest) or task.block_hash in batch:
                    break
                size_bytes += task.size_bytes
                if size_bytes > _MAX_BATCH_BYTES:
                    break
                batch[task.block_hash] = task
                self._tasks.popleft()
            return list(batch.values())

    def _complete(self, requests: Sequence[SaveRequest]) -> None:
        results = [SaveResult(SaveOutcome.FAILED)] * len(requests)
        try:
            if not self._is_giving_up.is_set():
                results = self._save(requests)
        except Exception as exc:  # whatever it is, the callers must hear of their blocks and the thread go on
            self._stats.count(write_errors=len(requests))
            self._stats.warn("write", _WRITE_FAILED, exc)
        finally:
            with self._lock:
                self._stats.count(
                    queued_blocks=-len(requests), queued_bytes=-sum(request.size_bytes for request in requests)
                )
                for request in requests:
                    if self.queued.get(request.block_hash) is request:
                        del self.queued[request.block_hash]
        for request, result in zip(requests, results, strict=True):
            request.payload.release_copies()
            if request.on_complete is not None:
                try:
                    request.on_complete(request.block_hash, result.outcome.is_on_disk)
                except Exception:
                    logger.exception("on_complete failed for block %s", request.block_hash.hex())

    def _save(self, requests: Sequence[SaveRequest]) -> list[SaveResult]:
        results = self._publisher.save(
            [
                NewBlock(
                    request.block_hash,
                    request.parent_hash,
                    request.token_ids,
                    quantize(request.payload) if self._quantizes and request.part != CHECKPOINT else request.payload,
                    request.part,
                    replaces_file=request.block_hash in self.unreadable,
                )
                for request in requests
            ]
        )
        for request, result in zip(requests, results, strict=True):
            if result.outcome is SaveOutcome.WRITTEN:
                self.unreadable.pop(request.block_hash, None)
                self._stats.count_written(1, result.size_bytes)
            elif result.error is not None:
                self._stats.count(write_errors=1)
                self._stats.warn("write", _WRITE_FAILED, result.error)
            elif not result.outcome.is_on_disk:
                self._report_refusal(result.outcome, request.part, result.size_bytes)
        return results

    def _report_refusal(self, outcome: SaveOutcome, part: Part, size_bytes: int) -> None:
        limits = self._limits
        if outcome is SaveOutcome.TOO_LARGE and part == CHECKPOINT and size_bytes > limits.max_checkpoint_bytes:
            self._stats.warn(
                "checkpoint size",
                "checkpoint_share=%s of paged_ssd_cache_max_size=%s is too small for a checkpoint of %s; not written",
                limits.checkpoint_share,
                format_size(limits.max_size_bytes),
                format_size(size_bytes),
            )
        elif outcome is SaveOutcome.TOO_LARGE:
            self._stats.warn(
                "size",
                "paged_ssd_cache_max_size=%s is too small for a block of %s and those before it; not written",
                format_size(limits.max_size_bytes),
                format_size(size_bytes),
            )
        elif outcome is SaveOutcome.WRITE_BUDGET:
            self._stats.count(refused_by_write_budget=1)
            self._stats.warn(
                "write budget",
                "ssd_write_budget=%s is used up: the SSD cache goes on serving, and writes again as the day passes",
                format_size(limits.write_budget_bytes or 0),
            )
        elif outcome is SaveOutcome.FREE_SPACE:
            self._stats.count(refused_by_free_space=1)
            self._stats.warn(
                "free space",
                "less than ssd_min_free=%s would be free on the volume: the SSD cache goes on serving, and writes "
                "again when there is room",
                format_size(limits.min_free_bytes),
            )

    def _drop(self, block_hash: BlockHash, version: FileVersion | None, is_counted: bool) -> None:
        was_published = self._publisher.drop(block_hash, version)
        self.unreadable.pop(block_hash, None)
        if was_published and not is_counted:
            self._stats.count_corrupt()
            self._stats.warn("read", "cache block %s is missing and will be computed again", block_hash.hex())

    def _report_errors(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as exc:
            self._stats.warn("index", "%s failed in the SSD cache: %s", what, exc)
