"""Blocks copied out of the arrays that hold the rows of all tokens so far; `RowArrays` is the way back."""

from __future__ import annotations

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.state.arrays import name_of
from omlx_core.state.protocols import Arrays


class RowCopies:
    """Copies blocks by the CPU, each to one piece of memory.

    A block per array, as MLX would make them, are many small allocations, each of whose pages is touched for the first
    time; of a large one the system makes a few huge pages.

    Args:
        arrays: of shape ``[1, heads, tokens, size]``, evaluated or not. To be let go of before their cache is written
            to: while a view is alive, MLX copies the whole array for that.
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        # As bytes: numpy has no bfloat16.
        seen = {name: array.view(mx.uint8) for name, array in arrays.items() if array.size}
        mx.eval(seen)
        self._rows: dict[str, np.ndarray] = {
            name: np.asarray(memoryview(seen[name]))[0] if name in seen else np.empty((*array.shape[1:3], 0), np.uint8)
            for name, array in arrays.items()
        }

    def copy(self, start: int, stop: int) -> BlockPayload:
        """The rows of tokens ``[start, stop)``."""
        pieces = {name: rows[:, start:stop] for name, rows in self._rows.items()}
        buffer = np.empty(sum(piece.nbytes for piece in pieces.values()), np.uint8)
        data, tensors, end = buffer.data.toreadonly(), {}, 0
        for name, piece in pieces.items():
            begin, end = end, end + piece.nbytes
            buffer[begin:end].reshape(piece.shape)[...] = piece
            array = self._arrays[name]
            shape = (1, array.shape[1], stop - start, array.shape[3])
            tensors[name] = BlockTensor(name_of(array.dtype), shape, data[begin:end])
        return BlockPayload(tensors)
