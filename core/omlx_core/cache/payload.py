"""What a block carries: named tensors, opaque to the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One immutable tensor of a block.

    Attributes:
        dtype: the safetensors name of the element type, such as ``"BF16"``.
        shape: its shape.
        data: its elements, C-contiguous, little-endian; a read-only view of bytes (``format == "B"``).
        array: the same elements as the state layer's own array type, if it made one. The cache never looks
            inside; it keeps a RAM hit from paying for a conversion.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    array: Any = field(default=None, compare=False, repr=False)

    @property
    def size_bytes(self) -> int:
        """Size of the elements in bytes."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class BlockPayload:
    """The tensors of one block, by name. Immutable, so that tiers and requests may share it.

    Attributes:
        tensors: the tensors.
        size_bytes: size of all elements in bytes; the unit of the hot tier's budget.
    """

    tensors: Mapping[str, BlockTensor]
    # Summed once: the pool adds and subtracts it with every step that a block takes.
    size_bytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size_bytes", sum(tensor.size_bytes for tensor in self.tensors.values()))
