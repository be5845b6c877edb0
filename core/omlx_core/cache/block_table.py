"""A sequence's blocks, in order."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.block_pool import CacheBlock
from omlx_core.cache.parts import PartKey


@dataclass(eq=False, slots=True)
class BlockTable:
    """The blocks that hold one sequence, in order.

    Every block but the last is full. Blocks before `num_committed` are published under their chain hash; the ones
    after it belong to this sequence alone or to its forks.

    Attributes:
        extra_keys: what besides tokens is hashed, such as a cache salt.
        tokens: the tokens of each of `blocks`, of type uint32. Full ones are shared with forks, and never changed.
        blocks: the blocks, each held by one reference of this table.
        num_committed: how many leading blocks are published.
        num_saved: how many leading blocks the SSD tier has, or has taken in hand; `TieredCache` keeps count.
        parts: windows and checkpoints of published blocks, each held by one reference of this table.
        unsaved_parts: those that the SSD tier may lack; `TieredCache` keeps the set.
    """

    extra_keys: tuple[str, ...] = ()
    tokens: list[array[int]] = field(default_factory=list)
    blocks: list[CacheBlock] = field(default_factory=list)
    num_committed: int = 0
    num_saved: int = 0
    parts: dict[PartKey, CacheBlock] = field(default_factory=dict)
    unsaved_parts: set[PartKey] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        """Tokens covered."""
        return (len(self.tokens) - 1) * len(self.tokens[0]) + len(self.tokens[-1]) if self.tokens else 0

    @property
    def token_ids(self) -> list[int]:
        """The tokens covered by `blocks`."""
        return list(itertools.chain.from_iterable(self.tokens))


@dataclass(frozen=True, slots=True)
class FullBlock:
    """A block that has filled and waits to be published.

    Attributes:
        position: its index in the table.
        block_hash: the chain hash that it will have.
        parent_hash: the preceding block's hash; None for the first.
        token_ids: its tokens.
    """

    position: int
    block_hash: BlockHash
    parent_hash: BlockHash | None
    token_ids: tuple[int, ...]
