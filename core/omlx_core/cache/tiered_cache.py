"""Both tiers behind four verbs: match, restore, store, release.

A block's content is in RAM, on SSD, or on its way there (the SSD tier's write queue keeps it); never nowhere. Losing
the race for space or finding a file damaged costs a recomputation, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from omlx_core.cache.paged_cache import BlockTable, FullBlock, HotCacheStats, PagedCacheManager
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import PagedSSDCacheManager, SSDCacheStats

_NUM_IO_THREADS = 4

CaptureBlocks = Callable[[Sequence[tuple[int, int]]], Sequence[BlockPayload]]
"""Copies token ranges ``[start, stop)`` of a running sequence's layer caches into payloads, one each."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Both tiers at one moment.

    Attributes:
        hot: the tier in RAM.
        cold: the SSD tier; None if it is off.
        matched_tokens_hot: prompt tokens served from RAM so far.
        matched_tokens_cold: prompt tokens served from SSD so far.
        missed_tokens: prompt tokens that had to be computed so far.
        lost_blocks: blocks that were found but could not be read when they were needed.
    """

    hot: HotCacheStats
    cold: SSDCacheStats | None
    matched_tokens_hot: int
    matched_tokens_cold: int
    missed_tokens: int
    lost_blocks: int

    @property
    def matched_tokens(self) -> int:
        """Prompt tokens served from either tier so far."""
        return self.matched_tokens_hot + self.matched_tokens_cold


class PendingRestore:
    """The content of a matched prefix, part of which may still be on its way from the SSD tier.

    Attributes:
        table: the matched blocks.
    """

    def __init__(self, table: BlockTable, contents: list[BlockPayload | Future[BlockPayload | None]]) -> None:
        self.table = table
        self._contents = contents

    @property
    def num_hot_blocks(self) -> int:
        """How many of the blocks were in RAM when they were matched; once they are read, of those that count."""
        return sum(not isinstance(content, Future) for content in self._contents)

    def is_ready(self) -> bool:
        """Whether `TieredCache.finish_restore` would return without waiting."""
        return all(content.done() for content in self._contents if isinstance(content, Future))

    def notify(self, callback: Callable[[], None]) -> None:
        """Call back, from an I/O thread, whenever a read has finished."""
        for content in self._contents:
            if isinstance(content, Future):
                content.add_done_callback(lambda _: callback())

    def payloads(self) -> list[BlockPayload]:
        """The content up to the first block that could not be read. Waits for reads that still run."""
        found = []
        for content in self._contents:
            payload = content.result() if isinstance(content, Future) else content
            if payload is None:
                break
            found.append(payload)
        del self._contents[len(found) :]
        return found


class TieredCache:
    """The prefix cache of one model.

    One thread, the engine's, calls match, restore, store and release; `stats` and `flush` are for any.

    Args:
        paged: the hot tier.
        ssd: the SSD tier, if it is on.
    """

    def __init__(self, paged: PagedCacheManager, ssd: PagedSSDCacheManager | None = None) -> None:
        self._paged = paged
        self._ssd = ssd
        self._readers = ThreadPoolExecutor(_NUM_IO_THREADS, thread_name_prefix="omlx-read") if ssd else None
        self._matched_tokens_hot = 0
        self._matched_tokens_cold = 0
        self._missed_tokens = 0
        self._lost_blocks = 0

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._paged.block_size

    def match(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> PendingRestore:
        """Find and hold the longest cached prefix that leaves a token to compute; start reading what is on SSD.

        Returns:
            What `finish_restore` completes. Its table must be given to `release` in any case.
        """
        table = self._paged.get_computed_blocks(token_ids, extra_keys, max_tokens=len(token_ids) - 1)
        contents: list[BlockPayload | Future[BlockPayload | None]] = []
        for position, block in enumerate(table.blocks):
            payload = block.payload
            if payload is not None:
                contents.append(payload)
            elif self._ssd is not None and self._readers is not None and block.block_hash is not None:
                tokens = self._tokens_of(table, position)
                contents.append(self._readers.submit(self._ssd.load_block, block.block_hash, tokens))
        if self._ssd is not None:
            self._refill_cold(table, self._ssd)
            self._ssd.touch([block.block_hash for block in table.blocks if block.block_hash is not None])
        return PendingRestore(table, contents)

    def finish_restore(self, pending: PendingRestore, num_prompt_tokens: int) -> list[BlockPayload]:
        """The content of the matched blocks, in order; the table is cut where a block could not be read."""
        payloads = pending.payloads()
        table = pending.table
        self._lost_blocks += len(table.blocks) - len(payloads)
        self._paged.truncate(table, len(payloads))
        hot_tokens = pending.num_hot_blocks * self.block_size
        self._matched_tokens_hot += hot_tokens
        self._matched_tokens_cold += table.num_tokens - hot_tokens
        self._missed_tokens += num_prompt_tokens - table.num_tokens
        return payloads

    def promote(self, table: BlockTable, payloads: Sequence[BlockPayload]) -> None:
        """Keep in RAM what was read from SSD, as far as there is room, the trunk first."""
        for block, payload in zip(table.blocks, payloads, strict=True):
            self._paged.promote(block, payload)

    def discard(self, table: BlockTable) -> None:
        """Give up a matched prefix that could not be put to use; the sequence is then computed from its start."""
        self._paged.truncate(table, 0)

    def append_tokens(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Account for tokens that have been computed."""
        self._paged.append_tokens(table, token_ids)

    def store(self, table: BlockTable, capture: CaptureBlocks) -> None:
        """Publish every block that has filled, in order, in both tiers.

        What no tier has room for stays unpublished, and so does all that follows it: a chain never has a hole. A
        later call tries again.
        """
        while (full := self._paged.next_full_block(table)) is not None:
            if self._paged.share_block(table, full):
                continue
            # One at a time: what is copied but finds no room would be copied again at every later call.
            start = full.position * self.block_size
            [payload] = capture([(start, start + self.block_size)])
            in_cold_tier = self._ssd is not None and self._save(self._ssd, full, payload)
            if not self._paged.commit_block(table, full, payload, in_cold_tier=in_cold_tier):
                return

    def release(self, table: BlockTable) -> None:
        """Let go of a table's blocks; they stay cached until they are evicted."""
        self._paged.free_block_table(table)

    def stats(self) -> CacheStats:
        """Counters and sizes at this moment."""
        return CacheStats(
            hot=self._paged.stats(),
            cold=self._ssd.stats() if self._ssd else None,
            matched_tokens_hot=self._matched_tokens_hot,
            matched_tokens_cold=self._matched_tokens_cold,
            missed_tokens=self._missed_tokens,
            lost_blocks=self._lost_blocks,
        )

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all stored blocks are durable on SSD, or given up.

        Returns:
            False if `timeout_s` ran out first.
        """
        return self._ssd.flush(timeout_s) if self._ssd else True

    def check(self) -> None:
        """Verify the invariants of the hot tier; for tests.

        Raises:
            CacheInvariantError: naming what is broken.
        """
        self._paged.check()

    def close(self) -> None:
        """Flush and stop the I/O threads. Idempotent."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        if self._ssd is not None:
            self._ssd.close()

    def _tokens_of(self, table: BlockTable, position: int) -> list[int]:
        return table.token_ids[position * self.block_size : (position + 1) * self.block_size]

    def _save(self, ssd: PagedSSDCacheManager, full: FullBlock, payload: BlockPayload) -> bool:
        """Hand a block to the SSD tier, unless it would be dropped there for want of its parent."""
        if full.parent_hash is not None and not ssd.has_block(full.parent_hash):
            return False
        return ssd.save_block(full.block_hash, full.parent_hash, full.token_ids, payload)

    def _refill_cold(self, table: BlockTable, ssd: PagedSSDCacheManager) -> None:
        """Write what the SSD tier had no room for, or has evicted, and is still in RAM.

        Without it, a chain that lives in RAM could never be continued on SSD: a child is written only after its
        parent. For the same reason the first block that can't be had ends it.
        """
        parent_hash = None
        for position, block in enumerate(table.blocks):
            block_hash, payload = block.block_hash, block.payload
            if block_hash is None:
                return
            if not ssd.has_block(block_hash) and (
                payload is None
                or not ssd.save_block(block_hash, parent_hash, self._tokens_of(table, position), payload)
            ):
                return
            parent_hash = block_hash
