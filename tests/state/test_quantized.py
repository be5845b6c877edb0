"""Rows before and after the length at which keys and values are quantized."""

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from omlx_core.state.quantized import KVQuantization, QuantizedHandler

HOW = KVQuantization(bits=4, group_size=32, start_tokens=32)


def filled(num_tokens):
    layer = KVCache()
    layer.update_and_fetch(*(mx.random.normal((1, 2, num_tokens, 32), key=mx.random.key(seed)) for seed in (0, 1)))
    return layer


def test_rows_that_have_been_quantized_since_cannot_be_had_in_full():
    layers = [filled(40)]
    handler = QuantizedHandler(HOW)
    assert handler.rows(layers[0], 0, 16).keys() == {"keys", "values"}
    HOW.apply(layers)
    assert handler.rows(layers[0], 0, 16) is None
    assert handler.rows(layers[0], 16, 32) is None
    assert handler.rows(layers[0], 32, 40).keys() == {
        f"{member}_{part}" for member in ("keys", "values") for part in ("packed", "scales", "biases")
    }


@pytest.mark.parametrize(("num_tokens", "expected"), [(31, KVCache), (32, QuantizedKVCache), (40, QuantizedKVCache)])
def test_layers_are_quantized_once_they_are_long_enough(num_tokens, expected):
    layers = [filled(num_tokens), RotatingKVCache(16)]
    HOW.apply(layers)
    assert [type(layer) for layer in layers] == [expected, RotatingKVCache]
    before = list(layers)
    HOW.apply(layers)
    assert layers == before
