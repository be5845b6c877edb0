from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.block_pool import BlockPool, CacheBlock, FreeKVCacheBlockQueue
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW, Part
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.errors import BlockPoolExhaustedError, CacheInvariantError


def payload_of(size_bytes: int) -> BlockPayload:
    return BlockPayload({"kv": BlockTensor("U8", (size_bytes,), memoryview(bytes(size_bytes)))})


def name_of(letter: str) -> BlockHash:
    return BlockHash(letter.encode() * 32)


def cache(pool: BlockPool, letter: str, size_bytes: int = 8, part: Part = ROWS) -> CacheBlock:
    """A block that is published, in RAM, and held by nobody."""
    block = hold(pool, letter, size_bytes, part)
    pool.release(block)
    return block


def hold(pool: BlockPool, letter: str, size_bytes: int = 8, part: Part = ROWS) -> CacheBlock:
    block = pool.allocate()
    pool.register(block, name_of(letter), part)
    pool.attach(block, payload_of(size_bytes))
    return block


def cached_letters(pool: BlockPool) -> str:
    """What may be evicted, least recently used first."""
    return "".join(block.block_hash[:1].decode() for block in pool.eviction_order() if block.block_hash)


def evict_all(pool: BlockPool) -> str:
    """Evict one after the other; in which order."""
    letters = ""
    before = cached_letters(pool)
    while pool.evict_least_recently_used():
        pool.check()
        after = cached_letters(pool)
        [gone] = set(before) - set(after)
        letters, before = letters + gone, after
    return letters


# The free queue.


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "remove"]), st.integers(0, 4)), max_size=40))
def test_queue_behaves_as_a_list(steps: list[tuple[str, int]]) -> None:
    queue = FreeKVCacheBlockQueue()
    model: list[CacheBlock] = []
    blocks = [CacheBlock(i) for i in range(5)]
    for action, i in steps:
        block = blocks[i]
        if (action == "append") == (block in model):
            with pytest.raises(CacheInvariantError, match=f"block {i} is"):
                getattr(queue, action)(block)
        else:
            getattr(queue, action)(block)
            getattr(model, action)(block)
        assert list(queue) == model
        assert queue.front is (model[0] if model else None)
        assert len(queue) == len(model)


# Growth and exhaustion.


def test_pool_doubles_when_it_runs_out_of_empty_blocks() -> None:
    pool = BlockPool(initial_blocks=2)
    sizes = []
    for _ in range(9):
        pool.allocate()
        sizes.append(pool.num_blocks)
    assert sizes == [2, 2, 4, 4, 8, 8, 8, 8, 16]
    assert (pool.num_in_use, pool.num_empty, pool.num_cached) == (9, 7, 0)
    pool.check()


def test_pool_grows_before_it_evicts() -> None:
    pool = BlockPool(initial_blocks=1)
    block = cache(pool, "a")
    pool.allocate()
    assert pool.get(name_of("a")) is block
    assert (pool.num_blocks, pool.num_evictions) == (2, 0)


def test_growth_stops_at_max_blocks_and_eviction_begins() -> None:
    pool = BlockPool(initial_blocks=2, max_blocks=3)
    for letter in "abc":
        cache(pool, letter)
    assert (pool.num_blocks, pool.num_empty) == (3, 0)
    pool.allocate()
    assert cached_letters(pool) == "bc"
    assert (pool.num_blocks, pool.num_evictions) == (3, 1)
    pool.check()


def test_fewer_blocks_may_be_allowed_than_are_made_at_once() -> None:
    assert BlockPool(initial_blocks=256, max_blocks=4).num_blocks == 4


def test_exhaustion_is_a_named_error_that_changes_nothing() -> None:
    pool = BlockPool(initial_blocks=1, max_blocks=2)
    held = [pool.allocate(), pool.allocate()]
    with pytest.raises(BlockPoolExhaustedError, match="all 2 cache blocks are in use: allow more"):
        pool.allocate()
    pool.check()
    assert (pool.num_in_use, pool.num_blocks) == (2, 2)
    pool.release(held[0])
    assert pool.allocate().ref_count == 1


# References.


def test_a_released_block_stays_cached_until_the_last_holder_lets_go() -> None:
    pool = BlockPool(initial_blocks=2)
    block = hold(pool, "a")
    pool.acquire(block)
    pool.release(block)
    assert (block.ref_count, pool.num_cached) == (1, 0)
    pool.release(block)
    assert (block.ref_count, pool.num_cached, pool.num_in_use) == (0, 1, 0)
    assert pool.get(name_of("a")) is block


@pytest.mark.parametrize("is_registered", [False, True])
def test_a_block_that_cannot_serve_from_ram_is_emptied_on_release(is_registered: bool) -> None:
    pool = BlockPool(initial_blocks=1)
    block = pool.allocate()
    block.num_tokens = 3
    if is_registered:
        pool.register(block, name_of("a"))
    pool.release(block)
    assert pool.get(name_of("a")) is None
    assert (block.block_hash, block.num_tokens, pool.num_empty, pool.num_evictions) == (None, 0, 1, 0)
    pool.check()


def test_releasing_once_too_often_is_an_invariant_error() -> None:
    pool = BlockPool(initial_blocks=1)
    cached = cache(pool, "a")
    with pytest.raises(CacheInvariantError, match="block 0 is released once too often"):
        pool.release(cached)
    assert cached.ref_count == 0
    pool.check()


def test_an_empty_block_cannot_be_acquired() -> None:
    pool = BlockPool(initial_blocks=1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(CacheInvariantError, match="not in the free queue"):
        pool.acquire(block)
    pool.check()


# Identity and content.


def test_a_hash_names_one_block_and_a_block_has_one_hash() -> None:
    pool = BlockPool(initial_blocks=3)
    first, second = hold(pool, "a"), pool.allocate()
    with pytest.raises(CacheInvariantError, match="can't be registered"):
        pool.register(second, name_of("a"))
    with pytest.raises(CacheInvariantError, match="can't be registered"):
        pool.register(first, name_of("b"))
    assert (pool.get(name_of("a")), pool.get(name_of("b")), second.block_hash) == (first, None, None)
    pool.check()


def test_a_block_that_nobody_holds_cannot_be_registered() -> None:
    pool = BlockPool(initial_blocks=1)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(CacheInvariantError, match="can't be registered"):
        pool.register(block, name_of("a"))
    pool.check()


def test_a_payload_is_never_replaced() -> None:
    pool = BlockPool(initial_blocks=1)
    block = hold(pool, "a", size_bytes=8)
    with pytest.raises(CacheInvariantError, match="has a payload already"):
        pool.attach(block, payload_of(4))
    assert pool.hot_bytes == 8
    pool.check()


def test_payload_bytes_are_counted_held_and_evictable_apart() -> None:
    pool = BlockPool(initial_blocks=4)
    held = hold(pool, "a", size_bytes=8)
    cached = cache(pool, "b", size_bytes=4)
    assert (pool.hot_bytes, pool.held_bytes, pool.num_hot) == (12, 8, 2)
    pool.acquire(cached)
    assert (pool.hot_bytes, pool.held_bytes) == (12, 12)
    pool.release(held)
    assert (pool.hot_bytes, pool.held_bytes) == (12, 4)
    pool.evict_least_recently_used()
    assert (pool.hot_bytes, pool.held_bytes, pool.num_hot) == (4, 4, 1)
    pool.check()


def test_checkpoints_are_counted_by_themselves_too() -> None:
    pool = BlockPool(initial_blocks=4)
    hold(pool, "a", size_bytes=1)
    hold(pool, "b", size_bytes=2, part=WINDOW)
    held = hold(pool, "c", size_bytes=4, part=CHECKPOINT)
    cached = cache(pool, "d", size_bytes=8, part=CHECKPOINT)
    assert (pool.hot_bytes, pool.held_bytes) == (15, 7)
    assert (pool.checkpoint_bytes, pool.held_checkpoint_bytes) == (12, 4)
    pool.acquire(cached)
    assert (pool.checkpoint_bytes, pool.held_checkpoint_bytes) == (12, 12)
    pool.release(held)
    assert (pool.checkpoint_bytes, pool.held_checkpoint_bytes) == (12, 8)
    pool.evict_checkpoint()
    assert (pool.hot_bytes, pool.checkpoint_bytes, pool.held_checkpoint_bytes) == (11, 8, 8)
    pool.check()


def test_a_record_that_held_a_checkpoint_serves_for_rows_again() -> None:
    pool = BlockPool(initial_blocks=1, max_blocks=1)
    cache(pool, "a", part=CHECKPOINT)
    block = cache(pool, "b")
    assert (block.part, pool.checkpoint_bytes, pool.hot_bytes) == (ROWS, 0, 8)
    assert not pool.evict_checkpoint()
    pool.check()


def test_a_payload_comes_after_the_hash_that_says_what_it_is() -> None:
    pool = BlockPool(initial_blocks=1)
    block = pool.allocate()
    with pytest.raises(CacheInvariantError, match="before its hash"):
        pool.attach(block, payload_of(1))
    assert pool.hot_bytes == 0
    pool.check()


# Eviction.


def test_evicts_the_least_recently_released_first() -> None:
    pool = BlockPool(initial_blocks=4)
    blocks = [hold(pool, letter) for letter in "abc"]
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert cached_letters(pool) == "bac"
    assert [pool.evict_least_recently_used() for _ in range(4)] == [True, True, True, False]
    assert (pool.num_evictions, pool.num_empty, pool.hot_bytes) == (3, 4, 0)
    pool.check()


def test_rows_and_checkpoints_leave_in_one_order() -> None:
    pool = BlockPool(initial_blocks=8)
    for letter in "aBcDEf":
        cache(pool, letter, part=CHECKPOINT if letter.isupper() else ROWS)
    block = pool.get(name_of("B"))
    assert block is not None
    pool.acquire(block)
    pool.release(block)
    assert cached_letters(pool) == "acDEfB"
    assert evict_all(pool) == "acDEfB"


def test_checkpoints_can_be_evicted_by_themselves_the_least_recently_used_first() -> None:
    pool = BlockPool(initial_blocks=8)
    for letter in "aBcDEf":
        cache(pool, letter, part=CHECKPOINT if letter.isupper() else ROWS)
    left = []
    while pool.evict_checkpoint():
        left.append(cached_letters(pool))
        pool.check()
    assert left == ["acDEf", "acEf", "acf"]
    assert pool.num_evictions == 3


def test_a_held_checkpoint_is_never_evicted() -> None:
    pool = BlockPool(initial_blocks=2)
    block = hold(pool, "a", part=CHECKPOINT)
    assert not pool.evict_checkpoint()
    assert pool.get(name_of("a")) is block


def test_a_block_used_again_moves_to_the_back() -> None:
    pool = BlockPool(initial_blocks=4)
    first, *_ = (cache(pool, letter) for letter in "abc")
    pool.acquire(first)
    assert cached_letters(pool) == "bc"
    pool.release(first)
    assert cached_letters(pool) == "bca"


def test_a_held_block_is_never_evicted() -> None:
    pool = BlockPool(initial_blocks=2)
    block = hold(pool, "a")
    assert not pool.evict_least_recently_used()
    assert pool.get(name_of("a")) is block


def test_an_evicted_block_is_empty_and_its_hash_unknown() -> None:
    pool = BlockPool(initial_blocks=1, max_blocks=1)
    block = cache(pool, "a")
    again = pool.allocate()
    assert again is block
    assert (again.block_hash, again.payload, again.num_tokens, again.ref_count) == (None, None, 0, 1)
    assert pool.get(name_of("a")) is None


# The judge itself.


def _hold_a_cached_block(pool: BlockPool) -> None:
    next(pool.eviction_order()).ref_count = 1


def _forget_a_payload(pool: BlockPool) -> None:
    next(pool.eviction_order()).payload = None


def _lose_an_index_entry(pool: BlockPool) -> None:
    pool._index.clear()


def _empty_a_cached_block(pool: BlockPool) -> None:
    pool._empty.append(next(pool.eviction_order()))


def _fill_an_empty_block(pool: BlockPool) -> None:
    pool._empty[0].payload = payload_of(1)


def _cut_the_queue(pool: BlockPool) -> None:
    queue = pool._others.cached
    queue._front.next_free = queue._back


def _put_rows_among_the_checkpoints(pool: BlockPool) -> None:
    block = next(pool.eviction_order())
    pool._others.cached.remove(block)
    pool._checkpoints.cached.append(block)


def _set_the_clock_back(pool: BlockPool) -> None:
    [*_, last] = pool._others.cached
    last.released_at = 0


def _lose_a_block(pool: BlockPool) -> None:
    pool._empty.pop()


def _miscount_hot_bytes(pool: BlockPool) -> None:
    pool._others.hot_bytes += 1


def _miscount_checkpoint_bytes(pool: BlockPool) -> None:
    pool._checkpoints.hot_bytes -= 1


def _mistake_a_checkpoint_for_rows(pool: BlockPool) -> None:
    next(iter(pool._checkpoints.cached)).part = ROWS


def _miscount_evictable_bytes(pool: BlockPool) -> None:
    pool._others.evictable_bytes -= 1


def _miscount_evictable_checkpoint_bytes(pool: BlockPool) -> None:
    pool._checkpoints.evictable_bytes += 1


def _miscount_hot_blocks(pool: BlockPool) -> None:
    pool._num_hot += 1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_hold_a_cached_block, "a cached block is held"),
        (_forget_a_payload, "a cached block can't serve"),
        (_lose_an_index_entry, "index"),
        (_empty_a_cached_block, "a block is in two places"),
        (_fill_an_empty_block, "an empty block carries something"),
        (_cut_the_queue, "free queue length"),
        (_lose_a_block, "blocks in use"),
        (_put_rows_among_the_checkpoints, "queue of checkpoints"),
        (_mistake_a_checkpoint_for_rows, "queue of checkpoints"),
        (_set_the_clock_back, "eviction order"),
        (_miscount_hot_bytes, "hot bytes of others"),
        (_miscount_checkpoint_bytes, "hot bytes of checkpoints"),
        (_miscount_evictable_bytes, "evictable bytes of others"),
        (_miscount_evictable_checkpoint_bytes, "evictable bytes of checkpoints"),
        (_miscount_hot_blocks, "hot blocks"),
    ],
)
def test_check_names_what_is_broken(damage: Callable[[BlockPool], None], named: str) -> None:
    pool = BlockPool(initial_blocks=8)
    cache(pool, "a")
    hold(pool, "b")
    cache(pool, "c", part=CHECKPOINT)
    cache(pool, "d")
    pool.check()
    damage(pool)
    with pytest.raises(CacheInvariantError, match=named):
        pool.check()
