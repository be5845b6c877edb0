from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import pytest

from omlx_core.cache.block_hash import BlockHash, hash_namespace, iter_block_hashes
from omlx_core.cache.block_pool import BlockPool, CacheBlock
from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.parts import CHECKPOINT, WINDOW, PartKey, hash_part
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.errors import BlockPoolExhaustedError, CacheInvariantError

NAMESPACE = hash_namespace({"model": "tiny"})
BLOCK_SIZE = 2
BLOCK_BYTES = 8
JOIN_S = 30.0


class FakeColdIndex:
    """Says which blocks the SSD tier has; `on_lookup` runs in the middle of each question."""

    def __init__(self, present: Sequence[BlockHash] = ()) -> None:
        self.present = set(present)
        self.lookups: list[BlockHash] = []
        self.on_lookup: Callable[[BlockHash], None] = lambda block_hash: None

    def has_block(self, block_hash: BlockHash) -> bool:
        self.lookups.append(block_hash)
        self.on_lookup(block_hash)
        return block_hash in self.present


def payload_of(size_bytes: int = BLOCK_BYTES) -> BlockPayload:
    return BlockPayload({"kv": BlockTensor("U8", (size_bytes,), memoryview(bytes(size_bytes)))})


def hashes_of(token_ids: Sequence[int], extra_keys: Sequence[str] = ()) -> list[BlockHash]:
    return list(iter_block_hashes(NAMESPACE, token_ids, BLOCK_SIZE, extra_keys))


def make_manager(
    *,
    hot_blocks: int | None = None,
    initial_blocks: int = 4,
    max_blocks: int | None = None,
    checkpoint_share: float = 0.5,
    cold: FakeColdIndex | None = None,
) -> PagedCacheManager:
    return PagedCacheManager(
        NAMESPACE,
        block_size=BLOCK_SIZE,
        initial_blocks=initial_blocks,
        hot_max_bytes=None if hot_blocks is None else hot_blocks * BLOCK_BYTES,
        max_blocks=max_blocks,
        checkpoint_share=checkpoint_share,
        cold=cold,
    )


def commit_all(manager: PagedCacheManager, table: BlockTable, *, in_cold_tier: bool = False) -> int:
    """Publish what has filled, as far as there is room; how many blocks that were."""
    published = 0
    while full := manager.next_full_block(table):
        if not manager.commit_block(table, full, payload_of(), in_cold_tier=in_cold_tier):
            break
        published += 1
    return published


def hold(manager: PagedCacheManager, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> BlockTable:
    """Run a request up to its end, but don't let go of its blocks."""
    table = manager.get_computed_blocks(token_ids, extra_keys)
    manager.append_tokens(table, token_ids[table.num_tokens :])
    commit_all(manager, table)
    return table


def store(manager: PagedCacheManager, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> None:
    manager.free_block_table(hold(manager, token_ids, extra_keys))


def num_cached_tokens(manager: PagedCacheManager, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> int:
    table = manager.get_computed_blocks(token_ids, extra_keys)
    num_tokens = table.num_tokens
    manager.free_block_table(table)
    return num_tokens


def eviction_order(manager: PagedCacheManager) -> list[BlockHash | None]:
    return [block.block_hash for block in manager._pool.eviction_order()]


def in_thread(action: Callable[[], None]) -> None:
    """Run an action on another thread to its end; fails if that needs a lock that the caller holds."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(JOIN_S)
    assert not thread.is_alive()


# Look-up.


def test_finds_the_longest_prefix_of_full_blocks() -> None:
    manager = make_manager()
    store(manager, [1, 2, 3, 4, 5])
    table = manager.get_computed_blocks([1, 2, 3, 4, 5, 6])
    assert table.token_ids == [1, 2, 3, 4]
    assert [block.block_hash for block in table.blocks] == hashes_of([1, 2, 3, 4])
    assert [block.num_tokens for block in table.blocks] == [2, 2]
    assert table.num_committed == 2


def test_a_block_is_not_found_after_another_prefix() -> None:
    manager = make_manager()
    store(manager, [1, 1, 7, 8])
    assert num_cached_tokens(manager, [2, 2, 7, 8]) == 0
    assert num_cached_tokens(manager, [7, 8]) == 0
    assert num_cached_tokens(manager, [1, 1, 7, 8]) == 4


def test_other_extra_keys_share_nothing() -> None:
    manager = make_manager()
    store(manager, [1, 2, 3, 4], extra_keys=("salt:a",))
    assert num_cached_tokens(manager, [1, 2, 3, 4]) == 0
    assert num_cached_tokens(manager, [1, 2, 3, 4], ("salt:b",)) == 0
    assert num_cached_tokens(manager, [1, 2, 3, 4], ("salt:a",)) == 4


@pytest.mark.parametrize(("max_tokens", "num_found"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (9, 4), (None, 4)])
def test_reuses_no_more_tokens_than_allowed(max_tokens: int | None, num_found: int) -> None:
    manager = make_manager()
    store(manager, [1, 2, 3, 4])
    assert manager.get_computed_blocks([1, 2, 3, 4], max_tokens=max_tokens).num_tokens == num_found


def test_a_prompt_of_no_tokens_finds_nothing() -> None:
    manager = make_manager()
    table = manager.get_computed_blocks([], max_tokens=-1)
    assert (table.blocks, table.token_ids, manager.next_full_block(table)) == ([], [], None)


def test_unpublished_blocks_are_not_found() -> None:
    manager = make_manager()
    table = manager.get_computed_blocks([1, 2, 3, 4])
    manager.append_tokens(table, [1, 2, 3, 4])
    assert num_cached_tokens(manager, [1, 2, 3, 4]) == 0
    manager.free_block_table(table)
    assert num_cached_tokens(manager, [1, 2, 3, 4]) == 0
    assert manager.stats().blocks_cached == 0


# Sharing.


def test_eight_requests_with_32_common_blocks_hold_32_and_8() -> None:
    manager = make_manager()
    prefix = list(range(64))
    store(manager, prefix)
    tables = [hold(manager, [*prefix, 100 + i, 200 + i]) for i in range(8)]
    assert manager.stats().blocks_in_use == 32 + 8
    assert [block.ref_count for block in tables[0].blocks] == [8] * 32 + [1]
    for table in tables:
        manager.free_block_table(table)
    stats = manager.stats()
    assert (stats.blocks_in_use, stats.blocks_cached, stats.hot_bytes) == (0, 40, 40 * BLOCK_BYTES)
    manager.check()


def test_eight_requests_that_start_together_end_up_with_32_and_8_as_well() -> None:
    manager = make_manager()
    prefix = list(range(64))
    tables = [manager.get_computed_blocks([*prefix, 100 + i, 200 + i]) for i in range(8)]
    for i, table in enumerate(tables):
        manager.append_tokens(table, [*prefix, 100 + i, 200 + i])
    assert manager.stats().blocks_in_use == 8 * 33
    for table in tables:
        commit_all(manager, table)
    stats = manager.stats()
    assert (stats.blocks_in_use, stats.hot_blocks) == (32 + 8, 32 + 8)
    manager.check()


def test_a_block_that_two_sequences_computed_is_shared_without_its_content_being_copied() -> None:
    manager = make_manager()
    first = hold(manager, [1, 2])
    second = BlockTable()
    manager.append_tokens(second, [1, 2])
    full = manager.next_full_block(second)
    assert full is not None
    assert manager.share_block(second, full)
    assert second.blocks == first.blocks
    assert (first.blocks[0].ref_count, second.num_committed, manager.next_full_block(second)) == (2, 1, None)
    assert manager.stats().blocks_in_use == 1
    manager.check()


def test_a_block_that_nobody_has_in_ram_is_not_shared() -> None:
    manager = make_manager(hot_blocks=0, cold=FakeColdIndex())
    table, other = BlockTable(), BlockTable()
    for each in (table, other):
        manager.append_tokens(each, [1, 2])
    full = manager.next_full_block(table)
    assert full is not None
    assert not manager.share_block(table, full)
    assert manager.commit_block(table, full, payload_of(), in_cold_tier=True)
    assert not manager.share_block(other, full)
    assert other.num_committed == 0
    manager.check()


def test_blocks_are_published_in_order_and_once() -> None:
    manager = make_manager()
    table = BlockTable()
    manager.append_tokens(table, [1, 2, 3, 4, 5])
    first = manager.next_full_block(table)
    assert first is not None
    assert (first.position, first.parent_hash, first.token_ids) == (0, None, (1, 2))
    assert manager.commit_block(table, first, payload_of())
    second = manager.next_full_block(table)
    assert second is not None
    assert (second.position, second.parent_hash, second.token_ids) == (1, first.block_hash, (3, 4))
    with pytest.raises(CacheInvariantError, match="block 0 can't be published: it is the turn of block 1"):
        manager.commit_block(table, first, payload_of())
    with pytest.raises(CacheInvariantError, match="block 0 can't be published"):
        manager.share_block(table, first)
    assert manager.commit_block(table, second, payload_of())
    assert manager.next_full_block(table) is None
    assert [block.block_hash for block in table.blocks] == [*hashes_of([1, 2, 3, 4]), None]
    manager.check()


def test_a_block_is_not_published_before_its_parent() -> None:
    manager = make_manager()
    table = BlockTable(num_committed=1)
    manager.append_tokens(table, [1, 2, 3, 4])
    with pytest.raises(CacheInvariantError, match="block 1 is to be published before its parent"):
        manager.next_full_block(table)


# Forks and copy-on-write.


def test_a_fork_shares_everything_and_copies_only_the_partial_block_when_it_writes() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3, 4, 5])
    fork = manager.fork_block_table(table)
    assert fork.blocks == table.blocks
    assert [block.ref_count for block in table.blocks] == [2, 2, 2]
    assert manager.stats().blocks_in_use == 3

    manager.append_tokens(fork, [6])
    assert [block.ref_count for block in table.blocks] == [2, 2, 1]
    assert fork.blocks[:2] == table.blocks[:2]
    assert fork.blocks[2] is not table.blocks[2]
    assert (fork.blocks[2].ref_count, fork.blocks[2].num_tokens, table.blocks[2].num_tokens) == (1, 2, 1)
    assert (fork.token_ids, table.token_ids) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5])

    manager.append_tokens(table, [7])
    assert (table.blocks[2].ref_count, table.blocks[2].num_tokens) == (1, 2)
    assert (manager.stats().cow_copies, manager.stats().blocks_in_use) == (1, 4)
    manager.check()


def test_the_original_copies_too_if_it_writes_first() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3])
    fork = manager.fork_block_table(table)
    shared = table.blocks[1]
    manager.append_tokens(table, [4, 5])
    assert fork.blocks[1] is shared
    assert (shared.ref_count, shared.num_tokens) == (1, 1)
    assert table.blocks[1] is not shared
    assert manager.stats().cow_copies == 1


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3, 4])
    fork = manager.fork_block_table(table)
    manager.append_tokens(fork, [5])
    manager.append_tokens(table, [6])
    assert (manager.stats().cow_copies, manager.stats().blocks_in_use) == (0, 4)
    assert fork.blocks[:2] == table.blocks[:2]


def test_a_fork_keeps_the_salt_and_what_is_published() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3], extra_keys=("salt:a",))
    fork = manager.fork_block_table(table)
    assert (fork.extra_keys, fork.num_committed) == (("salt:a",), 1)
    manager.append_tokens(fork, [4])
    commit_all(manager, fork)
    assert fork.blocks[1].block_hash == hashes_of([1, 2, 3, 4], ("salt:a",))[1]


def test_a_full_block_that_forks_share_is_published_by_whichever_comes_first() -> None:
    manager = make_manager()
    table = BlockTable()
    manager.append_tokens(table, [1, 2, 3, 4])
    fork = manager.fork_block_table(table)
    commit_all(manager, table)
    assert [block.block_hash for block in fork.blocks] == [None, None]
    full = manager.next_full_block(fork)
    assert full is not None
    assert manager.share_block(fork, full)
    assert commit_all(manager, fork) == 1
    assert fork.blocks == table.blocks
    assert [block.ref_count for block in table.blocks] == [2, 2]
    stats = manager.stats()
    assert (stats.hot_blocks, stats.blocks_in_use, stats.cow_copies) == (2, 2, 2)
    manager.check()


def test_a_full_block_that_forks_share_is_not_published_if_the_pool_has_no_block_for_a_copy() -> None:
    manager = make_manager(initial_blocks=1, max_blocks=1)
    table = BlockTable()
    manager.append_tokens(table, [1, 2])
    fork = manager.fork_block_table(table)
    assert commit_all(manager, table) == 0
    assert (table.num_committed, fork.blocks) == (0, table.blocks)
    manager.free_block_table(fork)
    assert commit_all(manager, table) == 1
    assert manager.stats().cow_copies == 0
    manager.check()


def test_freeing_one_fork_leaves_the_other_whole() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3])
    fork = manager.fork_block_table(table)
    manager.free_block_table(table)
    assert [block.ref_count for block in fork.blocks] == [1, 1]
    manager.append_tokens(fork, [4])
    assert (manager.stats().cow_copies, manager.stats().blocks_in_use) == (0, 2)
    manager.free_block_table(fork)
    assert manager.stats().blocks_in_use == 0
    manager.check()


# Letting go.


def test_freeing_twice_is_harmless() -> None:
    manager = make_manager()
    table, other = hold(manager, [1, 2, 3]), hold(manager, [1, 2, 4])
    manager.free_block_table(table)
    manager.free_block_table(table)
    assert other.blocks[0].ref_count == 1
    assert (table.num_tokens, table.blocks, table.num_committed) == (0, [], 0)
    manager.check()


def test_truncating_keeps_the_first_blocks_and_frees_the_rest() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3, 4, 5, 6, 7])
    manager.truncate(table, 1)
    assert (table.token_ids, table.num_committed, len(table.blocks)) == ([1, 2], 1, 1)
    stats = manager.stats()
    assert (stats.blocks_in_use, stats.blocks_cached) == (1, 2)
    assert eviction_order(manager) == hashes_of([1, 2, 3, 4, 5, 6])[:0:-1]
    manager.append_tokens(table, [8, 9])
    assert commit_all(manager, table) == 1
    assert table.blocks[1].block_hash == hashes_of([1, 2, 8, 9])[1]
    manager.check()


def test_truncating_beyond_the_end_changes_nothing() -> None:
    manager = make_manager()
    table = hold(manager, [1, 2, 3])
    manager.truncate(table, 2)
    assert (table.token_ids, table.num_committed, len(table.blocks)) == ([1, 2, 3], 1, 2)


# Eviction.


def test_evicts_leaves_before_their_parents() -> None:
    manager = make_manager(hot_blocks=3)
    store(manager, [1, 2, 3, 4, 5, 6])
    first, second, third = hashes_of([1, 2, 3, 4, 5, 6])
    assert eviction_order(manager) == [third, second, first]
    store(manager, [9, 9])
    assert eviction_order(manager) == [second, first, *hashes_of([9, 9])]
    assert num_cached_tokens(manager, [1, 2, 3, 4, 5, 6]) == 4


def test_evicts_leaves_before_a_trunk_that_several_sequences_share() -> None:
    manager = make_manager()
    one, two = hold(manager, [1, 2, 3, 4]), hold(manager, [1, 2, 5, 6])
    manager.free_block_table(one)
    manager.free_block_table(two)
    trunk, leaf_of_one = hashes_of([1, 2, 3, 4])
    _, leaf_of_two = hashes_of([1, 2, 5, 6])
    assert eviction_order(manager) == [leaf_of_one, leaf_of_two, trunk]


def test_evicts_leaves_before_a_trunk_that_one_of_two_forks_let_go() -> None:
    # The trunk is in RAM already when two forks have computed it once more; only one of them publishes.
    manager = make_manager()
    store(manager, [1, 2])
    table = BlockTable()
    manager.append_tokens(table, [1, 2, 3, 4])
    fork = manager.fork_block_table(table)
    commit_all(manager, table)
    manager.free_block_table(table)
    manager.free_block_table(fork)
    trunk, leaf = hashes_of([1, 2, 3, 4])
    assert eviction_order(manager) == [leaf, trunk]


def test_evicts_the_least_recently_used_sequence_first() -> None:
    manager = make_manager()
    for token in (1, 2, 3):
        store(manager, [token] * 4)
    chains = [hashes_of([token] * 4)[::-1] for token in (1, 2, 3)]
    assert eviction_order(manager) == [*chains[0], *chains[1], *chains[2]]
    assert num_cached_tokens(manager, [1] * 4) == 4
    assert eviction_order(manager) == [*chains[1], *chains[2], *chains[0]]


def test_a_use_of_the_trunk_alone_leaves_its_old_leaf_to_be_evicted_first() -> None:
    manager = make_manager()
    store(manager, [1, 2, 3, 4])
    store(manager, [9, 9])
    assert num_cached_tokens(manager, [1, 2, 7, 7]) == 2
    trunk, leaf = hashes_of([1, 2, 3, 4])
    assert eviction_order(manager) == [leaf, *hashes_of([9, 9]), trunk]


def test_without_a_budget_nothing_is_evicted() -> None:
    manager = make_manager(initial_blocks=1)
    for token in range(100):
        store(manager, [token, token])
    stats = manager.stats()
    assert (stats.evictions, stats.blocks_cached, stats.num_blocks) == (0, 100, 128)


def test_the_budget_counts_payload_bytes_and_is_filled_to_the_last() -> None:
    manager = make_manager(hot_blocks=2)
    store(manager, [1, 1])
    store(manager, [2, 2])
    assert (manager.stats().hot_bytes, manager.stats().evictions) == (2 * BLOCK_BYTES, 0)
    store(manager, [3, 3])
    assert (manager.stats().hot_bytes, manager.stats().evictions) == (2 * BLOCK_BYTES, 1)
    manager.check()


def test_a_budget_smaller_than_a_block_keeps_nothing_and_evicts_nothing() -> None:
    manager = make_manager(hot_blocks=1)
    store(manager, [1, 1])
    table = BlockTable()
    manager.append_tokens(table, [2, 2])
    full = manager.next_full_block(table)
    assert full is not None
    assert not manager.commit_block(table, full, payload_of(BLOCK_BYTES + 1))
    assert (table.num_committed, table.blocks[0].block_hash) == (0, None)
    assert num_cached_tokens(manager, [1, 1]) == 2
    manager.check()


def test_a_budget_full_of_held_blocks_refuses_until_they_are_let_go() -> None:
    manager = make_manager(hot_blocks=2)
    holder = hold(manager, [1, 2, 3, 4])
    table = BlockTable()
    manager.append_tokens(table, [5, 5, 6, 6])
    assert commit_all(manager, table) == 0
    assert manager.stats().evictions == 0
    manager.free_block_table(holder)
    assert commit_all(manager, table) == 2
    assert manager.stats().evictions == 2
    manager.check()


def test_nothing_is_evicted_for_a_block_that_would_not_fit_even_then() -> None:
    manager = make_manager(hot_blocks=3)
    store(manager, [1, 1])
    hold(manager, [2, 2, 3, 3])
    table = BlockTable()
    manager.append_tokens(table, [4, 4])
    full = manager.next_full_block(table)
    assert full is not None
    assert not manager.commit_block(table, full, payload_of(2 * BLOCK_BYTES))
    assert manager.stats().evictions == 0
    assert num_cached_tokens(manager, [1, 1]) == 2


def test_a_block_that_is_in_ram_already_needs_no_room() -> None:
    manager = make_manager(hot_blocks=2)
    store(manager, [1, 1])
    store(manager, [2, 2])
    table = BlockTable()
    manager.append_tokens(table, [1, 1])
    assert commit_all(manager, table) == 1
    assert manager.stats().evictions == 0
    assert num_cached_tokens(manager, [2, 2]) == 2


def test_making_room_never_evicts_the_block_that_is_being_committed() -> None:
    # Least recently used and with no byte to spare: what a careless commit would evict first, then share.
    manager = make_manager(hot_blocks=1)
    store(manager, [1, 1])
    table = BlockTable()
    manager.append_tokens(table, [1, 1])
    assert commit_all(manager, table) == 1
    assert (table.blocks[0].block_hash, table.blocks[0].ref_count) == (hashes_of([1, 1])[0], 1)
    assert table.blocks[0].payload is not None
    manager.check()


# Parts, and the checkpoints' share.


def commit_checkpoint(
    manager: PagedCacheManager, table: BlockTable, position: int, num_blocks: int = 1, *, in_cold_tier: bool = False
) -> bool:
    """Publish a checkpoint that is as large as so many blocks."""
    key = PartKey(position, CHECKPOINT)
    return manager.commit_part(table, key, payload_of(num_blocks * BLOCK_BYTES), in_cold_tier=in_cold_tier)


def hold_parts(
    manager: PagedCacheManager, token_ids: Sequence[int], checkpoints: Mapping[int, int], windows: Sequence[int] = ()
) -> BlockTable:
    """Run a request up to its end; `checkpoints` has the size of each in blocks, by its position."""
    table = hold(manager, token_ids)
    for position, num_blocks in checkpoints.items():
        assert commit_checkpoint(manager, table, position, num_blocks)
    for position in windows:
        assert manager.commit_part(table, PartKey(position, WINDOW), payload_of())
    return table


def store_parts(
    manager: PagedCacheManager, token_ids: Sequence[int], checkpoints: Mapping[int, int], windows: Sequence[int] = ()
) -> None:
    manager.free_block_table(hold_parts(manager, token_ids, checkpoints, windows))
    manager.check()


def eviction_names(manager: PagedCacheManager, *sequences: Sequence[int]) -> str:
    """What would be evicted, in order: ``r``, ``w`` or ``c`` for the part, the first token, the position."""
    names: dict[BlockHash | None, str] = {}
    for token_ids in sequences:
        for position, block_hash in enumerate(hashes_of(token_ids)):
            names[block_hash] = f"r{token_ids[0]}{position}"
            for part in (WINDOW, CHECKPOINT):
                names[hash_part(block_hash, part)] = f"{part[0]}{token_ids[0]}{position}"
    return " ".join(names[block_hash] for block_hash in eviction_order(manager))


def has_checkpoint(manager: PagedCacheManager, token_ids: Sequence[int], position: int) -> bool:
    return manager.has_payload(hash_part(hashes_of(token_ids)[position], CHECKPOINT))


def test_parts_leave_just_before_their_block() -> None:
    manager = make_manager()
    store_parts(manager, [1] * 8, {1: 1, 3: 1}, windows=[0, 2, 3])
    assert eviction_names(manager, [1] * 8) == "w13 c13 r13 w12 r12 c11 r11 w10 r10"


def test_what_is_left_of_a_shortened_sequence_can_still_be_restored() -> None:
    manager = make_manager(hot_blocks=8)
    store_parts(manager, [1] * 8, {1: 2, 3: 2})
    store(manager, [2] * 8)
    assert eviction_names(manager, [1] * 8, [2] * 8) == "c11 r11 r10 r23 r22 r21 r20"
    table = manager.get_computed_blocks([1] * 8)
    assert table.num_tokens == 4
    assert manager.acquire_parts(table, [PartKey(1, CHECKPOINT)])


def test_truncating_lets_go_of_the_parts_of_the_blocks_that_go() -> None:
    manager = make_manager()
    table = hold_parts(manager, [1] * 8, {0: 1, 1: 1, 3: 1})
    manager.truncate(table, 1)
    assert eviction_names(manager, [1] * 8) == "c13 r13 r12 c11 r11"
    assert list(table.parts) == [PartKey(0, CHECKPOINT)]
    manager.check()


def test_a_checkpoint_beyond_the_share_evicts_the_least_recently_used_checkpoint_and_no_rows() -> None:
    manager = make_manager(hot_blocks=12)
    for token in (1, 2, 3):
        store_parts(manager, [token] * 2, {0: 2})
    assert eviction_names(manager, [1, 1], [2, 2], [3, 3]) == "c10 r10 c20 r20 c30 r30"
    table = manager.get_computed_blocks([1, 1])
    assert manager.acquire_parts(table, [PartKey(0, CHECKPOINT)])
    manager.free_block_table(table)
    store_parts(manager, [4, 4], {0: 1})
    assert eviction_names(manager, [1, 1], [2, 2], [3, 3], [4, 4]) == "r20 c30 r30 c10 r10 c40 r40"
    stats = manager.stats()
    assert (stats.evictions, stats.hot_bytes, stats.checkpoint_bytes) == (1, 9 * BLOCK_BYTES, 5 * BLOCK_BYTES)


def test_a_flood_of_checkpoints_leaves_the_rows_of_others() -> None:
    manager = make_manager(hot_blocks=40)
    store(manager, [1] * 32)
    for token in (2, 3, 4, 5):
        store_parts(manager, [token] * 2, {0: 10})
    assert num_cached_tokens(manager, [1] * 32) == 32
    assert [has_checkpoint(manager, [token] * 2, 0) for token in (2, 3, 4, 5)] == [False, False, True, True]
    assert (manager.stats().hot_bytes, manager.stats().evictions) == (40 * BLOCK_BYTES, 2)


def test_a_flood_of_rows_takes_a_checkpoint_only_in_its_turn() -> None:
    manager = make_manager(hot_blocks=10)
    store(manager, [1] * 8)
    store_parts(manager, [2] * 2, {0: 2})
    sequences = ([1] * 8, [2] * 2, [3] * 8, [4] * 4, [5] * 2)
    left = []
    for token_ids in sequences[2:]:
        store(manager, token_ids)
        left.append(eviction_names(manager, *sequences))
    assert left == [
        "r12 r11 r10 c20 r20 r33 r32 r31 r30",
        "r10 c20 r20 r33 r32 r31 r30 r41 r40",
        "c20 r20 r33 r32 r31 r30 r41 r40 r50",
    ]
    store(manager, [6] * 2)
    assert not has_checkpoint(manager, [2] * 2, 0)
    assert num_cached_tokens(manager, [2] * 2) == 2


def test_a_checkpoint_within_the_share_evicts_the_least_recently_used_of_all() -> None:
    manager = make_manager(hot_blocks=8)
    store(manager, [1] * 6)
    store_parts(manager, [2] * 2, {0: 1})
    store_parts(manager, [3] * 2, {0: 3})
    assert eviction_names(manager, [1] * 6, [2] * 2, [3] * 2) == "r11 r10 c20 r20 c30 r30"


def test_a_checkpoint_may_evict_checkpoints_for_the_share_and_then_rows_for_the_budget() -> None:
    manager = make_manager(hot_blocks=10)
    store(manager, [1] * 12)
    store_parts(manager, [2] * 2, {0: 2})
    store_parts(manager, [3] * 2, {0: 4})
    assert eviction_names(manager, [1] * 12, [2] * 2, [3] * 2) == "r13 r12 r11 r10 r20 c30 r30"


def test_a_checkpoint_larger_than_the_share_is_not_kept_and_evicts_nothing() -> None:
    manager = make_manager(hot_blocks=10)
    store_parts(manager, [1] * 2, {0: 5})
    table = hold(manager, [2] * 2)
    assert not commit_checkpoint(manager, table, 0, 6)
    assert (table.parts, manager.stats().evictions) == ({}, 0)
    assert has_checkpoint(manager, [1] * 2, 0)
    manager.check()


def test_a_share_full_of_held_checkpoints_refuses_until_they_are_let_go() -> None:
    manager = make_manager(hot_blocks=10)
    holder = hold_parts(manager, [1] * 2, {0: 3})
    store_parts(manager, [2] * 2, {0: 2})
    table = hold(manager, [3] * 2)
    assert not commit_checkpoint(manager, table, 0, 3)
    assert has_checkpoint(manager, [2] * 2, 0)
    assert commit_checkpoint(manager, table, 0, 3, in_cold_tier=True)
    assert table.parts[PartKey(0, CHECKPOINT)].payload is None
    assert manager.stats().evictions == 0
    manager.free_block_table(holder)
    assert commit_checkpoint(manager, table, 0, 3)
    assert [has_checkpoint(manager, [token] * 2, 0) for token in (1, 2, 3)] == [False, False, True]
    manager.check()


def test_a_checkpoint_read_from_the_cold_tier_is_kept_within_the_share() -> None:
    checkpoints = [hash_part(hashes_of([token] * 2)[0], CHECKPOINT) for token in (1, 2)]
    manager = make_manager(hot_blocks=10, cold=FakeColdIndex(checkpoints))
    store_parts(manager, [3] * 2, {0: 1})
    for token, num_blocks in ((1, 5), (2, 6)):
        table = hold(manager, [token] * 2)
        assert manager.acquire_parts(table, [PartKey(0, CHECKPOINT)])
        manager.promote(table.parts[PartKey(0, CHECKPOINT)], payload_of(num_blocks * BLOCK_BYTES))
        manager.free_block_table(table)
        manager.check()
    assert eviction_names(manager, [1] * 2, [2] * 2, [3] * 2) == "r30 c10 r10 r20"
    assert (manager.stats().promotions, manager.stats().checkpoint_bytes) == (1, 5 * BLOCK_BYTES)


def test_windows_are_rows_to_the_share() -> None:
    manager = make_manager(hot_blocks=5, checkpoint_share=0.2)
    store_parts(manager, [1] * 4, {0: 1}, windows=[0, 1])
    assert eviction_names(manager, [1] * 4) == "w11 r11 w10 c10 r10"


@pytest.mark.parametrize(("checkpoint_share", "num_kept"), [(1.0, 9), (0.5, 5), (0.1, 1), (0.09, 0)])
def test_the_share_bounds_checkpoints_to_the_byte(checkpoint_share: float, num_kept: int) -> None:
    manager = make_manager(hot_blocks=10, checkpoint_share=checkpoint_share)
    table = hold(manager, [1] * 2)
    kept = [commit_checkpoint(manager, table, 0, size) for size in range(10, 0, -1)]
    assert kept.count(True) == num_kept


def test_without_a_budget_there_is_no_share() -> None:
    manager = make_manager(checkpoint_share=0.01)
    for token in range(20):
        store_parts(manager, [token] * 2, {0: 50})
    assert (manager.stats().evictions, manager.stats().checkpoint_bytes) == (0, 20 * 50 * BLOCK_BYTES)


# Growth.


def test_the_pool_grows_from_its_initial_blocks() -> None:
    manager = make_manager(initial_blocks=1)
    assert manager.stats().num_blocks == 1
    table = hold(manager, list(range(10)))
    assert (manager.stats().num_blocks, manager.stats().blocks_in_use) == (8, 5)
    assert [block.ref_count for block in table.blocks] == [1] * 5


def test_exhaustion_keeps_what_fitted_and_corrupts_nothing() -> None:
    manager = make_manager(initial_blocks=1, max_blocks=3)
    holder = hold(manager, [1, 1])
    table = manager.get_computed_blocks([2] * 6)
    with pytest.raises(BlockPoolExhaustedError, match="all 3 cache blocks are in use"):
        manager.append_tokens(table, [2] * 6)
    assert (table.token_ids, len(table.blocks)) == ([2] * 4, 2)
    assert commit_all(manager, table) == 2
    manager.check()
    manager.free_block_table(holder)
    manager.append_tokens(table, [2, 2])
    assert (table.num_tokens, commit_all(manager, table)) == (6, 1)
    manager.free_block_table(table)
    assert (manager.stats().blocks_in_use, manager.stats().num_blocks) == (0, 3)
    manager.check()


def test_exhaustion_in_a_copy_on_write_leaves_both_forks_whole() -> None:
    manager = make_manager(initial_blocks=1, max_blocks=1)
    table = BlockTable()
    manager.append_tokens(table, [1])
    fork = manager.fork_block_table(table)
    with pytest.raises(BlockPoolExhaustedError):
        manager.append_tokens(fork, [2])
    assert fork.blocks == table.blocks
    assert (fork.token_ids, table.blocks[0].ref_count, table.blocks[0].num_tokens) == ([1], 2, 1)
    assert manager.stats().cow_copies == 0
    manager.check()


# What only the SSD tier has.


def test_blocks_of_the_cold_tier_are_registered_as_metadata() -> None:
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    manager = make_manager(cold=FakeColdIndex(hashes[:2]))
    table = manager.get_computed_blocks([1, 2, 3, 4, 5, 6])
    assert [block.block_hash for block in table.blocks] == hashes[:2]
    assert [(block.payload, block.num_tokens, block.ref_count) for block in table.blocks] == [(None, 2, 1)] * 2
    assert (table.token_ids, table.num_committed) == ([1, 2, 3, 4], 2)
    stats = manager.stats()
    assert (stats.blocks_in_use, stats.hot_blocks, stats.hot_bytes, stats.promotions) == (2, 0, 0, 0)
    manager.check()


def test_a_chain_may_alternate_between_the_tiers() -> None:
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    cold = FakeColdIndex([hashes[0], hashes[2]])
    manager = make_manager(hot_blocks=1, cold=cold)
    table = BlockTable()
    manager.append_tokens(table, [1, 2, 3, 4])
    holder = hold(manager, [9, 9])
    first = manager.next_full_block(table)
    assert first is not None
    assert manager.commit_block(table, first, payload_of(), in_cold_tier=True)
    manager.free_block_table(holder)
    assert commit_all(manager, table) == 1
    manager.free_block_table(table)
    found = manager.get_computed_blocks([1, 2, 3, 4, 5, 6])
    assert [block.payload is not None for block in found.blocks] == [False, True, False]
    manager.check()


def test_the_cold_tier_is_not_asked_about_blocks_that_are_known() -> None:
    hashes = hashes_of([1, 2, 3, 4, 5, 6, 7, 8])
    cold = FakeColdIndex([hashes[1]])
    manager = make_manager(cold=cold)
    hold(manager, [1, 2])
    cold.lookups.clear()
    manager.get_computed_blocks([1, 2, 3, 4, 5, 6, 7, 8])
    assert cold.lookups == [hashes[1], hashes[2]]
    cold.lookups.clear()
    manager.get_computed_blocks([1, 2, 3, 4])
    assert cold.lookups == []


def test_metadata_of_the_cold_tier_is_forgotten_when_it_is_released() -> None:
    cold = FakeColdIndex(hashes_of([1, 2]))
    manager = make_manager(cold=cold)
    assert num_cached_tokens(manager, [1, 2]) == 2
    assert (manager.stats().blocks_cached, manager.stats().blocks_in_use) == (0, 0)
    cold.present.clear()
    assert num_cached_tokens(manager, [1, 2]) == 0
    manager.check()


def test_a_block_is_published_without_room_in_ram_if_the_cold_tier_has_it() -> None:
    cold = FakeColdIndex()
    manager = make_manager(hot_blocks=1, cold=cold)
    holder = hold(manager, [9, 9])
    table = BlockTable()
    manager.append_tokens(table, [1, 2])
    assert commit_all(manager, table) == 0
    assert commit_all(manager, table, in_cold_tier=True) == 1
    assert (table.blocks[0].payload, manager.stats().hot_blocks) == (None, 1)
    assert manager.get_computed_blocks([1, 2]).blocks == table.blocks
    assert holder.blocks[0].payload is not None
    manager.check()


def test_a_block_that_another_holds_as_metadata_is_not_published_by_a_sequence_whose_copy_no_tier_takes() -> None:
    manager = make_manager(hot_blocks=0, cold=FakeColdIndex(hashes_of([1, 2])))
    holder = manager.get_computed_blocks([1, 2])
    table = BlockTable()
    manager.append_tokens(table, [1, 2])
    assert commit_all(manager, table) == 0
    assert holder.blocks[0].ref_count == 1
    assert commit_all(manager, table, in_cold_tier=True) == 1
    assert table.blocks == holder.blocks
    manager.check()


def test_a_computed_block_fills_in_what_another_sequence_holds_as_metadata() -> None:
    manager = make_manager(cold=FakeColdIndex(hashes_of([1, 2])))
    holder = manager.get_computed_blocks([1, 2])
    table = BlockTable()
    manager.append_tokens(table, [1, 2])
    assert commit_all(manager, table) == 1
    assert table.blocks == holder.blocks
    assert (holder.blocks[0].ref_count, holder.blocks[0].payload is not None) == (2, True)
    assert (manager.stats().blocks_in_use, manager.stats().promotions) == (1, 0)
    manager.check()


def test_promotion_keeps_a_block_in_ram_and_is_counted() -> None:
    cold = FakeColdIndex(hashes_of([1, 2]))
    manager = make_manager(cold=cold)
    table = manager.get_computed_blocks([1, 2])
    payload = payload_of()
    manager.promote(table.blocks[0], payload)
    manager.promote(table.blocks[0], payload_of())
    assert table.blocks[0].payload is payload
    assert (manager.stats().promotions, manager.stats().hot_bytes) == (1, BLOCK_BYTES)
    manager.free_block_table(table)
    cold.present.clear()
    assert num_cached_tokens(manager, [1, 2]) == 2
    manager.check()


def test_promotion_evicts_what_nobody_holds_and_stays_within_the_budget() -> None:
    manager = make_manager(hot_blocks=1, cold=FakeColdIndex(hashes_of([1, 2, 3, 4])))
    store(manager, [9, 9])
    table = manager.get_computed_blocks([1, 2, 3, 4])
    for block in table.blocks:
        manager.promote(block, payload_of())
    assert [block.payload is not None for block in table.blocks] == [True, False]
    stats = manager.stats()
    assert (stats.promotions, stats.evictions, stats.hot_bytes) == (1, 1, BLOCK_BYTES)
    manager.check()


def test_a_block_that_was_let_go_is_not_promoted() -> None:
    manager = make_manager(cold=FakeColdIndex(hashes_of([1, 2])))
    table = manager.get_computed_blocks([1, 2])
    [block] = table.blocks
    manager.free_block_table(table)
    manager.promote(block, payload_of())
    assert (block.payload, manager.stats().promotions) == (None, 0)
    manager.check()


def test_exhaustion_ends_a_match_with_what_was_found() -> None:
    manager = make_manager(initial_blocks=1, max_blocks=2, cold=FakeColdIndex(hashes_of([1, 2, 3, 4, 5, 6])))
    table = manager.get_computed_blocks([1, 2, 3, 4, 5, 6])
    assert (table.token_ids, len(table.blocks)) == ([1, 2, 3, 4], 2)
    manager.check()


# Threads.


def test_a_block_registered_by_another_thread_during_the_cold_look_up_is_shared() -> None:
    cold = FakeColdIndex(hashes_of([1, 2]))
    manager = make_manager(cold=cold)
    others: list[BlockTable] = []

    def overtake(block_hash: BlockHash) -> None:
        cold.on_lookup = lambda block_hash: None
        in_thread(lambda: others.append(manager.get_computed_blocks([1, 2])))

    cold.on_lookup = overtake
    table = manager.get_computed_blocks([1, 2])
    [other] = others
    assert table.blocks == other.blocks
    assert (table.blocks[0].ref_count, manager.stats().blocks_in_use) == (2, 1)
    manager.check()


def test_matched_blocks_are_not_evicted_while_the_match_goes_on() -> None:
    hashes = hashes_of([1, 2, 3, 4, 5, 6])
    cold = FakeColdIndex([hashes[2]])
    manager = make_manager(hot_blocks=2, cold=cold)
    store(manager, [1, 2, 3, 4])

    def press(block_hash: BlockHash) -> None:
        cold.on_lookup = lambda block_hash: None
        in_thread(lambda: store(manager, [7, 7, 8, 8]))

    cold.on_lookup = press
    table = manager.get_computed_blocks([1, 2, 3, 4, 5, 6])
    assert [block.block_hash for block in table.blocks] == hashes
    assert [block.payload is not None for block in table.blocks] == [True, True, False]
    assert manager.stats().evictions == 0
    manager.check()


def test_a_block_evicted_during_the_match_ends_it_there() -> None:
    # The first block is on SSD only, the second in RAM only, and gone by the time that the walk gets there.
    hashes = hashes_of([1, 2, 3, 4])
    cold = FakeColdIndex([hashes[0]])
    manager = make_manager(hot_blocks=1, cold=cold)
    holder = hold(manager, [9, 9])
    table = manager.get_computed_blocks([1, 2])
    manager.free_block_table(holder)
    manager.append_tokens(table, [3, 4])
    assert commit_all(manager, table) == 1
    manager.free_block_table(table)
    assert eviction_order(manager) == [hashes[1]]

    def evict(block_hash: BlockHash) -> None:
        cold.on_lookup = lambda block_hash: None
        in_thread(lambda: store(manager, [8, 8]))

    cold.on_lookup = evict
    assert manager.get_computed_blocks([1, 2, 3, 4]).token_ids == [1, 2]
    assert manager.stats().evictions == 2
    manager.check()


def test_the_pool_is_touched_under_the_lock_only() -> None:
    cold = FakeColdIndex(hashes_of([1, 2]))
    manager = make_manager(hot_blocks=4, cold=cold)
    pool, touched = manager._pool, set()

    class WatchedPool:
        def __getattr__(self, name: str) -> object:
            assert manager._lock.locked()
            touched.add(name)
            return getattr(pool, name)

    manager._pool = manager._budget._pool = cast(BlockPool, WatchedPool())
    table = manager.get_computed_blocks([1, 2, 3])
    manager.promote(table.blocks[0], payload_of())
    manager.append_tokens(table, [3])
    fork = manager.fork_block_table(table)
    for each in (table, fork):
        manager.append_tokens(each, [4])
    commit_all(manager, table)
    full = manager.next_full_block(fork)
    assert full is not None
    assert manager.share_block(fork, full)
    manager.truncate(fork, 1)
    manager.free_block_table(table)
    manager.free_block_table(fork)
    store_parts(manager, [9, 9], {0: 1})
    store_parts(manager, [8, 8], {0: 2})
    manager.stats()
    manager.check()
    changes = {"allocate", "acquire", "release", "register", "attach", "evict_least_recently_used", "evict_checkpoint"}
    assert {"get", *changes} <= touched


def test_many_threads_leave_the_counts_right() -> None:
    manager = make_manager(hot_blocks=6, max_blocks=64, cold=FakeColdIndex(hashes_of([0, 0, 0, 0])))
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            start.wait(JOIN_S)
            for _ in range(150):
                prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 12))]
                table = hold(manager, prompt)
                check_identity(table.blocks, table)
                fork = manager.fork_block_table(table)
                manager.append_tokens(fork, [chance.randrange(2)])
                commit_all(manager, fork)
                manager.free_block_table(table)
                check_identity(fork.blocks, fork)
                manager.free_block_table(fork)
        except BaseException as exc:
            failures.append(exc)

    def check_identity(blocks: Sequence[CacheBlock], table: BlockTable) -> None:
        names = hashes_of(table.token_ids)[: table.num_committed]
        assert [block.block_hash for block in blocks[: table.num_committed]] == names

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_S)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    assert manager.stats().blocks_in_use == 0
    manager.check()
