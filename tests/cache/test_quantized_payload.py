"""Rows in eight bits: near what they were, and only where they may be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.quantized_payload import dequantize, quantize

rows = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4).map(lambda shape: (*shape, 32)),
    elements=st.floats(-6e4, 6e4, width=32),
)  # fmt: skip


def tensor(dtype, values):
    return BlockTensor(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8).data.toreadonly())


def as_float32(found):
    if found.dtype == "BF16":
        halves = np.frombuffer(found.data, np.uint16).reshape(found.shape)
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(found.data, {"F16": np.float16, "F32": np.float32}[found.dtype]).reshape(found.shape)


def stored_as(dtype, values):
    if dtype == "BF16":
        return tensor(dtype, (values.view(np.uint32) >> 16).astype(np.uint16))
    return tensor(dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype]))


@pytest.mark.parametrize(("dtype", "precision"), [("F32", 2**-23), ("F16", 2**-10), ("BF16", 2**-8)])
@given(values=rows)
def test_each_value_is_within_half_a_step_of_its_row(dtype, precision, values):
    given_tensor = stored_as(dtype, values)
    payload = BlockPayload({"0.keys": given_tensor})
    [found] = dequantize(quantize(payload)).tensors.values()
    exact = as_float32(given_tensor).astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (found.dtype, found.shape) == (dtype, values.shape)
    # Half a step, and the rounding of the scale and of the type.
    allowed = largest / 254 * (1 + 1e-4) + largest * precision + 1e-7
    assert np.all(np.abs(as_float32(found) - exact) <= allowed)


def test_sixteen_bit_rows_take_half_and_a_scale():
    payload = BlockPayload({"0.keys": stored_as("BF16", np.ones((1, 2, 16, 64), np.float32))})
    assert quantize(payload).size_bytes == payload.size_bytes // 2 + 2 * 16 * 4


@pytest.mark.parametrize(
    "kept",
    [
        tensor("U32", np.arange(64, dtype=np.uint32).reshape(1, 2, 32)),
        tensor("F32", np.ones((1, 2, 15), np.float32)),
        tensor("F32", np.full((1, 2, 32), np.nan, np.float32)),
        tensor("F16", np.full((1, 2, 32), np.inf, np.float16)),
        tensor("F32", np.float32(3).reshape(())),
    ],
    ids=["integers", "short rows", "not a number", "infinite", "no rows"],
)
def test_what_does_not_suit_stays_to_the_last_bit(kept):
    stored = quantize(BlockPayload({"0.x": kept}))
    assert stored.tensors == {"0.x": kept}
    assert dequantize(stored).tensors == {"0.x": kept}


def test_rows_of_zeros_stay_zeros():
    payload = BlockPayload({"0.keys": stored_as("F16", np.zeros((1, 1, 2, 16), np.float32))})
    assert bytes(dequantize(quantize(payload)).tensors["0.keys"].data) == bytes(payload.tensors["0.keys"].data)
