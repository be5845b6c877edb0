"""Both tiers behind four verbs: match, restore, store, release.

A block's content is in RAM, on SSD, or on its way there (the SSD tier's write queue keeps it); never nowhere. While
that queue is full, a released sequence is held in RAM until all of it has been taken in hand: nothing is dropped, and
nothing waits. Losing the race for space or finding a file damaged costs a recomputation, nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.block_pool import CacheBlock
from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.events import EventBus, Listener
from omlx_core.cache.neighbour import Neighbour
from omlx_core.cache.paged_cache import HotCacheStats, PagedCacheManager
from omlx_core.cache.parts import ROWS, WINDOW, Part, PartKey, PrefixContent, hash_part
from omlx_core.cache.payload import BlockBuffers, BlockLayout, BlockPayload, Place, layout_size_bytes
from omlx_core.cache.pending_restore import Content, PendingRestore, is_lost, lost
from omlx_core.cache.pins import Needs, PinnedPrefix, PinnedPrefixes
from omlx_core.cache.prefix_lookup import PrefixLookup
from omlx_core.cache.promotion import Promoter
from omlx_core.cache.ssd_cache import PagedSSDCacheManager, SSDCacheStats
from omlx_core.errors import CacheInvariantError

_NUM_READERS = max(4, min(8, os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class CapturedBlock:
    """What a block that has filled holds.

    Attributes:
        rows: its rows; None if they were not asked for, because RAM has them.
        window: its windowed layers' rows; None if there are no such layers.
    """

    rows: BlockPayload | None
    window: BlockPayload | None = None


CaptureBlock = Callable[[int, int, bool], CapturedBlock | None]
"""Copies the tokens ``[start, stop)`` of a running sequence; without rows if the last argument says that RAM has them.
None if they can't be had any more."""

Allocate = Callable[[Mapping[Place, BlockLayout]], BlockBuffers | None]
"""Memory for what is to be read, of these layouts; None if each block is to have memory of its own."""


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


class TieredCache:
    """The prefix cache of one model.

    One thread, the engine's, calls match, restore, store, release and pin; `stats`, `flush`, `pins` and `unpin` are for
    any.

    Args:
        paged: the hot tier.
        ssd: the SSD tier, if it is on.
        events: where to tell of hits and misses; the tiers tell of the rest.
        max_pinned_bytes: most bytes in RAM that pinned prefixes may take; None is no limit.

    Attributes:
        lookup: looks at what there is and holds nothing; for any thread.
    """

    def __init__(
        self,
        paged: PagedCacheManager,
        ssd: PagedSSDCacheManager | None = None,
        events: EventBus | None = None,
        *,
        max_pinned_bytes: int | None = None,
    ) -> None:
        self._paged = paged
        self.lookup = PrefixLookup(paged, ssd)
        self._pins = PinnedPrefixes(paged, max_pinned_bytes)
        self._ssd = ssd
        self._events = EventBus() if events is None else events
        self._unsaved: deque[BlockTable] = deque()
        self._is_all_in_hand = threading.Event()
        self._is_all_in_hand.set()
        self._wake: Callable[[], None] = lambda: None
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="omlx-read") if ssd else None
        self._promoter = Promoter(paged, ssd) if ssd else None
        self._layouts: dict[Part, BlockLayout] = {}
        self._matched_tokens_hot = 0
        self._matched_tokens_cold = 0
        self._missed_tokens = 0
        self._lost_blocks = 0

    @property
    def ssd(self) -> PagedSSDCacheManager | None:
        """The SSD tier, for its maintenance; None if it is off."""
        return self._ssd

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._paged.block_size

    def match(
        self,
        token_ids: Sequence[int],
        extra_keys: tuple[str, ...] = (),
        needs: Needs = lambda _: (),
        *,
        max_tokens: int | None = None,
        allocate: Allocate | None = None,
        earlier: PendingRestore | None = None,
    ) -> PendingRestore:
        """Find and hold the longest cached prefix that leaves a token to compute; start reading what is on SSD.

        Args:
            token_ids: the whole prompt.
            extra_keys: must equal those that the blocks were stored under.
            needs: the parts, besides rows, that a restore of that many blocks needs. The prefix is cut to where a
                tier has all of them.
            max_tokens: reuse no more than this; None leaves one token.
            allocate: where what has to be read is to go. Called at most once, if there is anything.
            earlier: a match of the same prompt that this one takes the place of, not yet released: what it has read,
                or is reading, is not read again.

        Returns:
            What `finish_restore` completes. Its table must be given to `release` in any case.
        """
        limit = len(token_ids) - 1 if max_tokens is None else max_tokens
        table = self._paged.get_computed_blocks(token_ids, extra_keys, max_tokens=limit)
        num_matched = num_blocks = len(table.blocks)
        while num_blocks and not self._paged.acquire_parts(table, needs(num_blocks)):
            num_blocks -= 1
        self._paged.truncate(table, num_blocks)
        if earlier is not None and not _goes_on_from(table, earlier):
            earlier.cancel()
            earlier = None
        buffers = earlier.buffers if earlier is not None else None
        if buffers is None and allocate is not None and (unread := self._unread(table)):
            buffers = allocate(unread)
        rows = [
            self._content(block, position, table.tokens[position], buffers, earlier)
            for position, block in enumerate(table.blocks)
        ]
        parts = {key: self._content(block, key, (), buffers, earlier) for key, block in table.parts.items()}
        if self._ssd is not None:
            # What was evicted there but is still in RAM is written again: a chain that lives in RAM alone could never
            # be continued on SSD, where a child is written only after its parent.
            table.unsaved_parts.update(table.parts)
            # What isn't in RAM was just found there: to ask again, beside the reads, takes as long as some of them.
            in_ram = (position for position, block in enumerate(table.blocks) if block.payload is not None)
            table.num_saved = next(in_ram, len(table.blocks))
            self._hand_over(table, self._ssd)
            used = [*table.blocks, *table.parts.values()]
            self._ssd.touch([block.block_hash for block in used if block.block_hash is not None])
        return PendingRestore(table, num_matched, rows, parts, buffers)

    def finish_restore(self, pending: PendingRestore, num_prompt_tokens: int) -> PrefixContent | None:
        """The content of the matched blocks; the table is cut where a block could not be read.

        Returns:
            None if what is left can't be restored, because a part is lost: match again, which then finds less.
        """
        content = pending.content()
        table = pending.table
        num_lost = len(table.blocks) - len(content.rows) + len(table.parts) - len(content.parts)
        self._lost_blocks += num_lost
        if num_lost and table.parts:
            return None
        self._paged.truncate(table, len(content.rows))
        num_hot = pending.num_hot_blocks
        num_cold = len(content.rows) - num_hot
        self._remember_layouts(content)
        self._events.publish("hit", "hot", num_blocks=num_hot, size_bytes=content.size_bytes(0, num_hot))
        self._events.publish("hit", "cold", num_blocks=num_cold, size_bytes=content.size_bytes(num_hot))
        num_missed = (num_prompt_tokens - table.num_tokens) // self.block_size
        self._events.publish("miss", "cold" if self._ssd else "hot", num_blocks=num_missed, size_bytes=0)
        self._matched_tokens_hot += num_hot * self.block_size
        self._matched_tokens_cold += num_cold * self.block_size
        self._missed_tokens += num_prompt_tokens - table.num_tokens
        return content

    def promote(self, table: BlockTable, content: PrefixContent) -> None:
        """Keep in RAM what was read from SSD, as far as there is room, the trunk first.

        Rows that are nowhere but in a request's memory follow in their own time, which `flush` waits for.
        """
        for block, rows in zip(table.blocks, content.rows, strict=True):
            if isinstance(rows, BlockPayload):
                self._paged.promote(block, rows)
        for key, part in content.parts.items():
            if isinstance(part, BlockPayload):
                self._paged.promote(table.parts[key], part)
        if content.in_place and self._promoter is not None:
            self._promoter.submit(table, content.in_place, layout_size_bytes(content.rows_layout))

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks; see `PagedCacheManager.fork_block_table`. To be released, too."""
        return self._paged.fork_block_table(table)

    def discard(self, table: BlockTable) -> None:
        """Give up a matched prefix that could not be put to use; the sequence is then computed from its start."""
        self._paged.truncate(table, 0)

    def append_tokens(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Account for tokens that have been computed."""
        self._paged.append_tokens(table, token_ids)

    def store(self, table: BlockTable, capture: CaptureBlock) -> None:
        """Publish every block that has filled, in order, in both tiers.

        What no tier has room for stays unpublished, and so does all that follows it: a chain never has a hole. A
        later call tries again.
        """
        while (full := self._paged.next_full_block(table)) is not None:
            start = full.position * self.block_size
            captured = capture(start, start + self.block_size, self._paged.has_payload(full.block_hash))
            if captured is None:
                return
            if captured.rows is None:
                if not self._paged.share_block(table, full):
                    return
            else:
                in_cold_tier = False
                if self._ssd is not None and self._hand_over(table, self._ssd) and table.num_saved == full.position:
                    in_cold_tier = self._save(
                        self._ssd, full.block_hash, full.parent_hash, full.token_ids, captured.rows
                    )
                if not self._paged.commit_block(table, full, captured.rows, in_cold_tier=in_cold_tier):
                    return
                table.num_saved += in_cold_tier
            if captured.window is not None:
                self.store_part(table, PartKey(full.position, WINDOW), captured.window)

    def store_part(self, table: BlockTable, key: PartKey, payload: BlockPayload) -> None:
        """Publish a part of a block, if that is published; where there is no room for it, it is not kept."""
        if key.position >= table.num_committed:
            return
        in_cold_tier = False
        if self._ssd is not None and self._hand_over(table, self._ssd):
            block_hash = table.blocks[key.position].block_hash
            if block_hash is not None:
                part_hash = hash_part(block_hash, key.part)
                in_cold_tier = self._save(self._ssd, part_hash, block_hash, (), payload, part=key.part)
        if self._paged.commit_part(table, key, payload, in_cold_tier=in_cold_tier) and not in_cold_tier:
            table.unsaved_parts.add(key)

    def release(self, table: BlockTable) -> None:
        """Let go of a table's blocks, once the SSD tier has them in hand; they stay cached until they are evicted."""
        if self._ssd is None:
            self._paged.free_block_table(table)
            return
        self._paged.truncate(table, table.num_committed)
        # In line first: a write that finishes from here on wakes the thread that serves it.
        self._is_all_in_hand.clear()
        self._unsaved.append(table)
        self.retry_unsaved()

    def pin(self, table: BlockTable, num_tokens: int, needs: Needs = lambda _: ()) -> int:
        """Keep the beginning of a sequence in RAM until it is unpinned; see `PinnedPrefixes.pin`."""
        return self._pins.pin(table, num_tokens, needs)

    def pins(self) -> list[PinnedPrefix]:
        """The prefixes that are kept in RAM, least recently used first."""
        return self._pins.prefixes()

    def unpin(self, token_ids: Sequence[int] | None = None, extra_keys: tuple[str, ...] = ()) -> int:
        """Let go of pinned prefixes that a sequence begins with, or of all; returns how many there were."""
        return self._pins.unpin(token_ids, extra_keys)

    def on_progress(self, wake: Callable[[], None]) -> None:
        """Say how to have `retry_unsaved` called; `wake` is called from the SSD tier's thread."""
        self._wake = wake

    def retry_unsaved(self) -> None:
        """Hand released sequences to the SSD tier as far as its queue has room."""
        while self._ssd is not None and self._unsaved:
            table = self._unsaved[0]
            if not self._hand_over(table, self._ssd):
                return
            self._unsaved.popleft()
            self._paged.free_block_table(table)
        self._is_all_in_hand.set()

    def find_neighbour(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> Neighbour | None:
        """The sequence on SSD that a prompt shares most with; see `PagedSSDCacheManager.find_neighbour`."""
        return None if self._ssd is None else self._ssd.find_neighbour(token_ids, self.block_size, extra_keys)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have a listener called with every `CacheEvent` from now on, on a thread of its own.

        Returns:
            A function that ends the subscription.
        """
        return self._events.subscribe(listener)

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
        """Wait until all stored blocks are durable on SSD, or given up, and what was read from there is kept in RAM.

        Returns:
            False if `timeout_s` ran out first.
        """
        if self._ssd is None or self._promoter is None:
            return True
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._promoter.flush(timeout_s) or not self._is_all_in_hand.wait(timeout_s):
            return False
        return self._ssd.flush(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))

    def check(self) -> None:
        """Verify the invariants of the hot tier; for tests.

        Raises:
            CacheInvariantError: naming what is broken.
        """
        self._paged.check()

    def close(self, timeout_s: float = 30.0) -> None:
        """Flush, for `timeout_s` at the most, stop the I/O threads, and let go of what is in RAM. Idempotent.

        The thread that calls match, restore, store and release must have stopped.
        """
        deadline_s = time.monotonic() + timeout_s
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        if self._promoter is not None:
            self._promoter.close()
        if self._ssd is not None:
            while self._unsaved and self._ssd.flush(max(0.0, deadline_s - time.monotonic())):
                self.retry_unsaved()
            self._ssd.close(max(0.0, deadline_s - time.monotonic()))
        self._pins.unpin()
        self._events.close()
        self._unsaved.clear()
        self._paged.close()

    def _content(
        self,
        block: CacheBlock,
        place: Place,
        token_ids: Sequence[int],
        buffers: BlockBuffers | None,
        earlier: PendingRestore | None,
    ) -> Content:
        """What a block holds, or the read that gets it: that of an earlier match, if there is one."""
        read = None if earlier is None else earlier.read_of(place)
        if read is not None:
            return read
        if block.payload is not None:
            return block.payload
        if self._ssd is None or self._readers is None or block.block_hash is None:
            return lost()
        if buffers is None:
            return self._readers.submit(self._ssd.load_block, block.block_hash, token_ids)
        buffers.prepare(place)
        return self._readers.submit(self._ssd.load_block_into, block.block_hash, token_ids, buffers, place)

    def _unread(self, table: BlockTable) -> dict[Place, BlockLayout]:
        """The layout of each block of a table that has to be read to its place.

        All rows of a model have one, as a rule, and so has each other part: that of the first one stands for all.
        """
        unread: dict[Place, BlockLayout] = {}
        if self._ssd is None or not self._ssd.reads_in_place:
            return unread
        layouts: dict[Part, BlockLayout | None] = {}
        places: list[tuple[Place, CacheBlock]] = [*enumerate(table.blocks), *table.parts.items()]
        for place, block in places:
            if block.part not in layouts:
                layouts[block.part] = self._find_layout(block, self._ssd)
            layout = layouts[block.part]
            if block.payload is None and layout is not None:
                unread[place] = layout
        return unread

    def _find_layout(self, block: CacheBlock, ssd: PagedSSDCacheManager) -> BlockLayout | None:
        if block.payload is not None:
            return block.payload.layout
        if block.part in self._layouts or block.block_hash is None:
            return self._layouts.get(block.part)
        return ssd.read_layout(block.block_hash)  # not kept: only a whole file is verified

    def _remember_layouts(self, content: PrefixContent) -> None:
        """As verified files have them."""
        if content.rows_layout:
            self._layouts[ROWS] = content.rows_layout
        for key, part in content.parts.items():
            if content.buffers is not None and not isinstance(part, BlockPayload):
                self._layouts[key.part] = content.buffers.layout_of(key)

    def _hand_over(self, table: BlockTable, ssd: PagedSSDCacheManager) -> bool:
        """Have the SSD tier take in hand what it lacks of a table's published blocks, in order.

        Returns:
            False if its queue is full now, so that trying again makes sense. What it refuses for another reason, or
            what is no longer in RAM, ends the chain there.
        """
        while table.num_saved < table.num_committed:
            position = table.num_saved
            block = table.blocks[position]
            if block.block_hash is None:
                raise CacheInvariantError(f"block {position} of {table.num_committed} published ones has no hash")
            if not ssd.has_block(block.block_hash):
                if block.payload is None:
                    return True
                parent_hash = table.blocks[position - 1].block_hash if position else None
                if not self._save(ssd, block.block_hash, parent_hash, table.tokens[position], block.payload):
                    return ssd.stats().queued_blocks == 0
            table.num_saved += 1
        for key in sorted(table.unsaved_parts):
            part = table.parts[key]
            if part.block_hash is not None and part.payload is not None and not ssd.has_block(part.block_hash):
                parent_hash = table.blocks[key.position].block_hash
                if not self._save(ssd, part.block_hash, parent_hash, (), part.payload, part=key.part):
                    return ssd.stats().queued_blocks == 0
            table.unsaved_parts.discard(key)
        return True

    def _save(
        self,
        ssd: PagedSSDCacheManager,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        payload: BlockPayload,
        *,
        part: Part = ROWS,
    ) -> bool:
        """Queue a block for writing, unless it would be dropped there for want of its parent."""
        is_queued = (parent_hash is None or ssd.has_block(parent_hash)) and ssd.save_block(
            block_hash, parent_hash, token_ids, payload, on_complete=self._on_written, part=part
        )
        if not is_queued:
            payload.release_copies()
        return is_queued

    def _on_written(self, block_hash: BlockHash, is_on_disk: bool) -> None:
        del block_hash, is_on_disk  # either way the queue has room again
        if self._unsaved:
            self._wake()


def _goes_on_from(table: BlockTable, earlier: PendingRestore) -> bool:
    """Whether a table begins with all blocks of an earlier match, none of which was lost.

    Otherwise a read could still be putting rows where the table's sequence is about to go on.
    """
    if any(is_lost(content) for content in (*earlier.rows, *earlier.parts.values())):
        return False
    num_blocks = len(earlier.table.blocks)
    return [block.block_hash for block in table.blocks[:num_blocks]] == [
        block.block_hash for block in earlier.table.blocks
    ]
