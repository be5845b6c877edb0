"""Rows in eight bits, for an SSD tier that may be inexact: half the bytes of 16-bit rows, a quarter of 32-bit ones.

The values of each row, of one token and head, are multiples of a scale of their own, the 127th part of the largest of
them. What isn't floating point, or has a value that isn't finite, stays as it is; so do short rows, whose scales would
take what is saved.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from omlx_core.cache.payload import BlockPayload, BlockTensor

_MIN_ROW = 16
_LARGEST = 127
_MARK = "@"
_SCALES = f"{_MARK}scale"
_FLOATS: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def quantize(payload: BlockPayload) -> BlockPayload:
    """A payload whose floating-point tensors are two each: ``NAME@DTYPE`` of eight bits, and ``NAME@scale``."""
    tensors: dict[str, BlockTensor] = {}
    for name, tensor in payload.tensors.items():
        values = _to_float32(tensor) if tensor.shape and tensor.shape[-1] >= _MIN_ROW else None
        if values is None or not np.isfinite(values).all():
            tensors[name] = tensor
            continue
        scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(_LARGEST)
        scales[scales == 0] = 1
        tensors[f"{name}{_MARK}{tensor.dtype}"] = _tensor("I8", np.rint(values / scales).astype(np.int8))
        tensors[f"{name}{_SCALES}"] = _tensor("F32", scales)
    return BlockPayload(tensors)


def dequantize(payload: BlockPayload) -> BlockPayload:
    """What `quantize` was given, near enough: each value is off by half of its row's scale at the most."""
    tensors: dict[str, BlockTensor] = {}
    for stored, tensor in payload.tensors.items():
        name, mark, dtype = stored.rpartition(_MARK)
        if not mark:
            tensors[stored] = tensor
        elif stored != name + _SCALES:
            scales = payload.tensors[name + _SCALES]
            values = np.frombuffer(tensor.data, np.int8).reshape(tensor.shape).astype(np.float32)
            values *= np.frombuffer(scales.data, "<f4").reshape(scales.shape)
            tensors[name] = _from_float32(dtype, values)
    return BlockPayload(tensors)


def _to_float32(tensor: BlockTensor) -> np.ndarray | None:
    if tensor.dtype == "BF16":  # numpy has none: it is the upper half of a float32
        halves = np.frombuffer(tensor.data, "<u2").reshape(tensor.shape)
        return (halves.astype(np.uint32) << 16).view(np.float32)
    dtype = _FLOATS.get(tensor.dtype)
    return None if dtype is None else np.frombuffer(tensor.data, dtype).reshape(tensor.shape).astype(np.float32)


def _from_float32(dtype: str, values: np.ndarray) -> BlockTensor:
    if dtype != "BF16":
        return _tensor(dtype, values.astype(_FLOATS[dtype]))
    bits = values.view(np.uint32)
    to_even = 0x7FFF + ((bits >> 16) & 1)
    return _tensor(dtype, ((bits + to_even) >> 16).astype("<u2"))


def _tensor(dtype: str, values: np.ndarray) -> BlockTensor:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data.toreadonly()
    return BlockTensor(dtype, values.shape, data)
