"""Prefixes put together by writing to the memory of MLX arrays: same bits, nothing stale, nothing shared."""

from omlx_core.mlx_backend import mx

import numpy as np
import pytest
from filled_layers import BLOCK_SIZE, bits, capture, filled_layer
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import CacheList

from omlx_core.cache.parts import PrefixContent
from omlx_core.cache.payload import BlockPayload, BlockTensor, InPlace
from omlx_core.errors import CacheInvariantError
from omlx_core.state import row_arrays
from omlx_core.state.arrays import to_payloads
from omlx_core.state.prompt_state import PromptStateCodec
from omlx_core.state.quantized import KVQuantization, QuantizedHandler
from omlx_core.state.row_arrays import RowArrays

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def read_to(buffers, position, payload):
    """What the SSD tier does with a block: its bytes, piece by piece."""
    data = b"".join(tensor.data for tensor in payload.tensors.values())
    for piece in buffers.segments(position, payload.layout):
        piece[:], data = data[: len(piece)], data[len(piece) :]
    assert not data


@pytest.fixture
def stale_memory(monkeypatch):
    """Places full of NaNs, as reads that failed may leave them."""
    make = row_arrays.RowArrays.__init__

    def make_stale(self, *args):
        make(self, *args)
        for lines in self._lines.values():
            lines[...] = 0xFF

    monkeypatch.setattr(row_arrays.RowArrays, "__init__", make_stale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_hot_and_cold_blocks_come_together_bit_for_bit(dtype, num_threads, monkeypatch, stale_memory):
    monkeypatch.setattr(row_arrays, "_MIN_BYTES_PER_THREAD", 1 if num_threads > 1 else 2**30)
    monkeypatch.setattr(row_arrays.os, "cpu_count", lambda: num_threads)
    layers = [filled_layer(80, dtype=dtype, seed=i, value_dim=4) for i in range(3)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 5)
    buffers = codec.allocate({0: payloads[0].layout}, capacity=100)
    for position in (1, 4):
        read_to(buffers, position, payloads[position])
    rows = [InPlace.IN_PLACE if position in (1, 4) else payload for position, payload in enumerate(payloads)]
    restored, content = codec.restore(PrefixContent(rows, {}, buffers), num_tokens=80, capacity=100)
    assert content.in_place == [1, 4]
    for layer, original in zip(restored, layers, strict=True):
        assert layer.offset == 80
        for array, expected in zip(layer.keys_and_values(), original.keys_and_values(), strict=True):
            assert array.dtype == dtype
            assert bits(array) == bits(expected[..., :80, :])


def test_composed_layers_and_layers_without_elements_are_put_together():
    layers = [CacheList(filled_layer(32), filled_layer(32, seed=5, value_dim=0)), filled_layer(32, heads=1, seed=9)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 2)
    buffers = codec.allocate({0: payloads[0].layout}, capacity=33)
    for position, payload in enumerate(payloads):
        read_to(buffers, position, payload)
    restored, _ = codec.restore(PrefixContent([InPlace.IN_PLACE] * 2, {}, buffers), num_tokens=32, capacity=33)
    found = [*restored[0].caches, restored[1]]
    for layer, original in zip(found, [*layers[0].caches, layers[1]], strict=True):
        assert [bits(array) for array in layer.keys_and_values()] == [
            bits(array[..., :32, :]) for array in original.keys_and_values()
        ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_in_memory_never_reaches_attention(dtype, stale_memory):
    layers = [filled_layer(48, dtype=dtype)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 3)
    buffers = codec.allocate({0: payloads[0].layout}, capacity=300)
    read_to(buffers, 0, payloads[0])
    # The second block came and went, as one that was found damaged after it had been read.
    buffers.segments(1, payloads[1].layout)[0][:] = b"\xff" * len(buffers.segments(1, payloads[1].layout)[0])
    [layer], _ = codec.restore(PrefixContent([InPlace.IN_PLACE], {}, buffers), num_tokens=16, capacity=300)
    for array in (layer.keys, layer.values):
        assert array.shape[2] == 512
        assert not np.any(np.asarray(memoryview(mx.contiguous(array[..., 16:, :]).view(mx.uint8))))
    # Even where a model attends to all the room there is, and masks it.
    queries = mx.ones((1, 2, 1, 8), dtype)
    mask = mx.where(mx.arange(512) < 16, 0.0, -1e4).astype(dtype)
    masked = scaled_dot_product_attention(queries, layer.keys, layer.values, cache=None, scale=1.0, mask=mask)
    assert mx.all(mx.isfinite(masked)).item()


def test_two_restores_of_one_hot_block_share_nothing_with_it_or_each_other():
    layers = [filled_layer(32)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 2)
    stored = [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()]
    first, second = (codec.restore(PrefixContent(payloads, {}), num_tokens=32, capacity=40)[0][0] for _ in range(2))
    expected = bits(second.keys)
    first.trim(BLOCK_SIZE)
    first.update_and_fetch(mx.full((1, 2, 20, 8), 7.0), mx.full((1, 2, 20, 8), 7.0))
    mx.eval(first.state)
    np.asarray(memoryview(first.keys))[...] = 9.0
    assert bits(second.keys) == expected
    assert [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()] == stored


def test_the_first_tokens_after_a_restore_are_written_without_a_copy_of_the_rest():
    layers = [filled_layer(4096, heads=4, dim=64, value_dim=64)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 256)
    buffers = codec.allocate({0: payloads[0].layout}, capacity=4200)
    for position, payload in enumerate(payloads):
        read_to(buffers, position, payload)
    [layer], _ = codec.restore(PrefixContent([InPlace.IN_PLACE] * 256, {}, buffers), num_tokens=4096, capacity=4200)
    before = [memoryview(array) for array in (layer.keys, layer.values)]
    addresses = [np.asarray(view).ctypes.data for view in before]
    del before
    layer.update_and_fetch(mx.ones((1, 4, 8, 64)), mx.ones((1, 4, 8, 64)))
    mx.eval(layer.keys, layer.values)
    assert [np.asarray(memoryview(array)).ctypes.data for array in (layer.keys, layer.values)] == addresses


def test_blocks_of_another_layout_have_no_place():
    layers = [filled_layer(32)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    [payload] = capture(codec, layers, 1)
    buffers = codec.allocate({0: payload.layout}, capacity=40)
    [other] = capture(PromptStateCodec(layers, BLOCK_SIZE), [filled_layer(32, dtype=mx.float16)], 1)
    assert buffers.segments(0, other.layout) is None
    assert buffers.segments(16, payload.layout) is None  # behind the 256 rows that there are
    read_to(buffers, 0, payload)
    rows = [InPlace.IN_PLACE, other]
    with pytest.raises(CacheInvariantError, match="block 1 is of another layout"):
        codec.restore(PrefixContent(rows, {}, buffers), num_tokens=32, capacity=40)


def seen(tensor):
    return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)


def test_rows_are_joined_where_they_can_not_be_put_in_place(monkeypatch):
    layers = [filled_layer(32)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    [payload, _] = payloads = capture(codec, layers, 2)
    quantized = QuantizedHandler(KVQuantization(bits=8, group_size=32, start_tokens=1024))
    joining = PromptStateCodec(layers, BLOCK_SIZE, find=lambda _: quantized)
    assert joining.allocate({0: payload.layout}, capacity=40) is None
    odd = BlockPayload({"0.keys": BlockTensor("F32", (2,), memoryview(bytes(8)))})
    assert codec.allocate({0: odd.layout}, capacity=40) is None
    monkeypatch.setattr(RowArrays, "fits", lambda *_: False)
    blocks = to_payloads([{name: mx.array(seen(each)) for name, each in p.tensors.items()} for p in payloads])
    [joined], _ = codec.restore(PrefixContent(blocks, {}), num_tokens=32, capacity=40)
    monkeypatch.undo()
    [filled], _ = codec.restore(PrefixContent(payloads, {}), num_tokens=32, capacity=40)
    assert bits(joined.keys) == bits(filled.keys)


def test_places_are_not_writable_through_views_once_the_arrays_are_taken():
    arrays = RowArrays({"0.keys": BlockTensor("F32", (1, 1, 16, 2), memoryview(bytes(128))).spec}, BLOCK_SIZE, 32)
    assert len(arrays.segments(0, arrays.layout_of(0))) == 1
    arrays.take()
    assert arrays.segments(0, arrays.layout_of(0)) == []
