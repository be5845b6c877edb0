"""The hot tier: which blocks a prefix has, who shares them, and what stays in RAM.

A request owns a `BlockTable`. Its life is: `get_computed_blocks` finds and pins the longest cached prefix;
`append_tokens` adds the tokens that are computed, allocating blocks; `commit_block` publishes each block that has
filled; `free_block_table` lets go. `fork_block_table` shares a table, and the first of the two to write into the
common partial block copies it (copy-on-write).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from omlx_core.cache.block_hash import BlockHash, NamespaceHash, as_uint32, hash_block, iter_block_hashes
from omlx_core.cache.block_pool import BlockPool, CacheBlock
from omlx_core.cache.block_table import BlockTable, FullBlock
from omlx_core.cache.block_tree import BlockTree, ChildBlock
from omlx_core.cache.events import EventBus
from omlx_core.cache.hot_budget import HotBudget
from omlx_core.cache.parts import ROWS, Part, PartKey, hash_part
from omlx_core.cache.payload import BlockPayload
from omlx_core.errors import BlockPoolExhaustedError, CacheInvariantError


class ColdTierIndex(Protocol):
    """What the hot tier asks of the SSD tier."""

    def has_block(self, block_hash: BlockHash) -> bool:
        """Whether a block can be read from there. May block briefly; never raises."""
        ...


@dataclass(frozen=True, slots=True)
class HotCacheStats:
    """The hot tier at one moment.

    Attributes:
        num_blocks: block records in the pool.
        blocks_in_use: held by a running request or a pinned prefix; one that eight of them share counts once.
        blocks_cached: held by nobody, waiting to be found again or evicted.
        hot_blocks: blocks whose tensors are in RAM.
        hot_bytes: their size in bytes.
        checkpoint_bytes: that of the checkpoints among them.
        evictions: blocks evicted from RAM so far.
        promotions: blocks brought to RAM from the SSD tier so far.
        cow_copies: blocks copied on write so far.
    """

    num_blocks: int
    blocks_in_use: int
    blocks_cached: int
    hot_blocks: int
    hot_bytes: int
    checkpoint_bytes: int
    evictions: int
    promotions: int
    cow_copies: int


class PagedCacheManager:
    """Maps token sequences to shared, reference-counted blocks. Thread-safe; no I/O happens under its lock.

    Args:
        namespace: root of every chain hash.
        block_size: tokens per block.
        initial_blocks: block records made at once.
        hot_max_bytes: most payload bytes in RAM; None is no limit.
        checkpoint_share: the largest part of `hot_max_bytes` that checkpoints may take, in (0, 1].
        max_blocks: most block records; None is no limit.
        cold: index of the SSD tier, if there is one.
        events: where to tell of blocks stored, restored and evicted.
    """

    def __init__(
        self,
        namespace: NamespaceHash,
        *,
        block_size: int,
        initial_blocks: int = 256,
        hot_max_bytes: int | None = None,
        checkpoint_share: float = 1.0,
        max_blocks: int | None = None,
        cold: ColdTierIndex | None = None,
        events: EventBus | None = None,
    ) -> None:
        self.block_size = block_size
        self._namespace = namespace
        self._cold = cold
        self._events = EventBus() if events is None else events
        self._tree = BlockTree()
        self._pool = BlockPool(initial_blocks, max_blocks, self._tree.discard)
        self._budget = HotBudget(self._pool, hot_max_bytes, checkpoint_share, self._events)
        self._lock = threading.Lock()
        self._num_promotions = 0
        self._num_cow_copies = 0

    def get_computed_blocks(
        self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = (), *, max_tokens: int | None = None
    ) -> BlockTable:
        """Find and hold the longest cached prefix.

        Walks the chain hashes from the root and stops at the first block that neither tier has. A block that only
        the SSD tier has is registered with its hash and no payload. Each block is held from the moment it is
        found, so it can't be evicted or replaced before it is used.

        Args:
            token_ids: the whole sequence.
            extra_keys: must equal those that the blocks were stored under.
            max_tokens: reuse no more than this; a prompt needs at least one token left to compute.

        Returns:
            A table of full, committed blocks: to be given back with `free_block_table`.
        """
        table = BlockTable(extra_keys)
        # One walk over the caller's integers, which lie scattered: each more costs as much as all the rest.
        tokens = as_uint32(token_ids)
        reusable = tokens if max_tokens is None else tokens[: max(max_tokens, 0)]
        for block_hash in self.block_hashes(reusable, extra_keys):
            block = self._acquire(block_hash)
            if block is None:
                break
            table.blocks.append(block)
        table.num_committed = len(table.blocks)
        matched = reusable[: table.num_committed * self.block_size].astype("u4", copy=False).tobytes()
        size_bytes = 4 * self.block_size
        table.tokens = [array("I", matched[at : at + size_bytes]) for at in range(0, len(matched), size_bytes)]
        return table

    def append_tokens(self, table: BlockTable, token_ids: Iterable[int]) -> None:
        """Add computed tokens to a table, allocating blocks as they fill.

        Raises:
            BlockPoolExhaustedError: the pool may not grow; the tokens that fitted stay.
            OverflowError: a token id doesn't fit 32 bits; nothing is added.
        """
        tokens = array("I", token_ids)
        num_added = 0
        with self._lock:
            while num_added < len(tokens):
                filled = table.num_tokens % self.block_size
                if filled == 0:
                    table.blocks.append(self._pool.allocate())
                    table.tokens.append(array("I"))
                elif table.blocks[-1].ref_count > 1:
                    table.blocks[-1] = self._cow_copy_block(table.blocks[-1])
                added = tokens[num_added : num_added + self.block_size - filled]
                table.tokens[-1] += added
                table.blocks[-1].num_tokens = filled + len(added)
                num_added += len(added)

    def next_full_block(self, table: BlockTable) -> FullBlock | None:
        """The first block of a table that has filled but isn't published, or None.

        Raises:
            CacheInvariantError: its parent has no identity.
        """
        position = table.num_committed
        if position == len(table.tokens) or len(table.tokens[position]) < self.block_size:
            return None
        tokens = table.tokens[position]
        parent = table.blocks[position - 1].block_hash if position else None
        if position and parent is None:
            raise CacheInvariantError(f"block {position} is to be published before its parent")
        block_hash = hash_block(parent or self._namespace, tokens, table.extra_keys)
        return FullBlock(position, block_hash, parent, tuple(tokens))

    def has_payload(self, block_hash: BlockHash) -> bool:
        """Whether a block's content is in RAM."""
        with self._lock:
            block = self._pool.get(block_hash)
            return block is not None and block.payload is not None

    def block_hashes(
        self, token_ids: Sequence[int] | np.ndarray, extra_keys: tuple[str, ...] = ()
    ) -> Iterator[BlockHash]:
        """The names of a sequence's full blocks, lazily."""
        return iter_block_hashes(self._namespace, token_ids, self.block_size, extra_keys)

    def tier_of(self, block_hash: BlockHash) -> Literal["hot", "cold"] | None:
        """Where a block or a part of one can be had from now, without holding it; None is nowhere."""
        with self._lock:
            block = self._pool.get(block_hash)
            if block is not None:
                return "cold" if block.payload is None else "hot"
        return "cold" if self._cold is not None and self._cold.has_block(block_hash) else None

    def children(self, parent_hash: BlockHash | None, extra_keys: tuple[str, ...], limit: int) -> list[ChildBlock]:
        """The blocks published here that follow one, or begin a chain; the latest first, `limit` at the most."""
        with self._lock:
            return self._tree.children(parent_hash or self._namespace, extra_keys, limit)

    def share_block(self, table: BlockTable, full: FullBlock) -> bool:
        """Put the block that another sequence has published, if it is in RAM, in place of the table's own.

        Returns:
            Whether it was there; if so, the table's own block is freed and there is nothing to commit.
        """
        with self._lock:
            published = self._pool.get(full.block_hash)
            if published is None or published.payload is None:
                return False
            self._publish(table, full, published)
            return True

    def commit_block(
        self, table: BlockTable, full: FullBlock, payload: BlockPayload, *, in_cold_tier: bool = False
    ) -> bool:
        """Publish a block that has filled, with its content.

        Args:
            table: the table that the block is in.
            full: what `next_full_block` said of it.
            payload: its tensors.
            in_cold_tier: the SSD tier has them or is about to, so that the block may be published without RAM.

        Returns:
            Whether it is published. False: no tier has room now, or the pool none for a copy-on-write, and the
            table is as it was.
        """
        with self._lock:
            published = self._pool.get(full.block_hash)
            is_safe = in_cold_tier or (published is not None and published.payload is not None)
            if not is_safe and not self._budget.make_room(payload.size_bytes, ROWS):
                return False
            # Held from here on, so that making room can't evict the very block that it is made for.
            try:
                block = self._publish(table, full, published)
            except BlockPoolExhaustedError:
                return False
            if block.payload is None and self._budget.make_room(payload.size_bytes, ROWS):
                self._pool.attach(block, payload)
                self._events.publish("store", "hot", num_blocks=1, size_bytes=payload.size_bytes)
            return True

    def acquire_parts(self, table: BlockTable, keys: Iterable[PartKey]) -> bool:
        """Find and hold parts of a table's blocks, all or none.

        Returns:
            Whether a tier has all of them.
        """
        found: dict[PartKey, CacheBlock] = {}
        for key in keys:
            block = self._acquire(self._part_hash(table, key), key.part)
            if block is None:
                with self._lock:
                    for block in found.values():
                        self._pool.release(block)
                return False
            found[key] = block
        table.parts.update(found)
        return True

    def commit_part(
        self, table: BlockTable, key: PartKey, payload: BlockPayload, *, in_cold_tier: bool = False
    ) -> bool:
        """Publish a part of a published block, unless a tier has it.

        Returns:
            Whether it is published. False: no tier has room for it now.
        """
        part_hash = self._part_hash(table, key)
        with self._lock:
            block = self._pool.get(part_hash)
            has_payload = block is not None and block.payload is not None
            if not has_payload and not in_cold_tier and not self._budget.make_room(payload.size_bytes, key.part):
                return False
            if key in table.parts:
                block = table.parts[key]
            elif block is not None:
                self._pool.acquire(block)
            else:
                try:
                    block = self._pool.allocate()
                except BlockPoolExhaustedError:
                    return False
                self._pool.register(block, part_hash, key.part)
            table.parts[key] = block
            if block.payload is None and self._budget.make_room(payload.size_bytes, key.part):
                self._pool.attach(block, payload)
                self._events.publish("store", "hot", num_blocks=1, size_bytes=payload.size_bytes)
            return True

    def wants(self, block: CacheBlock, size_bytes: int) -> bool:
        """Whether `promote` would keep a payload of that size now; to ask before reading it."""
        with self._lock:
            return block.payload is None and self._budget.can_fit(size_bytes, block.part)

    def promote(self, block: CacheBlock, payload: BlockPayload) -> None:
        """Keep in RAM what was read from the SSD tier, if there is room for it."""
        with self._lock:
            if block.block_hash is None or block.payload is not None:
                return
            if self._budget.make_room(payload.size_bytes, block.part):
                self._pool.attach(block, payload)
                self._num_promotions += 1
                self._events.publish("restore", "cold", num_blocks=1, size_bytes=payload.size_bytes)

    def truncate(self, table: BlockTable, num_blocks: int) -> None:
        """Let go of all blocks of a table but the first `num_blocks`, whose content turned out to be gone."""
        with self._lock:
            self._release_blocks(table, num_blocks)
        del table.blocks[num_blocks:]
        del table.tokens[num_blocks:]
        table.num_committed = min(table.num_committed, num_blocks)
        table.num_saved = min(table.num_saved, num_blocks)

    def fork_block_table(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks, sharing the partial last one until either writes to it."""
        with self._lock:
            for block in [*table.blocks, *table.parts.values()]:
                self._pool.acquire(block)
        return BlockTable(
            table.extra_keys,
            [*table.tokens[:-1], *(tokens[:] for tokens in table.tokens[-1:])],
            list(table.blocks),
            num_committed=table.num_committed,
            num_saved=table.num_saved,
            parts=dict(table.parts),
            unsaved_parts=set(table.unsaved_parts),
        )

    def hold_prefix(self, table: BlockTable, num_blocks: int, keys: Iterable[PartKey]) -> BlockTable:
        """A table over the first published blocks of another, with some of that one's parts of them.

        Raises:
            CacheInvariantError: not so many are published.
        """
        if num_blocks > table.num_committed:
            raise CacheInvariantError(f"{num_blocks} blocks are to be held, of {table.num_committed} published ones")
        held = BlockTable(
            table.extra_keys,
            table.tokens[:num_blocks],
            table.blocks[:num_blocks],
            num_committed=num_blocks,
            parts={key: table.parts[key] for key in keys},
        )
        with self._lock:
            for block in [*held.blocks, *held.parts.values()]:
                self._pool.acquire(block)
        return held

    def free_block_table(self, table: BlockTable) -> None:
        """Drop a table's references, tip first, so that leaves are evicted before the trunk. Idempotent."""
        with self._lock:
            self._release_blocks(table, 0)
        table.blocks.clear()
        table.tokens.clear()
        table.num_committed = table.num_saved = 0

    def stats(self) -> HotCacheStats:
        """Counters and sizes at this moment."""
        with self._lock:
            return HotCacheStats(
                num_blocks=self._pool.num_blocks,
                blocks_in_use=self._pool.num_in_use,
                blocks_cached=self._pool.num_cached,
                hot_blocks=self._pool.num_hot,
                hot_bytes=self._pool.hot_bytes,
                checkpoint_bytes=self._pool.checkpoint_bytes,
                evictions=self._pool.num_evictions,
                promotions=self._num_promotions,
                cow_copies=self._num_cow_copies,
            )

    def close(self) -> None:
        """Let go of everything in RAM; only `stats` may be called from then on."""
        with self._lock:
            self._pool.clear()
            self._tree.clear()

    def check(self) -> None:
        """Verify the pool's invariants, the budget, the checkpoints' share and the tree; for tests.

        Raises:
            CacheInvariantError: naming what is broken.
        """
        with self._lock:
            self._pool.check()
            self._budget.check()
            strays = [block_hash for block_hash in self._tree.block_hashes() if self._pool.get(block_hash) is None]
            if strays:
                raise CacheInvariantError(f"{len(strays)} blocks are in the tree and not in the pool")

    def _acquire(self, block_hash: BlockHash, part: Part = ROWS) -> CacheBlock | None:
        with self._lock:
            block = self._pool.get(block_hash)
            if block is not None:
                self._pool.acquire(block)
                return block
        if self._cold is None or not self._cold.has_block(block_hash):
            return None
        with self._lock:
            # Another thread may have registered it while the lock was free.
            block = self._pool.get(block_hash)
            if block is not None:
                self._pool.acquire(block)
                return block
            try:
                block = self._pool.allocate()
            except BlockPoolExhaustedError:
                return None
            block.num_tokens = self.block_size
            self._pool.register(block, block_hash, part)
            return block

    def _part_hash(self, table: BlockTable, key: PartKey) -> BlockHash:
        block_hash = table.blocks[key.position].block_hash
        if block_hash is None:
            raise CacheInvariantError(f"block {key.position} has a {key.part} before it is published")
        return hash_part(block_hash, key.part)

    def _release_blocks(self, table: BlockTable, num_blocks: int) -> None:
        """Let go of all blocks but the first `num_blocks`, tip first, each just after its parts; the lock is held.

        Eviction thus shortens a sequence from its end, and what is left of it can still be restored.
        """
        keys = sorted(key for key in table.parts if key.position >= num_blocks)
        for position in reversed(range(num_blocks, len(table.blocks))):
            while keys and keys[-1].position >= position:
                key = keys.pop()
                self._pool.release(table.parts.pop(key))
                table.unsaved_parts.discard(key)
            self._pool.release(table.blocks[position])

    def _publish(self, table: BlockTable, full: FullBlock, published: CacheBlock | None) -> CacheBlock:
        """Register the table's own block, or put the one that is published already in its place."""
        if full.position != table.num_committed:
            raise CacheInvariantError(
                f"block {full.position} can't be published: it is the turn of block {table.num_committed}"
            )
        block = table.blocks[full.position]
        if published is not None:
            self._pool.acquire(published)
            self._pool.release(block)
            block = published
        else:
            # A fork that shares it must not come to hold a published block without the published parent: eviction
            # could then take the parent first.
            if block.ref_count > 1:
                block = self._cow_copy_block(block)
            self._pool.register(block, full.block_hash)
        self._tree.add(full.parent_hash or self._namespace, table.extra_keys, full.block_hash, full.token_ids)
        table.blocks[full.position] = block
        table.num_committed = full.position + 1
        return block

    def _cow_copy_block(self, shared: CacheBlock) -> CacheBlock:
        """Give the caller's table a block of its own in place of a shared unpublished one; the lock is held.

        Such a block has no payload (its keys and values are still in the request's own cache), so the copy is a
        fresh record of as many tokens and one reference less on the original.
        """
        copy = self._pool.allocate()
        copy.num_tokens = shared.num_tokens
        self._pool.release(shared)
        self._num_cow_copies += 1
        return copy
