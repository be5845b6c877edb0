"""The arrays of a restored prefix, filled by writing to their memory: each block's rows go straight to their place.

Joining one array per block is a copy of everything, after the copy out of a file or of a block that stays in RAM. Here
that copy is the only one, and is made by several threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockLayout, BlockPayload, Place, TensorSpec
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import dtype_of, is_known_dtype
from omlx_core.state.shared_memory import make_zeros

_MAX_THREADS = 4
_MIN_BYTES_PER_THREAD = 2 * 1024**2


class RowArrays:
    """Arrays of shape ``[1, heads, capacity, size]`` for blocks of one layout: `BlockBuffers`.

    Made and taken on the MLX thread; any thread may write to the places of different blocks meanwhile.

    Args:
        layout: what the tensors of each block are; see `fits`.
        block_size: tokens per block.
        capacity: rows to have memory for.
    """

    def __init__(self, layout: BlockLayout, block_size: int, capacity: int) -> None:
        self._layout = layout
        self._block_size = block_size
        self._capacity = capacity
        specs = [((*spec.shape[:2], capacity, *spec.shape[3:]), dtype_of(spec.dtype)) for spec in layout.values()]
        self._arrays = dict(zip(layout, make_zeros(specs), strict=True))
        mx.eval(self._arrays)
        # As bytes, one line per head: numpy has no bfloat16. These are views of the arrays' memory that keep it alive.
        self._lines = {
            name: np.asarray(memoryview(array.view(mx.uint8))).reshape(array.shape[1], -1)
            for name, array in self._arrays.items()
            if array.size
        }

    @staticmethod
    def fits(layout: BlockLayout, block_size: int) -> bool:
        """Whether blocks of a layout have rows that can be put one after the other."""
        return all(
            len(spec.shape) == 4 and spec.shape[0] == 1 and spec.shape[2] == block_size and is_known_dtype(spec.dtype)
            for spec in layout.values()
        )

    def layout_of(self, place: Place) -> BlockLayout:
        """That of all rows."""
        del place
        return self._layout

    def prepare(self, place: Place) -> None:
        """All memory is there: each array has a part of every block."""

    def segments(self, place: Place, layout: BlockLayout) -> Sequence[memoryview] | None:
        """Where the rows of a block belong, per tensor and head; None for other parts, and for another layout."""
        if not isinstance(place, int) or layout != self._layout or (place + 1) * self._block_size > self._capacity:
            return None
        pieces = []
        for name, spec in layout.items():
            for line in self._lines.get(name, ()):
                start, stop = self._range(place, spec)
                pieces.append(line[start:stop].data)
        return pieces

    def complete(self, place: Place) -> None:
        """It is where it will be used."""

    def fill(self, payloads: Mapping[int, BlockPayload], num_tokens: int) -> None:
        """Copy the blocks at these positions to their places, and put zeros behind the rows of `num_tokens` tokens.

        No read may be under way any more: what failed to be read is among what is zeroed. mlx-lm never attends to rows
        behind a cache's offset, but multiplies some with zeros, and a NaN would survive that.

        Raises:
            CacheInvariantError: a block is of another layout.
        """
        for position, payload in payloads.items():
            if payload.layout != self._layout:
                raise CacheInvariantError(f"block {position} is of another layout than the ones before it")

        def fill_one(name: str) -> None:
            lines, spec = self._lines[name], self._layout[name]
            for position, payload in payloads.items():
                start, stop = self._range(position, spec)
                rows = np.frombuffer(payload.tensors[name].data, np.uint8)
                lines[:, start:stop] = rows.reshape(len(lines), -1)
            lines[:, self._range(0, spec, num_tokens)[1] :] = 0

        num_bytes = sum(payload.size_bytes for payload in payloads.values())
        num_bytes += (
            sum(lines.nbytes for lines in self._lines.values()) // self._capacity * (self._capacity - num_tokens)
        )
        _for_each(fill_one, self._lines, num_bytes)

    def take(self) -> dict[str, mx.array]:
        """The arrays. Nothing can be written by way of this object any more: a view would have MLX copy an array as
        soon as it is changed."""
        self._lines = {}
        arrays, self._arrays = self._arrays, {}
        return arrays

    def _range(self, position: int, spec: TensorSpec, num_tokens: int | None = None) -> tuple[int, int]:
        row_bytes = spec.size_bytes // (spec.shape[1] * self._block_size)
        start = position * self._block_size * row_bytes
        return start, start + (self._block_size if num_tokens is None else num_tokens) * row_bytes


def _for_each(action: Callable[[str], None], names: Iterable[str], size_bytes: int) -> None:
    """Do it for each name, on as many threads as the bytes are worth."""
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1, size_bytes // _MIN_BYTES_PER_THREAD)
    if num_threads < 2:
        for name in names:
            action(name)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="omlx-fill") as threads:
        for future in [threads.submit(action, name) for name in names]:
            future.result()
