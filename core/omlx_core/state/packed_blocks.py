"""Blocks in a GPU's own memory: few large arrays, since each array there costs a kernel.

Tensors of equal shape and type are one array, those of rows of shape ``[tensors, heads, tokens, size]``. To cut eight
blocks out of 56 arrays of keys and values takes 64 kernels then and not 448, and to join them a handful.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockLayout, BlockPayload, BlockTensor, Place
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import DeviceCopy, dtype_of, is_known_dtype, joined_bytes, name_of
from omlx_core.state.cuda_memory import prefetch
from omlx_core.state.protocols import Arrays
from omlx_core.state.shared_memory import make_zeros

# MLX's kernels for strided copies reckon places in 32 bits (ml-explore/mlx#3836): beyond 2**31 elements of an array
# they read and write elsewhere.
_MAX_ELEMENTS = 2**30


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """The tensor of one name, among others: `BlockTensor.array` on a GPU."""

    packed: mx.array
    index: int

    def get(self) -> mx.array:
        """A view, whose first dimension is one."""
        return self.packed[self.index : self.index + 1]


class PackedCopies:
    """Copies blocks on the GPU, all that a step has filled at once.

    Args:
        arrays: of shape ``[1, heads, tokens, size]``. To be let go of before their cache is written to.
        num_tokens: how many of those are computed.
        are_written: the SSD tier will ask for their bytes.
    """

    def __init__(self, arrays: Arrays, num_tokens: int, *, are_written: bool) -> None:
        self._arrays = arrays
        self._num_tokens = num_tokens
        self._are_written = are_written
        self._blocks: dict[int, BlockPayload] = {}

    def copy(self, start: int, stop: int) -> BlockPayload:
        """The rows of tokens ``[start, stop)``; blocks of the same size that follow are copied with it."""
        if start not in self._blocks:
            self._copy_from(start, stop - start)
        return self._blocks.pop(start)

    def _copy_from(self, start: int, block_size: int) -> None:
        groups = _groups({name: (a.shape[1], a.shape[3], a.dtype) for name, a in self._arrays.items()})
        num_blocks = (self._num_tokens - start) // block_size
        for names in groups:
            _, heads, _, size = self._arrays[names[0]].shape
            num_blocks = min(num_blocks, _most_at_once(len(names) * heads * block_size * size))
        stop = start + num_blocks * block_size
        stacks = [mx.stack([self._arrays[name][0, :, start:stop] for name in names]) for names in groups]
        made: list[mx.array] = []
        for number in range(num_blocks):
            at = number * block_size
            packed = [mx.contiguous(stack[:, :, at : at + block_size]) for stack in stacks]
            seen = [array.reshape(-1).view(mx.uint8) for array in packed]
            copy = joined_bytes(seen) if self._are_written and seen else None
            self._blocks[start + at] = _payload(groups, packed, seen, copy)
            made += [*packed, *seen, *([] if copy is None else [copy])]
        mx.async_eval(made)


class PackedBlocks:
    """Memory that the GPU and the CPU share, for blocks to be read to, which are blocks in RAM afterwards:
    `BlockBuffers`.

    Made and taken on the MLX thread; any thread may write to different blocks meanwhile.

    Args:
        layouts: what the tensors of each block are, by its place; see `fits`.
    """

    def __init__(self, layouts: Mapping[Place, BlockLayout]) -> None:
        self._layouts = layouts
        # Grouped once for all blocks that share a layout.
        groups = {id(layout): _groups_of(layout) for layout in layouts.values()}
        self._groups = {place: groups[id(layout)] for place, layout in layouts.items()}
        sizes_bytes = {
            place: [sum(layout[name].size_bytes for name in names) for names in self._groups[place]]
            for place, layout in layouts.items()
        }
        zeros = iter(make_zeros([((size,), mx.uint8) for sizes in sizes_bytes.values() for size in sizes]))
        self._arrays = {place: list(itertools.islice(zeros, len(sizes))) for place, sizes in sizes_bytes.items()}
        self._bytes: dict[Place, list[np.ndarray]] = {}

    @staticmethod
    def fits(layout: BlockLayout) -> bool:
        """Whether tensors can be put one after the other along their first dimension, and there are any."""
        return bool(layout) and all(spec.shape[:1] == (1,) and is_known_dtype(spec.dtype) for spec in layout.values())

    def layout_of(self, place: Place) -> BlockLayout:
        """What the tensors of the block are that belongs there."""
        return self._layouts[place]

    def prepare(self, place: Place) -> None:
        """Wait for the memory of one block, while that of the next ones is being filled."""
        if place in self._arrays:
            mx.eval(self._arrays[place])
            self._bytes[place] = [
                np.asarray(memoryview(array)) if array.size else np.empty(0, np.uint8) for array in self._arrays[place]
            ]

    def segments(self, place: Place, layout: BlockLayout) -> Sequence[memoryview] | None:
        """Where the bytes of each tensor belong; None for a block of another layout or place."""
        if place not in self._bytes or layout != self._layouts[place]:
            return None
        segments: dict[str, memoryview] = {}
        for names, data in zip(self._groups[place], self._bytes[place], strict=True):
            end = 0
            for name in names:
                begin, end = end, end + layout[name].size_bytes
                segments[name] = data[begin:end].data
        return [segments[name] for name in layout]

    def complete(self, place: Place) -> None:
        """Send a block to the GPU while the next ones are being read."""
        for data in self._bytes[place]:
            prefetch(data)

    def take(self, place: Place) -> BlockPayload:
        """A block that was read."""
        self._bytes.pop(place)
        groups, seen = self._groups[place], self._arrays.pop(place)
        packed = []
        for names, array in zip(groups, seen, strict=True):
            spec = self._layouts[place][names[0]]
            packed.append(array.view(dtype_of(spec.dtype)).reshape(len(names), *spec.shape[1:]))
        return _payload(groups, packed, seen, None)


def join_packed(payloads: Sequence[BlockPayload], capacity: int) -> dict[str, mx.array] | None:
    """The rows of consecutive blocks, lazy, with room for `capacity` tokens; None if they aren't all packed.

    Raises:
        CacheInvariantError: a block is of another layout than the first.
    """
    if not all(isinstance(tensor.array, PackedTensor) for payload in payloads for tensor in payload.tensors.values()):
        return None
    for number, payload in enumerate(payloads):
        if payload.layout != payloads[0].layout:
            raise CacheInvariantError(f"block {number} is of another layout than the ones before it")
    arrays: dict[str, mx.array] = {}
    for names in _groups_of(payloads[0].layout):
        packed = [payload.tensors[names[0]].array.packed for payload in payloads]
        _, heads, block_size, size = packed[0].shape
        num_at_once = _most_at_once(heads * capacity * size)
        for at in range(0, len(names), num_at_once):
            some = names[at : at + num_at_once]
            room = mx.zeros((len(some), heads, capacity - len(packed) * block_size, size), packed[0].dtype)
            whole = mx.concatenate([*(array[at : at + num_at_once] for array in packed), room], axis=2)
            arrays.update({name: mx.contiguous(whole[index : index + 1]) for index, name in enumerate(some)})
    return arrays


def _most_at_once(num_elements: int) -> int:
    """How many pieces of so many elements one array may have; never less than one."""
    return max(1, _MAX_ELEMENTS // max(1, num_elements))


def _groups_of(layout: BlockLayout) -> list[list[str]]:
    return _groups({name: (spec.shape[1:], spec.dtype) for name, spec in layout.items()})


def _groups(kinds: Mapping[str, Hashable]) -> list[list[str]]:
    """Names of one kind together, in order."""
    groups: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    return list(groups.values())


def _payload(
    groups: Sequence[Sequence[str]], packed: Sequence[mx.array], seen: Sequence[mx.array], copy: mx.array | None
) -> BlockPayload:
    """A block of packed arrays; `seen` are their bytes, and `copy` all of these in memory of their own."""
    tensors: dict[str, BlockTensor] = {}
    copy_start = 0
    for names, array, whole in zip(groups, packed, seen, strict=True):
        shape = (1, *array.shape[1:])
        size_bytes = whole.nbytes // len(names)
        for index, name in enumerate(names):
            source = DeviceCopy(whole, index * size_bytes, size_bytes, copy, copy_start + index * size_bytes)
            tensors[name] = BlockTensor(name_of(array.dtype), shape, source, PackedTensor(array, index))
        copy_start += whole.nbytes
    return BlockPayload(tensors)
