"""Layer caches of random rows, the blocks that are captured of them, and how to compare them to the last bit."""

from __future__ import annotations

from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.models.cache import KVCache

from omlx_core.cache.payload import BlockPayload
from omlx_core.state.prompt_state import PromptStateCodec

BLOCK_SIZE = 16


def filled_layer(
    num_tokens: int, *, heads: int = 2, dim: int = 8, value_dim: int = 8, dtype: Any = mx.float32, seed: int = 0
) -> KVCache:
    keys, values = (
        mx.random.normal((1, heads, num_tokens, size), key=mx.random.key(seed + i)).astype(dtype)
        for i, size in enumerate((dim, value_dim))
    )
    layer = KVCache()
    layer.update_and_fetch(keys, values)
    mx.eval(layer.state)
    return layer


def capture(codec: PromptStateCodec, layers: list[Any], num_blocks: int) -> list[BlockPayload]:
    return [
        codec.rows_of(layers, (i + 1) * BLOCK_SIZE).copy(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE)
        for i in range(num_blocks)
    ]


def bits(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8)))
