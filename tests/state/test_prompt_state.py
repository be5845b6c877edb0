"""A model's layer caches as block payloads and back: same bits, no shared memory, and nothing that is guessed."""

from omlx_core.mlx_backend import mx

import numpy as np
import pytest
from filled_layers import BLOCK_SIZE, bits, capture, filled_layer
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from omlx_core.cache.parts import PrefixContent
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import to_payloads, with_arrays
from omlx_core.state.prompt_state import PromptStateCodec, UnsupportedLayerError


def from_disk(payload):
    """The same payload as a reader of files gives it: bytes only."""
    return BlockPayload(
        {n: BlockTensor(t.dtype, t.shape, memoryview(bytes(t.data))) for n, t in payload.tensors.items()}
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("source", ["RAM", "SSD"])
def test_restored_layers_hold_the_same_bits(dtype, source):
    layers = [filled_layer(50, dtype=dtype, seed=i, value_dim=4) for i in range(3)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, 3)
    if source == "SSD":
        payloads = [from_disk(payload) for payload in payloads]
    restored, _ = codec.restore(PrefixContent(payloads, {}), num_tokens=48, capacity=60)
    for layer, original in zip(restored, layers, strict=True):
        assert layer.offset == 48
        for array, expected in zip(layer.keys_and_values(), original.keys_and_values(), strict=True):
            assert array.dtype == dtype
            assert bits(array) == bits(expected[..., :48, :])


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_writing_past_a_restored_prefix_leaves_its_blocks_alone(num_blocks):
    layers = [filled_layer(num_blocks * BLOCK_SIZE)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payloads = capture(codec, layers, num_blocks)
    before = [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()]
    [layer], _ = codec.restore(PrefixContent(payloads, {}), num_tokens=num_blocks * BLOCK_SIZE, capacity=0)
    layer.trim(BLOCK_SIZE)
    layer.update_and_fetch(mx.full((1, 2, 40, 8), 7.0), mx.full((1, 2, 40, 8), 7.0))
    layer.keys[...] = 9.0
    mx.eval(layer.state)
    assert [bytes(tensor.data) for payload in payloads for tensor in payload.tensors.values()] == before


def test_restored_layer_has_the_capacity_that_was_asked_for():
    layers = [filled_layer(BLOCK_SIZE)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    [layer], _ = codec.restore(PrefixContent(capture(codec, layers, 1), {}), num_tokens=BLOCK_SIZE, capacity=1000)
    assert layer.keys.shape[2] == layer.values.shape[2] == 1024


@pytest.mark.parametrize("heads", [1, 4])
def test_captured_blocks_do_not_keep_the_cache_they_were_cut_from(heads):
    mx.clear_cache()
    before = mx.get_active_memory()
    layers = [filled_layer(4096, heads=heads, dim=64, value_dim=64)]
    payloads = capture(PromptStateCodec(layers, BLOCK_SIZE), layers, 2)
    del layers
    size_bytes = sum(payload.size_bytes for payload in payloads)
    assert size_bytes == 2 * BLOCK_SIZE * heads * 64 * 2 * 4
    # Allocations are rounded up to pages of at most 16 KiB.
    assert mx.get_active_memory() - before <= size_bytes + 4 * 16384


def test_payloads_from_ram_are_not_converted_again():
    first, second = to_payloads([{"0.keys": mx.random.normal((1, 2, BLOCK_SIZE, 8))} for _ in range(2)])
    mixed = with_arrays([first, from_disk(second)])
    assert mixed[0] is first
    assert mixed[1] == second
    assert all(tensor.array is not None for tensor in mixed[1].tensors.values())


def test_capture_beyond_what_was_computed_is_refused():
    layers = [filled_layer(20)]
    with pytest.raises(CacheInvariantError, match="layer 0 holds 20 tokens where its blocks say 32"):
        capture(PromptStateCodec(layers, BLOCK_SIZE), layers, 2)


def test_restore_that_is_shorter_than_its_table_is_refused():
    layers = [filled_layer(32)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    with pytest.raises(CacheInvariantError, match="2 blocks of 16 tokens, where their table has 48"):
        codec.restore(PrefixContent(capture(codec, layers, 2), {}), num_tokens=48, capacity=48)


def test_bytes_that_do_not_fit_their_shape_are_refused():
    tensor = BlockTensor("F32", (3,), memoryview(bytes(8)))
    with pytest.raises(CacheInvariantError, match=r"8 bytes are no F32 tensor of shape \(3,\)"):
        with_arrays([BlockPayload({"0.keys": tensor})])


class KVCacheOfSomeoneElse(KVCache):
    pass


@pytest.mark.parametrize("layer", [QuantizedKVCache(), KVCacheOfSomeoneElse()])
def test_unknown_cache_class_is_not_cached(layer):
    with pytest.raises(UnsupportedLayerError, match=type(layer).__name__):
        PromptStateCodec([KVCache(), layer], BLOCK_SIZE)


@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.int32, mx.bool_])
def test_every_shape_and_type_survives_the_round_trip(shape, dtype):
    array = mx.ones(shape).astype(dtype)
    [payload] = to_payloads([{"x": array}])
    [back] = with_arrays([from_disk(payload)])
    assert back.tensors["x"].array.dtype == dtype
    assert back.tensors["x"].array.shape == shape
    assert back.tensors["x"].data.nbytes == int(np.prod(shape)) * dtype.size
    assert back == payload
