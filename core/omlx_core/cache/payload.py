"""What a block carries: named tensors, opaque to the cache."""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a block's tensor is, without its elements.

    Attributes:
        dtype: the safetensors name of the element type, such as ``"BF16"``.
        shape: its shape.
        size_bytes: size of the elements in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


BlockLayout = Mapping[str, TensorSpec]
"""The tensors of a block, by name."""


def layout_size_bytes(layout: BlockLayout) -> int:
    """Size of all elements of a block in bytes."""
    return sum(spec.size_bytes for spec in layout.values())


class DeviceBytes(Protocol):
    """Elements in the memory of a device, whose bytes take time to be had."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        ...

    def view(self) -> memoryview:
        """The bytes, read-only. Any thread may ask."""
        ...

    def release(self) -> None:
        """Let go of a copy that was made to be written; `view` still works, and takes longer."""
        ...


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One immutable tensor of a block.

    Attributes:
        dtype: the safetensors name of the element type, such as ``"BF16"``.
        shape: its shape.
        source: its elements, C-contiguous, little-endian; a read-only view of bytes (``format == "B"``), or what gives
            one.
        array: the same elements as the state layer's own array type, if it made one. The cache never looks
            inside; it keeps a RAM hit from paying for a conversion.
    """

    dtype: str
    shape: tuple[int, ...]
    source: memoryview | DeviceBytes
    array: Any = field(default=None, compare=False, repr=False)

    @property
    def data(self) -> memoryview:
        """Its elements as bytes."""
        return self.source if isinstance(self.source, memoryview) else self.source.view()

    @property
    def size_bytes(self) -> int:
        """Size of the elements in bytes."""
        return self.source.nbytes

    @property
    def spec(self) -> TensorSpec:
        """What it is."""
        return _spec_of(self.dtype, self.shape, self.size_bytes)


# One object for equal ones: of hundreds of blocks, all of whose layouts are compared, each has dozens.
@functools.lru_cache(maxsize=4096)
def _spec_of(dtype: str, shape: tuple[int, ...], size_bytes: int) -> TensorSpec:
    return TensorSpec(dtype, shape, size_bytes)


@dataclass(frozen=True, slots=True)
class BlockPayload:
    """The tensors of one block, by name. Immutable, so that tiers and requests may share it.

    Attributes:
        tensors: the tensors.
        layout: what they are.
        size_bytes: size of all elements in bytes; the unit of the hot tier's budget.
    """

    tensors: Mapping[str, BlockTensor]
    # Made once: the pool adds and subtracts sizes with every step that a block takes, and restores compare layouts.
    layout: BlockLayout = field(init=False, compare=False, repr=False)
    size_bytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", {name: tensor.spec for name, tensor in self.tensors.items()})
        object.__setattr__(self, "size_bytes", layout_size_bytes(self.layout))

    def release_copies(self) -> None:
        """Let go of what was copied to be written, once it is or can't be."""
        for tensor in self.tensors.values():
            if not isinstance(tensor.source, memoryview):
                tensor.source.release()


Place = Hashable
"""What of a prefix a block is: the position of its rows, or the key of another part."""


class BlockBuffers(Protocol):
    """Memory in which what is read of a prefix is put, each block at its final place."""

    def layout_of(self, place: Place) -> BlockLayout:
        """What the tensors of the block are that belongs there."""
        ...

    def prepare(self, place: Place) -> None:
        """Have the memory of a block ready to be written to. Called by the thread that made this, before its read."""
        ...

    def segments(self, place: Place, layout: BlockLayout) -> Sequence[memoryview] | None:
        """Where the bytes of a block's tensors belong: writable, in the order of `layout` and of their elements.

        None if a block of that layout has no place there. Any thread may ask, and write.
        """
        ...

    def complete(self, place: Place) -> None:
        """A block's bytes are all there, and proven. Called by the thread that read them."""
        ...


class InPlace(enum.Enum):
    """Says that a block's content is in `BlockBuffers` already."""

    IN_PLACE = "in place"


LoadedBlock = BlockPayload | InPlace
"""The content of a block, by itself or put in its place."""
