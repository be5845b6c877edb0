from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from omlx_core.cache.block_hash import BlockHash, hash_namespace, iter_block_hashes
from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.events import CacheEvent, EventBus
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW, Part, PartKey, PrefixContent, hash_part
from omlx_core.cache.payload import BlockBuffers, BlockLayout, BlockPayload, BlockTensor, InPlace, LoadedBlock, Place
from omlx_core.cache.pending_restore import PendingRestore
from omlx_core.cache.ssd_cache import PagedSSDCacheManager, SSDCacheStats
from omlx_core.cache.ssd_layout import block_path
from omlx_core.cache.tiered_cache import CapturedBlock, TieredCache

NAMESPACE = hash_namespace({"model": "tiny"})
BLOCK_SIZE = 2
BLOCK_BYTES = 32
WAIT_S = 30.0


class FakeColdTier:
    """An SSD tier in memory that fails and stalls when told to; like the real one, it drops orphans silently."""

    def __init__(self) -> None:
        self.blocks: dict[BlockHash, tuple[tuple[int, ...], BlockPayload]] = {}
        self.parents: dict[BlockHash, BlockHash | None] = {}
        self.saved: list[BlockHash] = []
        self.kinds: dict[BlockHash, Part] = {}
        self.touched: list[list[BlockHash]] = []
        self.unreadable: set[BlockHash] = set()
        self.refused: set[BlockHash] = set()
        self.gates: dict[BlockHash, threading.Event] = {}
        self.reading: dict[BlockHash, threading.Event] = {}
        self.queue_length: int | None = None
        self.queued: list[Callable[[], None]] = []
        self.num_flushes = self.num_closes = 0

    def has_block(self, block_hash: BlockHash) -> bool:
        return block_hash in self.blocks

    def save_block(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        payload: BlockPayload,
        on_complete: Callable[[BlockHash, bool], None],
        *,
        part: Part = ROWS,
    ) -> bool:
        if block_hash in self.refused or len(self.queued) == self.queue_length:
            return False
        if self.queue_length is not None:
            self.queued.append(lambda: on_complete(block_hash, True))
        self.saved.append(block_hash)
        self.kinds[block_hash] = part
        self.parents[block_hash] = parent_hash
        if parent_hash is None or parent_hash in self.blocks:
            self.blocks[block_hash] = tuple(token_ids), payload
        return True

    def load_block(self, block_hash: BlockHash, token_ids: Sequence[int]) -> BlockPayload | None:
        if block_hash in self.reading:
            self.reading[block_hash].set()
        if block_hash in self.gates:
            assert self.gates[block_hash].wait(WAIT_S)
        if block_hash in self.unreadable:
            del self.blocks[block_hash]
            return None
        stored_ids, payload = self.blocks[block_hash]
        return payload if stored_ids == tuple(token_ids) else None

    def load_block_into(
        self, block_hash: BlockHash, token_ids: Sequence[int], buffers: BlockBuffers, place: Place
    ) -> LoadedBlock | None:
        payload = self.load_block(block_hash, token_ids)
        segments = None if payload is None else buffers.segments(place, payload.layout)
        if payload is None or segments is None:
            return payload
        data = b"".join(tensor.data for tensor in payload.tensors.values())
        for segment in segments:
            segment[:], data = data[: len(segment)], data[len(segment) :]
        return InPlace.IN_PLACE

    reads_in_place = True

    def read_layout(self, block_hash: BlockHash) -> BlockLayout | None:
        return self.blocks[block_hash][1].layout

    def write_one(self) -> None:
        self.queued.pop(0)()

    def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        self.touched.append(list(block_hashes))

    def flush(self, timeout_s: float | None = None) -> bool:
        self.num_flushes += 1
        while self.queued and timeout_s != 0:
            self.write_one()
        return timeout_s != 0

    def stats(self) -> SSDCacheStats:
        return SSDCacheStats(num_blocks=len(self.blocks), queued_blocks=len(self.queued))

    def close(self, timeout_s: float = WAIT_S) -> None:
        self.num_closes += 1


def content_of(token_ids: Sequence[int]) -> bytes:
    """What the block that ends with these tokens holds."""
    return bytes(token_ids).rjust(BLOCK_BYTES, b"\0")


def payload_of(token_ids: Sequence[int]) -> BlockPayload:
    return BlockPayload({"kv": BlockTensor("U8", (BLOCK_BYTES,), memoryview(content_of(token_ids)))})


def hashes_of(token_ids: Sequence[int], extra_keys: Sequence[str] = ()) -> list[BlockHash]:
    return list(iter_block_hashes(NAMESPACE, token_ids, BLOCK_SIZE, extra_keys))


def make_cache(cold: FakeColdTier | PagedSSDCacheManager | None = None, hot_blocks: int | None = None) -> TieredCache:
    ssd = cast("PagedSSDCacheManager | None", cold)
    hot_max_bytes = None if hot_blocks is None else hot_blocks * BLOCK_BYTES
    events = EventBus(NAMESPACE)
    paged = PagedCacheManager(
        NAMESPACE,
        block_size=BLOCK_SIZE,
        initial_blocks=4,
        hot_max_bytes=hot_max_bytes,
        cold=ssd,
        events=events,
    )
    return TieredCache(paged, ssd, events)


def finish(cache: TieredCache, pending: PendingRestore, num_prompt_tokens: int) -> PrefixContent:
    content = cache.finish_restore(pending, num_prompt_tokens)
    assert content is not None
    return content


@dataclass
class Request:
    """A request as the engine runs it: its token ids stand in for its keys and values."""

    cache: TieredCache
    prompt: list[int]
    table: BlockTable
    captured: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def start(cls, cache: TieredCache, prompt: Sequence[int], extra_keys: tuple[str, ...] = ()) -> Request:
        pending = cache.match(prompt, extra_keys)
        content = finish(cache, pending, len(prompt))
        assert [bytes(payload.tensors["kv"].data) for payload in content.rows] == [
            content_of(prompt[:stop]) for stop in range(BLOCK_SIZE, pending.table.num_tokens + 1, BLOCK_SIZE)
        ]
        cache.promote(pending.table, content)
        return cls(cache, list(prompt), pending.table)

    @property
    def num_cached(self) -> int:
        return self.table.num_tokens

    def compute(self, num_tokens: int | None = None) -> None:
        start = self.table.num_tokens
        stop = len(self.prompt) if num_tokens is None else start + num_tokens
        self.cache.append_tokens(self.table, self.prompt[start:stop])

    def store(self) -> None:
        self.cache.store(self.table, self._capture)

    def _capture(self, start: int, stop: int, has_rows: bool) -> CapturedBlock:
        if has_rows:
            return CapturedBlock(None)
        self.captured.append((start, stop))
        return CapturedBlock(payload_of(self.prompt[:stop]))


def run(cache: TieredCache, prompt: Sequence[int], extra_keys: tuple[str, ...] = ()) -> Request:
    """A request with all it has published, still holding its blocks."""
    request = Request.start(cache, prompt, extra_keys)
    request.compute()
    request.store()
    return request


def serve(cache: TieredCache, prompt: Sequence[int], extra_keys: tuple[str, ...] = ()) -> int:
    """A whole request; how many of its tokens were cached."""
    request = Request.start(cache, prompt, extra_keys)
    num_cached = request.num_cached
    request.compute()
    request.store()
    cache.release(request.table)
    cache.check()
    return num_cached


def restart(cold: FakeColdTier, hot_blocks: int | None = None) -> TieredCache:
    """A new process on the same SSD tier."""
    cold.saved.clear()
    cold.touched.clear()
    return make_cache(cold, hot_blocks)


@pytest.fixture
def cold() -> FakeColdTier:
    return FakeColdTier()


# Match and restore.


def test_a_prefix_is_served_from_ram(cold: FakeColdTier) -> None:
    cache = make_cache()
    assert serve(cache, [1, 2, 3, 4, 5]) == 0
    assert serve(cache, [1, 2, 3, 4, 6]) == 4
    stats = cache.stats()
    assert (stats.matched_tokens_hot, stats.matched_tokens_cold, stats.missed_tokens) == (4, 0, 5 + 1)
    assert (stats.cold, stats.lost_blocks) == (None, 0)


def test_a_prefix_is_served_from_ssd_after_a_restart(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    cache = restart(cold)
    assert serve(cache, [1, 2, 3, 4, 6]) == 4
    stats = cache.stats()
    assert (stats.matched_tokens_hot, stats.matched_tokens_cold, stats.missed_tokens) == (0, 4, 1)
    assert stats.cold is not None
    assert stats.cold.num_blocks == 2


def test_a_match_leaves_a_token_to_compute(cold: FakeColdTier) -> None:
    cache = make_cache()
    serve(cache, [1, 2, 3, 4])
    assert serve(cache, [1, 2, 3, 4]) == 2


def test_another_salt_shares_nothing_in_either_tier(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3], extra_keys=("salt:a",))
    assert serve(cache, [1, 2, 3]) == 0
    assert serve(cache, [1, 2, 3], extra_keys=("salt:a",)) == 2


def test_ram_and_ssd_hits_are_told_apart(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5, 6])
    cache = restart(cold, hot_blocks=1)
    serve(cache, [1, 2, 9])
    pending = cache.match([1, 2, 3, 4, 5, 6, 7])
    assert pending.num_hot_blocks == 1
    assert len(finish(cache, pending, 7).rows) == 3
    stats = cache.stats()
    assert (stats.matched_tokens_hot, stats.matched_tokens_cold) == (2, 2 + 4)


def test_a_restore_is_ready_when_its_last_read_is(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    first, second = hashes_of([1, 2, 3, 4])
    cold.gates = {first: threading.Event(), second: threading.Event()}
    cache = restart(cold)
    pending = cache.match([1, 2, 3, 4, 5])
    woken = threading.Semaphore(0)
    pending.notify(woken.release)
    assert not pending.is_ready()
    cold.gates[second].set()
    assert woken.acquire(timeout=WAIT_S)
    assert not pending.is_ready()
    cold.gates[first].set()
    assert woken.acquire(timeout=WAIT_S)
    assert pending.is_ready()
    assert len(finish(cache, pending, 5).rows) == 2


def test_a_restore_from_ram_is_ready_at_once() -> None:
    cache = make_cache()
    serve(cache, [1, 2, 3])
    assert cache.match([1, 2, 3]).is_ready()
    assert cache.match([9, 9, 9]).is_ready()


def test_reads_of_one_prefix_run_side_by_side(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    hashes = hashes_of([1, 2, 3, 4])
    cold.gates = {block_hash: threading.Event() for block_hash in hashes}
    cold.reading = {block_hash: threading.Event() for block_hash in hashes}
    cache = restart(cold)
    pending = cache.match([1, 2, 3, 4, 5])
    assert all(event.wait(WAIT_S) for event in cold.reading.values())
    for gate in cold.gates.values():
        gate.set()
    assert len(pending.content().rows) == 2


def test_a_match_can_be_released_while_it_is_being_read(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3])
    [block_hash] = hashes_of([1, 2])
    cold.gates[block_hash] = threading.Event()
    cache = restart(cold)
    pending = cache.match([1, 2, 3])
    cache.release(pending.table)
    cold.gates[block_hash].set()
    assert cache.stats().hot.blocks_in_use == 0
    assert serve(cache, [1, 2, 3]) == 2


# Reads that fail.


def test_a_failing_read_in_the_middle_cuts_the_prefix_there(cold: FakeColdTier) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    serve(make_cache(cold), prompt)
    hashes = hashes_of(prompt)
    cold.unreadable.add(hashes[1])
    cache = restart(cold)
    pending = cache.match(prompt)
    assert len(pending.table.blocks) == 3
    [payload] = finish(cache, pending, len(prompt)).rows
    assert payload.tensors["kv"].data == content_of([1, 2])
    assert (pending.table.token_ids, pending.table.num_committed) == ([1, 2], 1)
    stats = cache.stats()
    assert stats.lost_blocks == 2
    assert (stats.matched_tokens_cold, stats.missed_tokens, stats.hot.blocks_in_use) == (2, 5, 1)
    cache.check()


def test_a_lost_block_is_stored_anew_by_the_request_that_missed_it(cold: FakeColdTier) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    serve(make_cache(cold), prompt)
    hashes = hashes_of(prompt)
    cold.unreadable.add(hashes[1])
    cache = restart(cold)
    assert serve(cache, prompt) == 2
    cold.unreadable.clear()
    assert cold.saved == hashes[1:]
    assert serve(cache, prompt) == 6
    assert serve(restart(cold), prompt) == 6


def test_a_failing_first_read_costs_the_whole_prefix_and_nothing_more(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    cold.unreadable.add(hashes_of([1, 2])[0])
    cache = restart(cold)
    request = run(cache, [1, 2, 3, 4, 5])
    assert (request.captured, cache.stats().matched_tokens_cold) == ([(0, 2), (2, 4)], 0)


def test_only_what_was_restored_counts_as_a_hit(cold: FakeColdTier) -> None:
    # The tiers alternate: SSD, lost, RAM. Hits in RAM behind the cut are no hits.
    prompt = [1, 2, 3, 4, 5, 6, 7]
    cache = cache_with_only_the_last_block_in_ram(cold, prompt)
    cold.unreadable.add(hashes_of(prompt)[1])
    pending = cache.match(prompt)
    assert pending.num_hot_blocks == 1
    assert len(finish(cache, pending, len(prompt)).rows) == 1
    assert pending.num_hot_blocks == 0
    assert (cache.stats().matched_tokens_hot, cache.stats().matched_tokens_cold) == (0, 2)


def test_a_block_in_ram_behind_a_lost_one_is_shared_again_once_the_gap_is_filled(cold: FakeColdTier) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    cache = cache_with_only_the_last_block_in_ram(cold, prompt)
    cold.unreadable.add(hashes_of(prompt)[1])
    request = run(cache, prompt)
    assert request.captured == [(2, 4)]
    assert request.table.num_committed == 3
    cache.check()


def cache_with_only_the_last_block_in_ram(cold: FakeColdTier, prompt: list[int]) -> TieredCache:
    """The first blocks of the prompt were published while others filled the RAM; the last one found room."""
    cache = make_cache(cold, hot_blocks=3)
    holder = run(cache, [90, 91, 92, 93, 94, 95])
    request = Request.start(cache, prompt)
    request.compute(len(prompt) - 3)
    request.store()
    cache.release(holder.table)
    request.compute()
    request.store()
    assert [block.payload is not None for block in request.table.blocks[:-1]] == [False, False, True]
    cache.release(request.table)
    return cache


def test_a_prefix_that_cannot_be_used_is_given_up_whole(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    pending = cache.match([1, 2, 3, 4, 5])
    cache.finish_restore(pending, 5)
    cache.discard(pending.table)
    assert (pending.table.num_tokens, cache.stats().hot.blocks_in_use) == (0, 0)
    cache.append_tokens(pending.table, [1, 2])
    cache.check()


# Store.


def test_each_block_is_captured_once_as_it_fills() -> None:
    cache = make_cache()
    request = Request.start(cache, [1, 2, 3, 4, 5, 6, 7])
    request.compute(1)
    request.store()
    assert request.captured == []
    request.compute(4)
    request.store()
    assert request.captured == [(0, 2), (2, 4)]
    request.store()
    request.compute(1)
    request.store()
    request.compute(1)
    request.store()
    assert request.captured == [(0, 2), (2, 4), (4, 6)]


def test_matched_blocks_are_not_captured(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    assert run(cache, [1, 2, 3, 4, 5, 6, 7]).captured == [(4, 6)]
    assert cold.saved == hashes_of([1, 2, 3, 4, 5, 6])


def test_blocks_that_another_request_published_meanwhile_are_not_captured() -> None:
    cache = make_cache()
    first, second = Request.start(cache, [1, 2, 3, 4, 5]), Request.start(cache, [1, 2, 3, 4, 6])
    for request in (first, second):
        request.compute()
        request.store()
    assert (len(first.captured), second.captured) == (2, [])
    assert first.table.blocks[:2] == second.table.blocks[:2]
    assert cache.stats().hot.blocks_in_use == 2 + 2
    cache.check()


def test_blocks_reach_both_tiers_in_chain_order(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5, 6])
    assert cold.saved == hashes_of([1, 2, 3, 4, 5, 6])
    assert [token_ids for token_ids, _ in cold.blocks.values()] == [(1, 2), (3, 4), (5, 6)]
    assert cache.stats().hot.hot_blocks == 3


def test_no_hole_is_left_where_there_was_no_room() -> None:
    cache = make_cache(hot_blocks=2)
    holder = run(cache, [99, 99])
    request = run(cache, [1, 2, 3, 4, 5, 6])
    assert request.table.num_committed == 1
    assert [block.block_hash is not None for block in request.table.blocks] == [True, False, False]
    cache.release(holder.table)
    request.store()
    assert request.table.num_committed == 2
    cache.release(request.table)
    assert serve(cache, [1, 2, 3, 4, 5, 6]) == 4


def test_a_block_without_room_is_the_only_one_captured_in_vain() -> None:
    cache = make_cache(hot_blocks=0)
    request = run(cache, [1, 2, 3, 4, 5, 6])
    request.store()
    assert request.captured == [(0, 2), (0, 2)]


def test_a_block_without_room_in_ram_is_published_from_ssd(cold: FakeColdTier) -> None:
    cache = make_cache(cold, hot_blocks=0)
    assert serve(cache, [1, 2, 3, 4, 5]) == 0
    assert cache.stats().hot.hot_blocks == 0
    assert serve(cache, [1, 2, 3, 4, 5]) == 4
    assert cache.stats().matched_tokens_cold == 4


def test_a_block_that_ssd_refuses_is_kept_in_ram(cold: FakeColdTier) -> None:
    first, second = hashes_of([1, 2, 3, 4])
    cold.refused.add(first)
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    assert cold.saved == []
    assert serve(cache, [1, 2, 3, 4, 5]) == 4
    cold.refused.clear()
    serve(cache, [1, 2, 3, 4, 5])
    assert cold.saved == [first, second]


def test_nothing_is_published_on_the_word_of_an_ssd_tier_that_lacks_the_parent(cold: FakeColdTier) -> None:
    first, second = hashes_of([1, 2, 3, 4])
    cold.refused.add(first)
    cache = make_cache(cold, hot_blocks=1)
    request = run(cache, [1, 2, 3, 4, 5])
    assert request.table.num_committed == 1
    assert not cold.has_block(second)
    cache.check()


def test_what_ssd_has_evicted_is_written_again_at_the_next_match_in_chain_order(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    serve(cache, [1, 2, 3, 4, 5, 6])
    for block_hash in hashes[1:]:
        del cold.blocks[block_hash]
    cold.saved.clear()
    cold.parents.clear()
    assert run(cache, [1, 2, 3, 4, 5, 6, 7, 8]).captured == [(6, 8)]
    hashes = hashes_of([1, 2, 3, 4, 5, 6, 7, 8])
    assert cold.saved == hashes[1:]
    assert cold.parents == dict(zip(hashes[1:], hashes, strict=False))
    assert serve(restart(cold), [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_rewriting_stops_at_the_first_refusal(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5, 6])
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    cold.blocks.clear()
    cold.saved.clear()
    cold.refused.add(hashes[1])
    cache.match([1, 2, 3, 4, 5, 6, 7])
    assert cold.saved == [hashes[0]]


def test_nothing_is_written_twice_while_ssd_has_it(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    cold.saved.clear()
    serve(cache, [1, 2, 3, 4, 5])
    serve(cache, [1, 2, 3, 4, 6])
    assert cold.saved == []


def test_a_use_from_ram_is_a_use_on_ssd_too(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    cold.touched.clear()
    serve(cache, [1, 2, 3, 4, 6])
    assert cold.touched == [hashes_of([1, 2, 3, 4])]


# Promotion.


def test_a_full_queue_keeps_a_released_sequence_in_ram_until_all_of_it_is_in_hand(cold: FakeColdTier) -> None:
    cold.queue_length = 1
    cache = make_cache(cold, hot_blocks=3)
    wakes: list[None] = []
    cache.on_progress(lambda: wakes.append(None))
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    serve(cache, [1, 2, 3, 4, 5, 6, 7])
    assert cold.saved == hashes[:1]
    assert cache.stats().hot.blocks_in_use == 3
    serve(cache, [9, 9, 9])  # finds no room, since nothing that is held is evicted
    again = Request.start(cache, [1, 2, 3, 4, 5, 6, 7])
    assert again.num_cached == 6
    cache.release(again.table)
    for num_saved in (2, 3):
        assert not cache.flush(0)
        cold.write_one()
        cache.retry_unsaved()
        assert cold.saved == hashes[:num_saved]
    assert len(wakes) == 2
    assert cache.flush(0) is False  # the last block is still in the queue
    cold.write_one()
    assert len(wakes) == 2
    assert cache.flush(WAIT_S)
    assert cache.stats().hot.blocks_in_use == 0
    assert serve(cache, [9, 9, 9]) == 0
    assert serve(cache, [9, 9, 9]) == 2  # now that nothing is held, there is room


def test_a_full_queue_delays_the_chain_of_a_running_request_and_drops_none_of_it(cold: FakeColdTier) -> None:
    cold.queue_length = 1
    cache = make_cache(cold)
    request = Request.start(cache, [1, 2, 3, 4, 5, 6, 7])
    request.compute(4)
    request.store()
    assert cold.saved == hashes_of([1, 2])
    cold.write_one()
    request.compute()
    request.store()
    assert cold.saved == hashes_of([1, 2, 3, 4])
    cold.write_one()
    cache.release(request.table)
    assert cold.saved == hashes_of([1, 2, 3, 4, 5, 6])
    assert cache.stats().hot.blocks_in_use == 0


def test_close_hands_over_what_a_full_queue_has_kept_waiting(cold: FakeColdTier) -> None:
    cold.queue_length = 1
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5, 6, 7])
    cache.close()
    assert cold.saved == hashes_of([1, 2, 3, 4, 5, 6])
    assert cache.stats().hot.blocks_in_use == 0


def test_listeners_hear_of_misses_stores_hits_restores_and_evictions_in_order(cold: FakeColdTier) -> None:
    heard: list[tuple[str, str, int, int]] = []

    def listen(cache: TieredCache) -> TieredCache:
        cache.subscribe(lambda event: heard.append((event.kind, event.tier, event.num_blocks, event.size_bytes)))
        return cache

    cache = listen(make_cache(cold))
    serve(cache, [1, 2, 3, 4, 5])
    serve(cache, [1, 2, 3, 4, 5])
    cache.close()
    stored = ("store", "hot", 1, BLOCK_BYTES)
    assert heard == [("miss", "cold", 2, 0), stored, stored, ("hit", "hot", 2, 2 * BLOCK_BYTES)]
    heard.clear()
    cache = listen(restart(cold, hot_blocks=1))
    serve(cache, [1, 2, 9])
    serve(cache, [7, 8, 9])
    cache.close()
    assert heard == [
        ("hit", "cold", 1, BLOCK_BYTES),
        ("restore", "cold", 1, BLOCK_BYTES),
        ("miss", "cold", 1, 0),
        ("evict", "hot", 1, BLOCK_BYTES),
        stored,
    ]


def test_what_was_read_from_ssd_is_kept_in_ram(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    cache = restart(cold)
    serve(cache, [1, 2, 3, 4, 5])
    assert cache.stats().hot.promotions == 2
    serve(cache, [1, 2, 3, 4, 5])
    assert (cache.stats().matched_tokens_hot, cache.stats().hot.promotions) == (4, 2)


def test_promotion_prefers_the_trunk_and_respects_the_budget(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3, 4, 5, 6, 7])
    cache = restart(cold, hot_blocks=2)
    request = Request.start(cache, [1, 2, 3, 4, 5, 6, 7])
    assert [block.payload is not None for block in request.table.blocks] == [True, True, False]
    assert cache.stats().hot.hot_bytes == 2 * BLOCK_BYTES
    cache.check()


def test_a_prefix_that_was_not_restored_whole_is_not_promoted_by_mistake(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    serve(cache, [1, 2, 3, 4, 5])
    table = cache.match([1, 2, 3, 4, 5]).table
    with pytest.raises(ValueError, match="shorter"):
        cache.promote(table, PrefixContent([payload_of([1, 2])], {}))


# The rest of its life.


def test_without_an_ssd_tier_there_is_nothing_to_flush() -> None:
    cache = make_cache()
    assert cache.flush(timeout_s=0)
    cache.close()
    cache.close()


def test_flush_says_whether_the_ssd_tier_was_done_in_time(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    assert (cache.flush(), cache.flush(timeout_s=0), cold.num_flushes) == (True, False, 2)


def test_close_waits_for_the_reads_that_run_before_it_closes_the_ssd_tier(cold: FakeColdTier) -> None:
    serve(make_cache(cold), [1, 2, 3])
    [block_hash] = hashes_of([1, 2])
    cold.gates[block_hash], cold.reading[block_hash] = threading.Event(), threading.Event()
    cache = restart(cold)
    pending = cache.match([1, 2, 3])
    assert cold.reading[block_hash].wait(WAIT_S)
    order: list[str] = []
    pending.notify(lambda: order.append("read"))

    def close() -> None:
        cache.close()
        order.append(f"closed {cold.num_closes}")

    thread = threading.Thread(target=close)
    thread.start()
    cold.gates[block_hash].set()
    thread.join(WAIT_S)
    assert order == ["read", "closed 1"]
    assert len(pending.content().rows) == 1


# With the real SSD tier.


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Callable[..., TieredCache]]:
    caches: list[TieredCache] = []

    def open_one(hot_blocks: int | None = None) -> TieredCache:
        ssd = PagedSSDCacheManager(tmp_path, max_size_bytes=1_000_000, namespace=NAMESPACE, description={"model": "x"})
        caches.append(make_cache(ssd, hot_blocks))
        return caches[-1]

    yield open_one
    for cache in caches:
        cache.close()


def test_a_flushed_prefix_survives_a_restart_on_disk(open_cache: Callable[..., TieredCache]) -> None:
    with closing(open_cache()) as cache:
        serve(cache, [1, 2, 3, 4, 5])
        assert cache.flush(WAIT_S)
    cache = open_cache()
    assert serve(cache, [1, 2, 3, 4, 5, 6, 7]) == 4
    assert (cache.stats().matched_tokens_cold, cache.stats().hot.promotions) == (4, 2)
    assert serve(cache, [1, 2, 3, 4, 5, 6, 7]) == 6


def test_a_prefix_is_found_on_ssd_as_soon_as_it_is_stored(open_cache: Callable[..., TieredCache]) -> None:
    cache = open_cache(hot_blocks=0)
    serve(cache, [1, 2, 3, 4, 5])
    assert serve(cache, [1, 2, 3, 4, 5]) == 4


def test_a_damaged_file_is_computed_and_stored_anew(
    open_cache: Callable[..., TieredCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_cache()) as cache:
        serve(cache, [1, 2, 3, 4, 5, 6, 7])
    [path] = tmp_path.rglob(f"{hashes_of([1, 2, 3, 4])[1].hex()}.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with closing(open_cache()) as cache:
        assert serve(cache, [1, 2, 3, 4, 5, 6, 7]) == 2
        assert cache.stats().lost_blocks == 2
        assert "will be computed again" in caplog.text
    assert serve(open_cache(), [1, 2, 3, 4, 5, 6, 7]) == 6


# Rows that are read to their place.


class Places:
    """Memory for blocks of these tests, one after the other; counts what is written by being asked for it."""

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self.memory = bytearray(num_blocks * BLOCK_BYTES)
        self.prepared: list[Place] = []
        self.asked: list[Place] = []
        self.completed: list[Place] = []

    def layout_of(self, place: Place) -> BlockLayout:
        return self.layout

    def prepare(self, place: Place) -> None:
        self.prepared.append(place)

    def segments(self, place: Place, layout: BlockLayout) -> Sequence[memoryview] | None:
        assert place in self.prepared
        if layout != self.layout or not isinstance(place, int):
            return None
        self.asked.append(place)
        start = place * BLOCK_BYTES
        return [memoryview(self.memory)[start : start + 5], memoryview(self.memory)[start + 5 : start + BLOCK_BYTES]]

    def complete(self, place: Place) -> None:
        self.completed.append(place)


def read_to_places(
    cache: TieredCache, prompt: Sequence[int], earlier: PendingRestore | None = None
) -> tuple[PendingRestore, Places]:
    def allocate(unread: Mapping[Place, BlockLayout]) -> Places:
        return Places(next(iter(unread.values())), len(prompt) // BLOCK_SIZE)

    pending = cache.match(prompt, allocate=allocate, earlier=earlier)
    assert isinstance(pending.buffers, Places)
    return pending, pending.buffers


def damage(directory: Path, block_hash: BlockHash, how: str) -> None:
    [path] = directory.rglob(f"{block_hash.hex()}.safetensors")
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-1] ^= 1
    elif how == "short":
        del content[-3:]
    else:
        content[-10:] = bytes(10)
    path.write_bytes(content)


def test_cold_rows_go_to_their_place_and_to_ram_afterwards(open_cache: Callable[..., TieredCache]) -> None:
    prompt = list(range(100, 121))
    with closing(open_cache()) as cache:
        serve(cache, prompt)
    cache = open_cache()
    pending, places = read_to_places(cache, prompt)
    content = finish(cache, pending, len(prompt))
    assert content.rows == [InPlace.IN_PLACE] * 10
    assert sorted(places.completed) == list(range(10))
    assert bytes(places.memory) == b"".join(content_of(prompt[:stop]) for stop in range(2, 21, 2))
    cache.promote(pending.table, content)
    cache.release(pending.table)
    assert cache.flush(WAIT_S)
    stats = cache.stats().hot
    assert (stats.promotions, stats.hot_blocks, stats.blocks_in_use) == (10, 10, 0)
    assert cache.match(prompt).num_hot_blocks == 10


def test_no_more_is_brought_to_ram_than_there_is_room_for(open_cache: Callable[..., TieredCache]) -> None:
    prompt = list(range(100, 121))
    with closing(open_cache()) as cache:
        serve(cache, prompt)
    cache = open_cache(hot_blocks=3)
    pending, _ = read_to_places(cache, prompt)
    cache.promote(pending.table, finish(cache, pending, len(prompt)))
    assert cache.flush(WAIT_S)
    assert [block.payload is not None for block in pending.table.blocks] == [True] * 3 + [False] * 7
    assert cache.stats().cold is not None
    assert cache.stats().cold.blocks_read == 13  # nothing is read that is not kept
    cache.release(pending.table)


@pytest.mark.parametrize("how", ["flipped", "short", "torn"])
def test_a_damaged_block_ends_the_chain_of_rows_read_to_their_place(
    open_cache: Callable[..., TieredCache], tmp_path: Path, how: str
) -> None:
    prompt = list(range(100, 111))
    with closing(open_cache()) as cache:
        serve(cache, prompt)
    damage(tmp_path, hashes_of(prompt)[2], how)
    cache = open_cache()
    pending, places = read_to_places(cache, prompt)
    content = finish(cache, pending, len(prompt))
    assert content.rows == [InPlace.IN_PLACE] * 2
    assert {0, 1} <= set(places.completed) <= {0, 1, 3, 4}  # those behind it may have been read by then
    assert pending.table.num_tokens == 4
    assert bytes(places.memory[: 2 * BLOCK_BYTES]) == content_of(prompt[:2]) + content_of(prompt[:4])
    assert cache.stats().lost_blocks == 3
    cache.release(pending.table)
    assert serve(cache, prompt) == 4


def test_rows_are_not_used_while_blocks_behind_a_lost_one_are_still_read() -> None:
    cold = FakeColdTier()
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    first, second = hashes_of([1, 2, 3, 4])
    cold.unreadable.add(first)
    cold.gates[second] = threading.Event()
    cache = restart(cold)
    pending, places = read_to_places(cache, [1, 2, 3, 4, 5])
    is_used = threading.Event()

    def use() -> None:
        pending.content()
        is_used.set()

    thread = threading.Thread(target=use)
    thread.start()
    assert not is_used.wait(0.05)
    cold.gates[second].set()
    thread.join(WAIT_S)
    assert is_used.is_set()
    assert places.asked == [1]


def test_a_later_match_goes_on_with_what_an_earlier_one_reads() -> None:
    cold = FakeColdTier()
    serve(make_cache(cold), [1, 2, 3, 4, 5])
    gated = hashes_of([1, 2, 3, 4])[1]
    cold.gates[gated], cold.reading[gated] = threading.Event(), threading.Event()
    cache = restart(cold)
    earlier, places = read_to_places(cache, [1, 2, 3, 4, 5, 6, 7])
    assert cold.reading[gated].wait(WAIT_S)
    cold.blocks[hashes_of([1, 2, 3, 4, 5, 6])[2]] = (5, 6), payload_of([1, 2, 3, 4, 5, 6])
    pending, same_places = read_to_places(cache, [1, 2, 3, 4, 5, 6, 7], earlier)
    cache.release(earlier.table)
    cold.gates[gated].set()
    assert same_places is places
    assert finish(cache, pending, 7).rows == [InPlace.IN_PLACE] * 3
    assert sorted(places.asked) == [0, 1, 2]
    assert pending.num_hot_blocks == 0
    cache.release(pending.table)


def test_a_later_match_reads_anew_what_an_earlier_one_has_lost(
    open_cache: Callable[..., TieredCache], tmp_path: Path
) -> None:
    with closing(open_cache()) as cache:
        serve(cache, [1, 2, 3, 4, 5])
    damage(tmp_path, hashes_of([1, 2, 3, 4])[1], "flipped")
    cache = open_cache()
    earlier, places = read_to_places(cache, [1, 2, 3, 4, 5])
    earlier.content()
    pending, other_places = read_to_places(cache, [1, 2, 3, 4, 5], earlier)
    cache.release(earlier.table)
    assert other_places is not places
    assert finish(cache, pending, 5).rows == [InPlace.IN_PLACE]
    cache.release(pending.table)


def test_what_has_not_begun_to_be_read_is_not_read_once_it_is_cancelled() -> None:
    cold = FakeColdTier()
    prompt = list(range(1, 22))
    serve(make_cache(cold), prompt)
    hashes = hashes_of(prompt)
    for block_hash in hashes:
        cold.gates[block_hash], cold.reading[block_hash] = threading.Event(), threading.Event()
    cache = restart(cold)
    pending, places = read_to_places(cache, prompt)
    assert all(cold.reading[block_hash].wait(WAIT_S) for block_hash in hashes[:4])
    pending.cancel()
    cache.release(pending.table)
    for block_hash in hashes:
        cold.gates[block_hash].set()
    cache.close()
    assert sorted(places.asked) == [0, 1, 2, 3]
    cache.check()


def test_pending_reads_are_given_in_the_order_of_the_prefix(open_cache: Callable[..., TieredCache]) -> None:
    prompt = list(range(100, 121))
    with closing(open_cache()) as cache:
        serve(cache, prompt)
    pending: PendingRestore = open_cache().match(prompt)
    contents = [bytes(payload.tensors["kv"].data) for payload in pending.content().rows]
    assert contents == [content_of(prompt[:stop]) for stop in range(2, 21, 2)]


def test_listeners_hear_of_blocks_written_evicted_and_found_corrupt(tmp_path: Path) -> None:
    heard: list[CacheEvent] = []
    events = EventBus(NAMESPACE)
    events.subscribe(heard.append)
    file_bytes: list[int] = []

    def open_ssd(max_size_bytes: int = 1_000_000) -> PagedSSDCacheManager:
        return PagedSSDCacheManager(
            tmp_path, max_size_bytes=max_size_bytes, namespace=NAMESPACE, description={}, events=events
        )

    with closing(open_ssd()) as ssd:
        for token in (1, 2):
            [block_hash] = hashes_of([token, token])
            ssd.save_block(block_hash, None, [token, token], payload_of([token, token]))
        assert ssd.flush(WAIT_S)
        file_bytes += [entry.size_bytes for entry in ssd.entries()]
        block_path(tmp_path, NAMESPACE, block_hash).write_bytes(b"damaged")
        assert ssd.load_block(block_hash, [2, 2]) is None
    with closing(open_ssd(max_size_bytes=file_bytes[0])) as ssd:
        [block_hash] = hashes_of([3, 3])
        ssd.save_block(block_hash, None, [3, 3], payload_of([3, 3]))
        assert ssd.flush(WAIT_S)
    events.close()
    told = [(event.kind, event.tier, event.num_blocks, event.size_bytes) for event in heard]
    spilled = ("spill", "cold", 1, file_bytes[0])
    assert told == [spilled, spilled, ("corrupt", "cold", 1, 0), ("evict", "cold", 1, file_bytes[0]), spilled]


# Parts.


def windows_of(num_blocks: int) -> list[PartKey]:
    return [PartKey(num_blocks - 1, WINDOW)] if num_blocks else []


def store_with_windows(cache: TieredCache, request: Request) -> None:
    def capture(start: int, stop: int, has_rows: bool) -> CapturedBlock:
        rows = None if has_rows else payload_of(request.prompt[:stop])
        return CapturedBlock(rows, payload_of([99, *request.prompt[:stop]]))

    cache.store(request.table, capture)


def test_a_prefix_is_cut_to_where_its_parts_are(cold: FakeColdTier) -> None:
    for cache in (make_cache(), make_cache(cold)):
        request = Request.start(cache, [1, 2, 3, 4, 5, 6, 7])
        request.compute(4)
        store_with_windows(cache, request)
        request.compute()
        request.store()  # the third block without its window
        cache.release(request.table)
        pending = cache.match([1, 2, 3, 4, 5, 6, 7], needs=windows_of)
        content = finish(cache, pending, 7)
        assert (pending.num_matched_blocks, pending.table.num_tokens) == (3, 4)
        assert [bytes(payload.tensors["kv"].data) for payload in content.parts.values()] == [
            content_of([99, 1, 2, 3, 4])
        ]
        cache.release(pending.table)
        assert cache.stats().hot.blocks_in_use == 0
        cache.check()


def test_a_lost_part_asks_for_another_match(cold: FakeColdTier) -> None:
    cache = make_cache(cold)
    request = Request.start(cache, [1, 2, 3, 4, 5])
    request.compute()
    store_with_windows(cache, request)
    cache.release(request.table)
    cold.unreadable.add(hash_part(hashes_of([1, 2, 3, 4])[1], WINDOW))
    cache = restart(cold)
    pending = cache.match([1, 2, 3, 4, 5], needs=windows_of)
    assert cache.finish_restore(pending, 5) is None
    cache.release(pending.table)
    pending = cache.match([1, 2, 3, 4, 5], needs=windows_of)
    assert finish(cache, pending, 5).rows
    assert pending.table.num_tokens == 2
    cache.release(pending.table)
    assert cache.stats().lost_blocks == 1


def test_parts_that_a_full_queue_refused_are_written_later(cold: FakeColdTier) -> None:
    cold.queue_length = 1
    cache = make_cache(cold)
    request = Request.start(cache, [1, 2, 3, 4, 5])
    request.compute()
    store_with_windows(cache, request)
    cache.release(request.table)
    assert len(cold.saved) == 1
    assert cache.stats().hot.blocks_in_use == 4
    while cold.queued:
        cold.write_one()
        cache.retry_unsaved()
    blocks = hashes_of([1, 2, 3, 4])
    assert sorted(cold.saved) == sorted([*blocks, *(hash_part(block_hash, WINDOW) for block_hash in blocks)])
    assert cache.stats().hot.blocks_in_use == 0


@pytest.mark.parametrize("queue_length", [None, 1])
def test_the_ssd_tier_is_told_which_part_it_gets(cold: FakeColdTier, queue_length: int | None) -> None:
    cold.queue_length = queue_length
    cache = make_cache(cold)
    request = Request.start(cache, [1, 2, 3])
    request.compute()
    store_with_windows(cache, request)
    cache.store_part(request.table, PartKey(0, CHECKPOINT), payload_of([98, 1, 2]))
    cache.release(request.table)
    while cold.queued:
        cold.write_one()
        cache.retry_unsaved()
    [block_hash] = hashes_of([1, 2])
    parts = {hash_part(block_hash, part): part for part in (WINDOW, CHECKPOINT)}
    assert cold.kinds == {block_hash: ROWS, **parts}


def test_what_is_on_ssd_already_is_not_looked_up_again_for_each_block(cold: FakeColdTier) -> None:
    lookups = 0
    has_block = cold.has_block

    def count(block_hash: BlockHash) -> bool:
        nonlocal lookups
        lookups += 1
        return has_block(block_hash)

    cold.has_block = count  # type: ignore[method-assign]
    cache = make_cache(cold)
    request = Request.start(cache, list(range(101)))
    request.compute()
    store_with_windows(cache, request)
    cache.release(request.table)
    assert len(cold.saved) == 100
    assert lookups <= 4 * 100
