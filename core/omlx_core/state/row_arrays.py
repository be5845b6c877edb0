"""The arrays of a restored prefix, filled by writing to their memory: each block's rows go straight to their place.

Joining one array per block is a copy of everything, after the copy out of a file or of a block that stays in RAM. Here
that copy is the only one. It is made by several threads, since most of its time goes to the system's handing out
memory for the first time.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_int, c_size_t, c_void_p
from typing import cast

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockLayout, BlockPayload, TensorSpec
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import is_known_dtype

_MAX_THREADS = 4
_MIN_BYTES_PER_THREAD = 2 * 1024**2
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_MADV_HUGEPAGE = 14  # Linux's; Python's own `mmap.MADV_HUGEPAGE` isn't there on all builds


class RowArrays:
    """Arrays of shape ``[1, heads, capacity, size]`` for blocks of one layout: `RowBuffers`.

    Made and taken on the MLX thread; any thread may write to the places of different blocks meanwhile.

    Args:
        layout: what the tensors of each block are; see `fits`.
        block_size: tokens per block.
        capacity: rows to have memory for.
    """

    def __init__(self, layout: BlockLayout, block_size: int, capacity: int) -> None:
        self.layout = layout
        self._block_size = block_size
        self._capacity = capacity
        specs = {
            name: TensorSpec(
                spec.dtype,
                (*spec.shape[:2], capacity, *spec.shape[3:]),
                spec.size_bytes // block_size * capacity,
            )
            for name, spec in layout.items()
        }
        self._arrays = blank_arrays(specs)
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

    def segments(self, position: int, layout: BlockLayout) -> Sequence[memoryview] | None:
        """Where the rows of a block belong, per tensor and head; None for a block of another layout."""
        if layout != self.layout or (position + 1) * self._block_size > self._capacity:
            return None
        pieces = []
        for name, spec in layout.items():
            for line in self._lines.get(name, ()):
                start, stop = self._place(position, spec)
                pieces.append(line[start:stop].data)
        return pieces

    def fill(self, payloads: Mapping[int, BlockPayload], num_tokens: int) -> None:
        """Copy the blocks at these positions to their places, and put zeros behind the rows of `num_tokens` tokens.

        No read may be under way any more: what failed to be read is among what is zeroed. mlx-lm never attends to rows
        behind a cache's offset, but multiplies some with zeros, and a NaN would survive that.

        Raises:
            CacheInvariantError: a block is of another layout.
        """
        for position, payload in payloads.items():
            if payload.layout != self.layout:
                raise CacheInvariantError(f"block {position} is of another layout than the ones before it")

        def fill_one(name: str) -> None:
            lines, spec = self._lines[name], self.layout[name]
            for position, payload in payloads.items():
                start, stop = self._place(position, spec)
                rows = np.frombuffer(payload.tensors[name].data, np.uint8)
                lines[:, start:stop] = rows.reshape(len(lines), -1)
            lines[:, self._place(0, spec, num_tokens)[1] :] = 0

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

    def _place(self, position: int, spec: TensorSpec, num_tokens: int | None = None) -> tuple[int, int]:
        row_bytes = spec.size_bytes // (spec.shape[1] * self._block_size)
        start = position * self._block_size * row_bytes
        return start, start + (self._block_size if num_tokens is None else num_tokens) * row_bytes


def blank_arrays(specs: Mapping[str, TensorSpec]) -> dict[str, mx.array]:
    """Evaluated arrays with whatever is in their memory, to be written to.

    MLX has no call for that: its `empty` is its `zeros`, and to zero memory that is about to be filled costs more than
    filling it. So they are loaded, from a file that leaves the memory it is to read into as it is.
    """
    filled = {name: spec for name, spec in specs.items() if spec.size_bytes}
    arrays = dict(mx.load(_BlankFile(filled), format="safetensors", stream=mx.cpu)) if filled else {}
    arrays.update({name: mx.zeros(specs[name].shape) for name in specs.keys() - filled.keys()})
    mx.eval(list(arrays.values()))
    return arrays


class _BlankFile(io.RawIOBase):
    """A safetensors file of a header and no data, however much is asked for."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        entries, end = {}, 0
        for name, spec in specs.items():
            start, end = end, end + spec.size_bytes
            entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        self._head = len(text).to_bytes(8, "little") + text
        self._size_bytes = len(self._head) + end
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # MLX passes nothing else
        piece = self._head[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        if not piece:
            _prefer_huge_pages(buffer)
        self._position += len(buffer)
        return len(buffer)


def _prefer_huge_pages(memory: memoryview) -> None:
    """Ask for memory in large pages: each page that is touched for the first time costs a trip to the system."""
    if _madvise is None:
        return
    start = np.frombuffer(memory, np.uint8).ctypes.data
    first, last = -(-start // _PAGE_BYTES) * _PAGE_BYTES, (start + len(memory)) // _PAGE_BYTES * _PAGE_BYTES
    if first < last:
        _madvise(first, last - first, _MADV_HUGEPAGE)  # where it can't be had, nothing changes


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = CDLL(None).madvise
    madvise.argtypes = (c_void_p, c_size_t, c_int)
    return cast("Callable[[int, int, int], int]", madvise)


_madvise = _find_madvise()


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
