"""Blocks as few large arrays, for a GPU with memory of its own: the same bits, cut out, read and joined."""

from omlx_core.mlx_backend import mx

import pytest
from filled_layers import BLOCK_SIZE, bits, capture, filled_layer

from omlx_core.cache.parts import PrefixContent
from omlx_core.cache.payload import InPlace
from omlx_core.errors import CacheInvariantError
from omlx_core.state import packed_blocks, prompt_state
from omlx_core.state.packed_blocks import PackedBlocks, PackedTensor, join_packed
from omlx_core.state.prompt_state import PromptStateCodec

DTYPES = [mx.float32, mx.bfloat16, mx.float16]


@pytest.fixture(autouse=True)
def device_memory(monkeypatch):
    monkeypatch.setattr(prompt_state, "has_device_memory", lambda: True)


def make_layers(dtype, num_tokens=80, value_dim=4):
    return [filled_layer(num_tokens, dtype=dtype, seed=7 * i, value_dim=value_dim) for i in range(3)]


def read_to(buffers, position, payload):
    """What the SSD tier does with a block: its bytes, piece by piece."""
    buffers.prepare(position)
    data = b"".join(tensor.data for tensor in payload.tensors.values())
    for piece in buffers.segments(position, payload.layout):
        piece[:], data = data[: len(piece)], data[len(piece) :]
    assert not data


def assert_same(layers, originals, num_tokens):
    for layer, original in zip(layers, originals, strict=True):
        assert layer.offset == num_tokens
        for array, expected in zip(layer.keys_and_values(), original.keys_and_values(), strict=True):
            assert bits(array) == bits(expected[..., :num_tokens, :])


@pytest.mark.parametrize("are_written", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [0, 4, 8])
def test_blocks_of_one_step_hold_what_blocks_on_the_cpu_hold(dtype, value_dim, are_written, monkeypatch):
    layers = make_layers(dtype, value_dim=value_dim)
    copies = PromptStateCodec(layers, BLOCK_SIZE, are_written=are_written).rows_of(layers, 80)
    found = [copies.copy(start, start + BLOCK_SIZE) for start in range(16, 80, BLOCK_SIZE)]
    monkeypatch.setattr(prompt_state, "has_device_memory", lambda: False)
    expected = capture(PromptStateCodec(layers, BLOCK_SIZE), layers, 5)[1:]
    for payload, other in zip(found, expected, strict=True):
        assert payload.layout == other.layout
        for name, tensor in payload.tensors.items():
            assert bytes(tensor.data) == bytes(other.tensors[name].data)
            assert bits(tensor.array.get()) == bytes(tensor.data)
        payload.release_copies()
        assert all(bytes(tensor.data) == bytes(other.tensors[name].data) for name, tensor in payload.tensors.items())


def test_layers_of_one_kind_share_an_array():
    layers = make_layers(mx.float32, value_dim=4)
    [payload] = capture(PromptStateCodec(layers, BLOCK_SIZE), layers, 1)
    assert len({id(tensor.array.packed) for tensor in payload.tensors.values()}) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_hot_and_cold_blocks_come_together_bit_for_bit_and_cold_ones_are_kept(dtype):
    layers = make_layers(dtype)
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 5)
    buffers = codec.allocate(dict.fromkeys([1, 4], payloads[0].layout), capacity=100)
    buffers.prepare(0)
    assert buffers.segments(0, payloads[0].layout) is None
    for position in (1, 4):
        read_to(buffers, position, payloads[position])
    rows = [InPlace.IN_PLACE if position in (1, 4) else payload for position, payload in enumerate(payloads)]
    restored, content = codec.restore(PrefixContent(rows, {}, buffers), num_tokens=80, capacity=100)
    assert_same(restored, layers, 80)
    assert restored[0].keys.shape[2] == 256
    assert not content.in_place
    for payload, original in zip(content.rows, payloads, strict=True):
        assert payload.layout == original.layout
        assert all(isinstance(tensor.array, PackedTensor) for tensor in payload.tensors.values())
    again, _ = codec.restore(PrefixContent(content.rows, {}), num_tokens=80, capacity=100)
    assert_same(again, layers, 80)


def test_writing_past_a_restored_prefix_leaves_its_blocks_and_other_restores_alone():
    layers = [filled_layer(32)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 2)
    stored = [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()]
    [first], [second] = (codec.restore(PrefixContent(payloads, {}), num_tokens=32, capacity=40)[0] for _ in range(2))
    first.trim(BLOCK_SIZE)
    first.update_and_fetch(mx.full((1, 2, 20, 8), 7.0), mx.full((1, 2, 20, 8), 7.0))
    mx.eval(first.state)
    assert_same([second], layers, 32)
    assert [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()] == stored


@pytest.mark.parametrize("most", [1, 2 * 64 * 8, 5 * 64 * 8])
def test_no_array_is_larger_than_the_kernels_can_reckon(most, monkeypatch):
    """Blocks and restored layers that would be too large together are made in several goes."""
    monkeypatch.setattr(packed_blocks, "_MAX_ELEMENTS", most)
    sizes = []
    for name in ("stack", "concatenate"):
        make = getattr(mx, name)

        def counted(arrays, axis=0, make=make):
            made = make(arrays, axis)
            if made.dtype != mx.uint8:
                sizes.append(made.size)
            return made

        monkeypatch.setattr(mx, name, counted)
    layers = make_layers(mx.float16, num_tokens=48, value_dim=8)
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    copies = codec.rows_of(layers, 48)
    payloads = [copies.copy(start, start + BLOCK_SIZE) for start in range(0, 48, BLOCK_SIZE)]
    [*restored], _ = codec.restore(PrefixContent(payloads, {}), num_tokens=48, capacity=50)
    assert_same(restored, layers, 48)
    least = max(6 * 2 * BLOCK_SIZE * 8, 2 * 256 * 8)  # one block of all layers, and one layer of all blocks
    assert max(sizes) <= max(most, least)


def test_blocks_of_another_layout_are_not_joined():
    codec = PromptStateCodec([filled_layer(32)], BLOCK_SIZE)
    [payload] = capture(codec, [filled_layer(32)], 1)
    [other] = capture(codec, [filled_layer(32, dtype=mx.float16)], 1)
    buffers = PackedBlocks({0: payload.layout})
    buffers.prepare(0)
    assert buffers.segments(0, other.layout) is None
    with pytest.raises(CacheInvariantError, match="block 1 is of another layout"):
        join_packed([payload, other], 64)


def test_blocks_that_were_read_by_themselves_are_joined_with_packed_ones(monkeypatch):
    layers = make_layers(mx.float16)
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    packed = capture(codec, layers, 2)
    monkeypatch.setattr(prompt_state, "has_device_memory", lambda: False)
    plain = capture(PromptStateCodec(layers, BLOCK_SIZE), layers, 2)
    restored, _ = codec.restore(PrefixContent([packed[0], plain[1]], {}), num_tokens=32, capacity=40)
    assert_same(restored, layers, 32)
