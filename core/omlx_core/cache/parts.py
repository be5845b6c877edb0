"""The parts of a block that are kept beside its rows, each under a hash, with a file and an eviction of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.payload import BlockPayload

Part = NewType("Part", str)

WINDOW = Part("window")
"""The rows of sliding-window layers: needed only by a restore that ends within a window's length of them."""

CHECKPOINT = Part("checkpoint")
"""The state of recurrent layers at the end of the block: needed only by a restore that ends there."""

PARTS = (WINDOW, CHECKPOINT)


class PartKey(NamedTuple):
    """A part of the block at a position of a table."""

    position: int
    part: Part


def hash_part(block_hash: BlockHash, part: Part) -> BlockHash:
    """The name of a block's part; no chain hash equals it, since it hashes another number of bytes."""
    return BlockHash(hashlib.sha256(block_hash + b"/" + part.encode()).digest())


@dataclass(frozen=True, slots=True)
class PrefixContent:
    """What the blocks of a prefix hold.

    Attributes:
        rows: the rows of each block, in order.
        parts: the parts that a restore of these blocks needs.
    """

    rows: Sequence[BlockPayload]
    parts: Mapping[PartKey, BlockPayload]
