"""Keeps what is in RAM within its limits.

Checkpoints have a share of the budget. One that would exceed it makes room among the checkpoints alone, so that a long
prompt's can't push out the rows of others; within the share all leave in one order, least recently used first.
Not thread-safe: `PagedCacheManager` holds the lock.
"""

from __future__ import annotations

from omlx_core.cache.block_pool import BlockPool
from omlx_core.cache.events import EventBus
from omlx_core.cache.parts import CHECKPOINT, Part
from omlx_core.errors import CacheInvariantError


class HotBudget:
    """Makes room in one pool.

    Args:
        pool: what is in RAM.
        max_bytes: most payload bytes there; None is no limit.
        checkpoint_share: the largest part of `max_bytes` that checkpoints may take, in (0, 1].
        events: where to tell of blocks evicted.
    """

    def __init__(self, pool: BlockPool, max_bytes: int | None, checkpoint_share: float, events: EventBus) -> None:
        self._pool = pool
        self._max_bytes = max_bytes
        self._max_checkpoint_bytes = None if max_bytes is None else int(max_bytes * checkpoint_share)
        self._events = events

    def can_fit(self, size_bytes: int, part: Part) -> bool:
        """Whether `size_bytes` more of that part would fit beside what is held."""
        if self._max_bytes is None:
            return True
        if self._pool.held_bytes + size_bytes > self._max_bytes:
            return False
        limit_bytes = self._max_checkpoint_bytes if part == CHECKPOINT else None
        return limit_bytes is None or self._pool.held_checkpoint_bytes + size_bytes <= limit_bytes

    def make_room(self, size_bytes: int, part: Part) -> bool:
        """Evict until `size_bytes` more of that part fit; False, and nothing is evicted, if they can't."""
        pool, max_bytes = self._pool, self._max_bytes
        if max_bytes is None:
            return True
        if not self.can_fit(size_bytes, part):
            return False
        max_checkpoint_bytes = self._max_checkpoint_bytes if part == CHECKPOINT else None
        num_blocks, before_bytes = 0, pool.hot_bytes
        if max_checkpoint_bytes is not None:
            while pool.checkpoint_bytes + size_bytes > max_checkpoint_bytes and pool.evict_checkpoint():
                num_blocks += 1
        while pool.hot_bytes + size_bytes > max_bytes and pool.evict_least_recently_used():
            num_blocks += 1
        self._events.publish("evict", "hot", num_blocks=num_blocks, size_bytes=before_bytes - pool.hot_bytes)
        return pool.hot_bytes + size_bytes <= max_bytes

    def check(self) -> None:
        """Verify the limits; for tests.

        Raises:
            CacheInvariantError: naming the one that is exceeded.
        """
        for what, size_bytes, limit_bytes in (
            ("", self._pool.hot_bytes, self._max_bytes),
            (" of checkpoints", self._pool.checkpoint_bytes, self._max_checkpoint_bytes),
        ):
            if limit_bytes is not None and size_bytes > limit_bytes:
                raise CacheInvariantError(f"{size_bytes} bytes{what} in RAM, of {limit_bytes}")
