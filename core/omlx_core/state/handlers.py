"""Layer-state handlers: how one layer's cache is cut into blocks and put together again.

One handler per family of cache classes. A class that no handler names is not cached at all: a guess that is wrong
would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from omlx_core.mlx_backend import mx

from mlx_lm.models import cache as mlx_lm_cache


class LayerStateHandler(Protocol):
    """Cuts the cache of one layer into blocks, and restores it from them."""

    kind: str
    """The family's name, as it stands in the namespace's layout."""

    def capture(self, layer: Any, start: int, stop: int) -> dict[str, mx.array]:
        """Lazy copies of what a block of tokens ``[start, stop)`` needs from a cache that covers them."""
        ...

    def restore(self, blocks: Sequence[Mapping[str, mx.array]], capacity: int) -> Any:
        """A fresh layer cache that holds the given blocks in order, sharing no memory with them.

        Args:
            blocks: what `capture` made, from the first token on.
            capacity: tokens to have room for without reallocation.
        """
        ...

    def num_tokens(self, layer: Any) -> int:
        """Tokens that a layer cache has seen."""
        ...


class TokenSlicedHandler:
    """Full attention: one key and one value per token, each of shape ``[1, kv_heads, tokens, head_dim]``.

    A block holds the rows of its own tokens. For `mlx_lm.models.cache.KVCache`.
    """

    kind = "token-sliced"

    def capture(self, layer: Any, start: int, stop: int) -> dict[str, mx.array]:
        """Copies of the rows ``[start, stop)``."""
        return {
            "keys": mx.contiguous(layer.keys[..., start:stop, :]),
            "values": mx.contiguous(layer.values[..., start:stop, :]),
        }

    def restore(self, blocks: Sequence[Mapping[str, mx.array]], capacity: int) -> Any:
        """A `KVCache` whose arrays are allocated once, for `capacity` tokens rounded up to its step."""
        layer = mlx_lm_cache.KVCache()
        num_tokens = sum(block["keys"].shape[2] for block in blocks)
        # One token of room at the least: concatenating a single block with nothing would be that block itself.
        room = -(-max(capacity, num_tokens + 1) // layer.step) * layer.step - num_tokens
        layer.keys, layer.values = (
            _concatenate_with_room([block[name] for block in blocks], room) for name in ("keys", "values")
        )
        layer.offset = num_tokens
        return layer

    def num_tokens(self, layer: Any) -> int:
        """The offset."""
        return int(layer.offset)


def _concatenate_with_room(rows: Sequence[mx.array], room: int) -> mx.array:
    shape = list(rows[0].shape)
    shape[2] = room
    return mx.concatenate([*rows, mx.zeros(shape, rows[0].dtype)], axis=2)


_HANDLERS: dict[type, LayerStateHandler] = {mlx_lm_cache.KVCache: TokenSlicedHandler()}


def find_handler(layer: Any) -> LayerStateHandler | None:
    """The handler of a layer cache's exact class; a subclass may keep more than its parent does."""
    return _HANDLERS.get(type(layer))
