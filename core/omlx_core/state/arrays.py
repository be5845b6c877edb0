"""MLX arrays as block tensors, and back. Only the engine's MLX thread calls these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from omlx_core.mlx_backend import mx

import numpy as np

from omlx_core.cache.payload import BlockPayload, BlockTensor
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


def dtype_of(name: str) -> mx.Dtype:
    """MLX's element type of a safetensors name that `is_known_dtype`."""
    return _DTYPES[name]


def to_payloads(blocks: Sequence[Mapping[str, mx.array]]) -> list[BlockPayload]:
    """Make payloads of lazy arrays, evaluating all of them at once.

    Each array must own its buffer, or a block would keep the whole cache that it was cut from alive: pass copies
    (``mx.contiguous`` of a slice is one), never views.
    """
    # numpy and the buffer protocol have no bfloat16, so bytes are seen through a view of the same buffer.
    views = [{name: array.reshape(-1).view(mx.uint8) for name, array in arrays.items()} for arrays in blocks]
    mx.eval([list(arrays.values()) for arrays in blocks], [list(arrays.values()) for arrays in views])
    return [
        BlockPayload(
            {
                name: BlockTensor(
                    dtype=_NAMES[array.dtype],
                    shape=tuple(array.shape),
                    data=memoryview(seen[name]).toreadonly(),
                    array=array,
                )
                for name, array in arrays.items()
            }
        )
        for arrays, seen in zip(blocks, views, strict=True)
    ]


def with_arrays(payloads: Sequence[BlockPayload]) -> list[BlockPayload]:
    """The same payloads, each tensor with an MLX array; those that have one already are returned as they are.

    Bytes that were read from SSD are copied once, into MLX's memory; the read buffer is no longer referenced.
    """
    missing = [payload for payload in payloads if any(tensor.array is None for tensor in payload.tensors.values())]
    made = iter(to_payloads([_arrays_of(payload) for payload in missing]))
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
