"""MLX arrays as block tensors, and back. Only the engine's MLX thread calls these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockPayload, BlockTensor, DeviceBytes
from omlx_core.errors import CacheInvariantError

# Element types by their safetensors names: https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def is_known_dtype(name: str) -> bool:
    """Whether MLX has arrays of an element type."""
    return name in _DTYPES


def name_of(dtype: mx.Dtype) -> str:
    """The safetensors name of an element type."""
    return _NAMES[dtype]


def dtype_of(name: str) -> mx.Dtype:
    """MLX's element type of a safetensors name that `is_known_dtype`."""
    return _DTYPES[name]


class DeviceCopy:
    """The bytes of an array in a GPU's own memory: `DeviceBytes`.

    As soon as the CPU looks at such an array, MLX moves it to memory that both share, whose pages then travel back and
    forth. So what is to be written is a second array, made on the GPU, and the first stays where it is. It is one array
    for a whole block, since the GPU stops for each that is moved.

    Args:
        array: bytes on the device.
        start: where the elements begin there.
        size_bytes: how many bytes they take.
        copy: the same, among others, in memory of their own; None if they won't be written.
        copy_start: where they begin there.
    """

    def __init__(
        self, array: mx.array, start: int, size_bytes: int, copy: mx.array | None = None, copy_start: int = 0
    ) -> None:
        self._array = array
        self._start = start
        self._size_bytes = size_bytes
        self._copy = copy
        self._copy_start = copy_start

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self._size_bytes

    def view(self) -> memoryview:
        """The bytes, of the copy if it is still there."""
        copy = self._copy
        whole, start = (self._array, self._start) if copy is None else (copy, self._copy_start)
        return memoryview(whole).toreadonly()[start : start + self._size_bytes]

    def release(self) -> None:
        """Let go of the copy."""
        self._copy = None


def to_payloads(
    blocks: Sequence[Mapping[str, mx.array]], *, on_device: bool = False, are_written: bool = False
) -> list[BlockPayload]:
    """Make payloads of lazy arrays, evaluating all of them at once.

    Each array must own its buffer, or a block would keep the whole cache that it was cut from alive: pass copies
    (``mx.contiguous`` of a slice is one), never views.

    Args:
        blocks: the arrays of each block, by name.
        on_device: keep them in a GPU's own memory, and don't wait for them.
        are_written: the SSD tier will ask for their bytes.
    """
    # numpy and the buffer protocol have no bfloat16, so bytes are seen through a view of the same buffer.
    views = [{name: array.reshape(-1).view(mx.uint8) for name, array in arrays.items()} for arrays in blocks]
    sources: list[dict[str, memoryview | DeviceBytes]]
    if on_device:
        copies = [joined_bytes(list(each.values())) if are_written and each else None for each in views]
        made = [copy for copy in copies if copy is not None]
        mx.async_eval([list(each.values()) for each in blocks], [list(each.values()) for each in views], made)
        sources = []
        for each, copy in zip(views, copies, strict=True):
            starts = itertools.accumulate((seen.nbytes for seen in each.values()), initial=0)
            sources.append(
                {
                    name: DeviceCopy(seen, 0, seen.nbytes, copy, start)
                    for (name, seen), start in zip(each.items(), starts, strict=False)
                }
            )
    else:
        mx.eval([list(arrays.values()) for arrays in blocks], [list(arrays.values()) for arrays in views])
        sources = [{name: memoryview(seen).toreadonly() for name, seen in each.items()} for each in views]
    return [
        BlockPayload(
            {
                name: BlockTensor(name_of(array.dtype), tuple(array.shape), source[name], array)
                for name, array in arrays.items()
            }
        )
        for arrays, source in zip(blocks, sources, strict=True)
    ]


def joined_bytes(views: list[mx.array]) -> mx.array:
    """Arrays of bytes one after the other, lazy, in memory of their own."""
    return mx.concatenate(views) if len(views) > 1 else views[0] + mx.array(0, mx.uint8)


def with_arrays(payloads: Sequence[BlockPayload], *, on_device: bool = False) -> list[BlockPayload]:
    """The same payloads, each tensor with an MLX array; those that have one already are returned as they are.

    Bytes that were read from SSD are copied once, into MLX's memory; the read buffer is no longer referenced.
    """
    missing = [payload for payload in payloads if any(tensor.array is None for tensor in payload.tensors.values())]
    made = iter(to_payloads([_arrays_of(payload) for payload in missing], on_device=on_device))
    pending = {id(payload) for payload in missing}
    return [next(made) if id(payload) in pending else payload for payload in payloads]


def _arrays_of(payload: BlockPayload) -> dict[str, mx.array]:
    return {name: _array_of(tensor) for name, tensor in payload.tensors.items()}


def _array_of(tensor: BlockTensor) -> mx.array:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or tensor.size_bytes != math.prod(tensor.shape) * dtype.size:
        raise CacheInvariantError(f"{tensor.size_bytes} bytes are no {tensor.dtype} tensor of shape {tensor.shape}")
    if not tensor.size_bytes:
        return mx.zeros(tensor.shape, dtype)
    return mx.array(np.frombuffer(tensor.data, np.uint8)).view(dtype).reshape(tensor.shape)
