"""The pool of cache blocks: records, reference counts, and the queue that decides who is evicted.

A block is in exactly one of three places:

- *in use*: ``ref_count > 0``; some block table holds it.
- *cached*: ``ref_count == 0`` and it has a hash; it waits in a free queue, least recently used first, and is
  found again through the index until it is evicted.
- *empty*: ``ref_count == 0`` and no hash; the next allocation takes it.

Checkpoints have a free queue and sums of their own, so that they can be evicted by themselves. A logical clock says
which queue's front was released first: taken together the two are one queue.

The vocabulary and the queue are vLLM's (``vllm/v1/core/block_pool.py``, PagedAttention, Kwon et al. 2023). Here a
block is a record of a prefix, not a slot of a fixed tensor, so the pool may grow and its size costs next to nothing.
Not thread-safe: `PagedCacheManager` holds the lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.parts import CHECKPOINT, ROWS, Part
from omlx_core.cache.payload import BlockPayload
from omlx_core.errors import BlockPoolExhaustedError, CacheInvariantError


@dataclass(slots=True, eq=False)
class CacheBlock:
    """One block of at most `block_size` tokens.

    Attributes:
        block_id: its place in the pool.
        ref_count: how many block tables hold it. More than one: shared, never written to.
        num_tokens: tokens in it; less than the block size only in the last block of a table.
        block_hash: its chain hash, once it is full and its content is in a tier.
        payload: its tensors if they are in RAM; None while it is empty, partial, or only on SSD.
        part: what of a block it is, once it has a hash.
        released_at: the pool's clock when it was last cached.
    """

    block_id: int
    ref_count: int = 0
    num_tokens: int = 0
    block_hash: BlockHash | None = None
    payload: BlockPayload | None = None
    part: Part = ROWS
    released_at: int = 0
    # Links of the free queue; both None outside it.
    prev_free: CacheBlock | None = field(default=None, repr=False)
    next_free: CacheBlock | None = field(default=None, repr=False)


class FreeKVCacheBlockQueue:
    """Doubly linked list through the blocks themselves: every operation is O(1), removal from the middle too.

    The front is the least recently used. Blocks of a finished request are appended tip first, so a leaf always
    stands before its parents and eviction never cuts a chain in the middle.
    """

    def __init__(self) -> None:
        self._front = CacheBlock(block_id=-1)
        self._back = CacheBlock(block_id=-1)
        self._front.next_free, self._back.prev_free = self._back, self._front
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[CacheBlock]:
        """From least to most recently used."""
        block = self._front.next_free
        while block is not None and block is not self._back:
            following = block.next_free
            yield block
            block = following

    def append(self, block: CacheBlock) -> None:
        """Add as the most recently used.

        Raises:
            CacheInvariantError: the block is in the queue already.
        """
        if block.prev_free is not None or block.next_free is not None:
            raise CacheInvariantError(f"block {block.block_id} is in the free queue already")
        last = self._back.prev_free
        if last is None:
            raise CacheInvariantError("the free queue has lost its end")
        last.next_free = block
        block.prev_free, block.next_free = last, self._back
        self._back.prev_free = block
        self._length += 1

    def remove(self, block: CacheBlock) -> None:
        """Take a block out, wherever it stands.

        Raises:
            CacheInvariantError: the block isn't in the queue.
        """
        before, after = block.prev_free, block.next_free
        if before is None or after is None:
            raise CacheInvariantError(f"block {block.block_id} is not in the free queue")
        before.next_free, after.prev_free = after, before
        block.prev_free = block.next_free = None
        self._length -= 1

    @property
    def front(self) -> CacheBlock | None:
        """The least recently used block, or None."""
        block = self._front.next_free
        return None if block is self._back else block


@dataclass(slots=True)
class _Kind:
    """The blocks of one kind: those that may be evicted, and what all of them take in RAM."""

    cached: FreeKVCacheBlockQueue = field(default_factory=FreeKVCacheBlockQueue)
    hot_bytes: int = 0
    evictable_bytes: int = 0


class BlockPool:
    """Allocates, shares, frees and evicts blocks.

    Args:
        initial_blocks: records made at once; the pool doubles when it runs out of empty ones.
        max_blocks: most records; None is no limit, since bytes are bounded elsewhere.
        on_forget: told the name of each block whose record is emptied, but for those that `clear` forgets.
    """

    def __init__(
        self,
        initial_blocks: int,
        max_blocks: int | None = None,
        on_forget: Callable[[BlockHash], None] = lambda _: None,
    ) -> None:
        self._max_blocks = max_blocks
        self._on_forget = on_forget
        self._clock = 0
        self.num_evictions = 0
        self.clear()
        self._grow(initial_blocks)

    def clear(self) -> None:
        """Forget all blocks, whoever holds them, and let go of their payloads; only the counters stay."""
        self._blocks: list[CacheBlock] = []
        self._empty: list[CacheBlock] = []
        self._checkpoints = _Kind()
        self._others = _Kind()
        self._index: dict[BlockHash, CacheBlock] = {}
        self._num_hot = 0

    @property
    def num_blocks(self) -> int:
        """Records in the pool."""
        return len(self._blocks)

    @property
    def num_empty(self) -> int:
        """Records that carry nothing."""
        return len(self._empty)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can be found again."""
        return len(self._checkpoints.cached) + len(self._others.cached)

    @property
    def num_in_use(self) -> int:
        """Blocks that some table holds."""
        return len(self._blocks) - len(self._empty) - self.num_cached

    @property
    def hot_bytes(self) -> int:
        """Payload bytes in RAM."""
        return self._checkpoints.hot_bytes + self._others.hot_bytes

    @property
    def held_bytes(self) -> int:
        """Payload bytes in RAM that some table holds."""
        return self.hot_bytes - self._checkpoints.evictable_bytes - self._others.evictable_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Payload bytes of checkpoints in RAM."""
        return self._checkpoints.hot_bytes

    @property
    def held_checkpoint_bytes(self) -> int:
        """Payload bytes of checkpoints in RAM that some table holds."""
        return self._checkpoints.hot_bytes - self._checkpoints.evictable_bytes

    @property
    def num_hot(self) -> int:
        """Blocks whose payload is in RAM."""
        return self._num_hot

    def get(self, block_hash: BlockHash) -> CacheBlock | None:
        """The block of that hash, without taking a reference."""
        return self._index.get(block_hash)

    def allocate(self) -> CacheBlock:
        """Take an empty block with one reference, growing the pool or evicting if there is none.

        Raises:
            BlockPoolExhaustedError: `max_blocks` are all in use.
        """
        if not self._empty:
            self._grow(len(self._blocks))
        if not self._empty and not self.evict_least_recently_used():
            raise BlockPoolExhaustedError(
                f"all {len(self._blocks)} cache blocks are in use: allow more blocks, or run fewer or shorter "
                "requests at once"
            )
        block = self._empty.pop()
        block.ref_count = 1
        return block

    def acquire(self, block: CacheBlock) -> None:
        """Add a reference to a block that is in use or cached."""
        if block.ref_count == 0:
            self._remove_cached(block)
        block.ref_count += 1

    def release(self, block: CacheBlock) -> None:
        """Drop a reference. The last one makes the block cached if it can serve from RAM, else empty.

        Raises:
            CacheInvariantError: nobody holds the block.
        """
        if block.ref_count < 1:
            raise CacheInvariantError(f"block {block.block_id} is released once too often")
        block.ref_count -= 1
        if block.ref_count > 0:
            return
        if block.block_hash is not None and block.payload is not None:
            kind = self._kind(block)
            self._clock += 1
            block.released_at = self._clock
            kind.cached.append(block)
            kind.evictable_bytes += block.payload.size_bytes
        else:
            # What only the SSD has needs no record here: the next look-up registers it again.
            self._reset(block)

    def register(self, block: CacheBlock, block_hash: BlockHash, part: Part = ROWS) -> None:
        """Give a block in use its identity, so that others find it.

        Raises:
            CacheInvariantError: it has one already, or another block has this one.
        """
        if block.ref_count < 1 or block.block_hash is not None or block_hash in self._index:
            raise CacheInvariantError(f"block {block.block_id} can't be registered as {block_hash.hex()}")
        block.block_hash = block_hash
        block.part = part
        self._index[block_hash] = block

    def attach(self, block: CacheBlock, payload: BlockPayload) -> None:
        """Put a payload into a block that is registered and has none.

        Raises:
            CacheInvariantError: it isn't, or has one.
        """
        if block.block_hash is None:
            raise CacheInvariantError(f"block {block.block_id} is given a payload before its hash")
        if block.payload is not None:
            raise CacheInvariantError(f"block {block.block_id} has a payload already")
        block.payload = payload
        self._kind(block).hot_bytes += payload.size_bytes
        self._num_hot += 1

    def eviction_order(self) -> Iterator[CacheBlock]:
        """The cached blocks, least recently used first."""
        return heapq.merge(self._checkpoints.cached, self._others.cached, key=_released_at)

    def evict_least_recently_used(self) -> bool:
        """Empty the least recently used cached block; False if there is none."""
        checkpoint, other = self._checkpoints.cached.front, self._others.cached.front
        if checkpoint is None or (other is not None and other.released_at < checkpoint.released_at):
            return self._evict(other)
        return self._evict(checkpoint)

    def evict_checkpoint(self) -> bool:
        """Empty the least recently used cached checkpoint; False if there is none."""
        return self._evict(self._checkpoints.cached.front)

    def _evict(self, block: CacheBlock | None) -> bool:
        if block is None:
            return False
        self._remove_cached(block)
        self.num_evictions += 1
        self._reset(block)
        return True

    def _kind(self, block: CacheBlock) -> _Kind:
        return self._checkpoints if block.part == CHECKPOINT else self._others

    def _remove_cached(self, block: CacheBlock) -> None:
        kind = self._kind(block)
        kind.cached.remove(block)
        kind.evictable_bytes -= block.payload.size_bytes if block.payload else 0

    def _grow(self, num_blocks: int) -> None:
        if self._max_blocks is not None:
            num_blocks = min(num_blocks, self._max_blocks - len(self._blocks))
        first = len(self._blocks)
        new = [CacheBlock(block_id=first + i) for i in range(num_blocks)]
        self._blocks.extend(new)
        self._empty.extend(reversed(new))

    def _reset(self, block: CacheBlock) -> None:
        if block.block_hash is not None:
            del self._index[block.block_hash]
            self._on_forget(block.block_hash)
        if block.payload is not None:
            self._kind(block).hot_bytes -= block.payload.size_bytes
            self._num_hot -= 1
        block.block_hash = block.payload = None
        block.num_tokens = 0
        self._empty.append(block)

    def check(self) -> None:
        """Verify every invariant of the pool; O(blocks), for tests.

        Raises:
            CacheInvariantError: naming what is broken.
        """
        cached = list(self.eviction_order())
        hot = [block for block in self._blocks if block.payload is not None]
        clock = [block.released_at for block in cached]
        conditions = {
            "free queue length": len(cached) == self.num_cached,
            "eviction order": clock == sorted(clock),
            "a cached block is held": all(block.ref_count == 0 for block in cached),
            "a cached block can't serve": all(block.block_hash and block.payload for block in cached),
            "an empty block carries something": all(
                block.ref_count == 0 and block.block_hash is None and block.payload is None for block in self._empty
            ),
            "a block is in two places": len({id(block) for block in [*cached, *self._empty]})
            == len(cached) + len(self._empty),
            "blocks in use": sum(block.ref_count > 0 for block in self._blocks) == self.num_in_use,
            "index": {block.block_hash: block for block in self._blocks if block.block_hash} == self._index,
            "hot blocks": len(hot) == self._num_hot,
        }
        for name, kind in (("checkpoints", self._checkpoints), ("others", self._others)):
            conditions |= {
                f"queue of {name}": all(self._kind(block) is kind for block in kind.cached),
                f"hot bytes of {name}": _size_bytes(block for block in hot if self._kind(block) is kind)
                == kind.hot_bytes,
                f"evictable bytes of {name}": _size_bytes(kind.cached) == kind.evictable_bytes,
            }
        broken = [name for name, holds in conditions.items() if not holds]
        if broken:
            raise CacheInvariantError(f"block pool: {', '.join(broken)}")


def _released_at(block: CacheBlock) -> int:
    return block.released_at


def _size_bytes(blocks: Iterable[CacheBlock]) -> int:
    return sum(block.payload.size_bytes for block in blocks if block.payload is not None)
