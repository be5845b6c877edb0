"""The parts of a block: its rows under its own hash, and beside them others under hashes of their own.

Each part is shared, written and evicted by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NewType

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.payload import BlockBuffers, BlockLayout, BlockPayload, LoadedBlock, layout_size_bytes

Part = NewType("Part", str)

ROWS = Part("rows")
"""The rows of the block's tokens: the block itself, which the next one of its chain follows."""

WINDOW = Part("window")
"""The rows of sliding-window layers: needed only by a restore that ends within a window's length of them."""

CHECKPOINT = Part("checkpoint")
"""The state of recurrent layers at the end of the block: needed only by a restore that ends there."""

PARTS = (WINDOW, CHECKPOINT)
"""What is kept beside the rows. Nothing follows them: they are leaves of their chain."""


class PartKey(NamedTuple):
    """One of `PARTS` of the block at a position of a table."""

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
        buffers: where that is which says ``IN_PLACE``.
    """

    rows: Sequence[LoadedBlock]
    parts: Mapping[PartKey, LoadedBlock]
    buffers: BlockBuffers | None = None

    @property
    def in_place(self) -> list[int]:
        """The positions whose rows are in `buffers`."""
        return [position for position, rows in enumerate(self.rows) if not isinstance(rows, BlockPayload)]

    @property
    def rows_layout(self) -> BlockLayout:
        """What the tensors of the rows in `buffers` are, which have one layout; empty if there are none."""
        return self.buffers.layout_of(self.in_place[0]) if self.buffers is not None and self.in_place else {}

    def size_bytes(self, start: int = 0, stop: int | None = None) -> int:
        """Size of the rows of some blocks in bytes."""
        in_place_bytes = layout_size_bytes(self.rows_layout)
        return sum(
            rows.size_bytes if isinstance(rows, BlockPayload) else in_place_bytes for rows in self.rows[start:stop]
        )
