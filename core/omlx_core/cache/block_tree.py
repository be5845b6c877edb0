"""Which blocks follow which: the chains of the hot tier, walked from a block to the ones behind it.

A chain hash leads from a prompt to its blocks. The other way round, from a block to the prompts that go on from it,
needs this index. It is in step with the pool: a block is in it from its publication until its record is emptied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omlx_core.cache.block_hash import BlockHash, NamespaceHash

_Place = tuple[BlockHash | NamespaceHash, tuple[str, ...]]


class ChildBlock(NamedTuple):
    """A block that follows another one.

    Attributes:
        block_hash: its name.
        token_ids: its tokens, of type uint32.
    """

    block_hash: BlockHash
    token_ids: npt.NDArray[np.uint32]


class BlockTree:
    """The published blocks by what they follow; every operation is O(1), but for the children that it lists.

    Takes 4 bytes for each token of a block. Not thread-safe: `PagedCacheManager` holds the lock.
    """

    def __init__(self) -> None:
        self._children: dict[_Place, dict[BlockHash, npt.NDArray[np.uint32]]] = {}
        self._places: dict[BlockHash, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(
        self,
        parent: BlockHash | NamespaceHash,
        extra_keys: tuple[str, ...],
        block_hash: BlockHash,
        token_ids: Sequence[int],
    ) -> None:
        """Add a block; one that is there already stays as it is.

        Args:
            parent: the block before it, or the namespace.
            extra_keys: what it was stored under besides tokens; who asks for others doesn't see it.
            block_hash: its name.
            token_ids: its tokens.
        """
        if block_hash not in self._places:
            self._places[block_hash] = place = (parent, extra_keys)
            self._children.setdefault(place, {})[block_hash] = np.asarray(token_ids, np.uint32)

    def discard(self, block_hash: BlockHash) -> None:
        """Forget a block, if it is known; what follows it stays until it is forgotten itself."""
        place = self._places.pop(block_hash, None)
        if place is None:
            return
        siblings = self._children[place]
        del siblings[block_hash]
        if not siblings:
            del self._children[place]

    def children(self, parent: BlockHash | NamespaceHash, extra_keys: tuple[str, ...], limit: int) -> list[ChildBlock]:
        """The blocks that follow one, the latest published first, `limit` at the most."""
        siblings = self._children.get((parent, extra_keys), {})
        latest = [block_hash for block_hash, _ in zip(reversed(siblings), range(limit), strict=False)]
        return [ChildBlock(block_hash, siblings[block_hash]) for block_hash in latest]

    def block_hashes(self) -> list[BlockHash]:
        """The blocks that are in it."""
        return list(self._places)

    def clear(self) -> None:
        """Forget all."""
        self._children.clear()
        self._places.clear()
