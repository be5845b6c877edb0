"""Layer-state handlers: how one layer's cache is cut into blocks and put together again.

A prompt cache is a list of mlx-lm cache objects, some of them composed of others; its *leaves* are the ones that hold
arrays. Each leaf class belongs to a family, and each family keeps its content in one *part* of a block:

- ``"rows"``: a key and a value per token, all of which a restore needs (full attention);
- ``"window"``: the same, of which a restore needs the last window's worth (sliding windows);
- ``"checkpoint"``: the whole state at the block's end, whatever came before it (recurrent layers).

For classes that mlx-lm doesn't have, `omlx_core.state.registry` takes handlers. A class that no handler names is not
cached at all: a guess that is wrong would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.models import cache as mlx_lm_cache

from omlx_core.state.protocols import Arrays, FetchRows, Handler
from omlx_core.state.registered import find_registered_handler


class JoinedRowsHandler:
    """Full attention, put together by joining the blocks' rows; see `TokenSlicedHandler`."""

    def describe(self, leaf: Any) -> str:
        """Nothing but the family."""
        del leaf
        return "token-sliced"

    def num_tokens(self, leaf: Any) -> int:
        """The offset."""
        return int(leaf.offset)

    def window(self, leaf: Any) -> int | None:
        """No row is ever dropped."""
        del leaf
        return None

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        """Copies of the rows ``[start, stop)``."""
        return {name: mx.contiguous(getattr(leaf, name)[..., start:stop, :]) for name in ("keys", "values")}

    def needed(self, leaf: Any, num_tokens: int) -> list[tuple[int, int]]:
        """All of them."""
        del leaf
        return [(0, num_tokens)]

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        """A `KVCache` whose arrays are allocated once, for `capacity` tokens rounded up to its step."""
        restored = type(leaf)()
        pieces = fetch(0, num_tokens)
        # One token of room at the least: concatenating a single piece with nothing would be that piece itself.
        room = -(-max(capacity, num_tokens + 1) // restored.step) * restored.step - num_tokens
        for name in ("keys", "values"):
            rows = [piece[name] for piece in pieces]
            shape = list(rows[0].shape)
            shape[2] = room
            setattr(restored, name, mx.concatenate([*rows, mx.zeros(shape, rows[0].dtype)], axis=2))
        restored.offset = num_tokens
        return restored


class TokenSlicedHandler(JoinedRowsHandler):
    """Full attention: keys and values of shape ``[1, kv_heads, tokens, head_dim]``; `mlx_lm.models.cache.KVCache`."""

    def arrays(self, leaf: Any) -> Arrays:
        """The keys and the values."""
        return {"keys": leaf.keys, "values": leaf.values}

    def capacity(self, num_tokens: int) -> int:
        """The cache's own steps."""
        step: int = mlx_lm_cache.KVCache.step
        return -(-num_tokens // step) * step

    def adopt(self, leaf: Any, arrays: Arrays, num_tokens: int) -> Any:
        """A `KVCache` of these arrays."""
        restored = type(leaf)()
        restored.keys, restored.values = arrays["keys"], arrays["values"]
        restored.offset = num_tokens
        return restored


class WindowedHandler:
    """Sliding windows: `mlx_lm.models.cache.RotatingKVCache`, also with tokens that are kept at the front.

    mlx-lm holds the rows in the order of their tokens after a step of several tokens, and as a ring after a single
    one. They are captured from either in order, and restored in order with the index at the end, which is what a
    prefill up to there would have left.
    """

    def describe(self, leaf: Any) -> str:
        """The family, the window and what is kept."""
        return f"windowed(max_size={leaf.max_size}, keep={leaf.keep})"

    def num_tokens(self, leaf: Any) -> int:
        """The offset."""
        return int(leaf.offset)

    def window(self, leaf: Any) -> int | None:
        """Tokens after which a row may be dropped."""
        return int(leaf.max_size - leaf.keep)

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        """Copies of the rows ``[start, stop)``, if the window still has them."""
        keys, values = leaf._temporal_order(leaf.keys), leaf._temporal_order(leaf.values)
        num_dropped = leaf.offset - keys.shape[2]
        if num_dropped and start < num_dropped + leaf.keep:
            return None
        window = slice(start - num_dropped, stop - num_dropped)
        return {"keys": mx.contiguous(keys[..., window, :]), "values": mx.contiguous(values[..., window, :])}

    def needed(self, leaf: Any, num_tokens: int) -> list[tuple[int, int]]:
        """The last window's worth, and what is kept."""
        if num_tokens <= leaf.max_size:
            return [(0, num_tokens)]
        recent = (num_tokens - leaf.max_size + leaf.keep, num_tokens)
        return [(0, leaf.keep), recent] if leaf.keep else [recent]

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        """A `RotatingKVCache` with its rows in the order of their tokens."""
        del capacity  # the window bounds it
        restored = type(leaf)(leaf.max_size, keep=leaf.keep)
        pieces = [piece for start, stop in self.needed(leaf, num_tokens) for piece in fetch(start, stop)]
        restored.keys, restored.values = (
            mx.concatenate([piece[name] for piece in pieces], axis=2) for name in ("keys", "values")
        )
        restored.offset = num_tokens
        restored._idx = restored.keys.shape[2]
        return restored


class ChunkedHandler:
    """Chunked attention (llama4): `mlx_lm.models.cache.ChunkedKVCache`, which drops rows once a chunk has passed."""

    def describe(self, leaf: Any) -> str:
        """The family and the chunk."""
        return f"chunked(chunk_size={leaf.chunk_size})"

    def num_tokens(self, leaf: Any) -> int:
        """The offset."""
        return int(leaf.offset)

    def window(self, leaf: Any) -> int | None:
        """Tokens after which a row may be dropped."""
        return int(leaf.chunk_size)

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        """Copies of the rows ``[start, stop)``, if they are still there."""
        first = leaf.start_position
        if start < first:
            return None
        window = slice(start - first, stop - first)
        return {name: mx.contiguous(getattr(leaf, name)[..., window, :]) for name in ("keys", "values")}

    def needed(self, leaf: Any, num_tokens: int) -> list[tuple[int, int]]:
        """The last chunk's worth."""
        return [(max(0, num_tokens - leaf.chunk_size), num_tokens)]

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        """A `ChunkedKVCache` as it is after it has dropped what it could."""
        del capacity  # the chunk bounds it
        restored = type(leaf)(leaf.chunk_size)
        [(start, _)] = self.needed(leaf, num_tokens)
        pieces = fetch(start, num_tokens)
        restored.keys, restored.values = (
            mx.concatenate([piece[name] for piece in pieces], axis=2) for name in ("keys", "values")
        )
        restored.offset, restored.start_position = num_tokens, start
        return restored


class RecurrentHandler:
    """State space, linear attention, short convolutions: `mlx_lm.models.cache.ArraysCache`.

    Members may be of any type and shape, or absent; an absent one stays absent.
    """

    def describe(self, leaf: Any) -> str:
        """The family and the number of members."""
        return f"recurrent(members={len(leaf.cache)})"

    def checkpoint(self, leaf: Any) -> dict[str, mx.array]:
        """The members that are there. A view is copied, lest it keep what it was cut from alive."""
        return {str(index): mx.contiguous(array) for index, array in enumerate(leaf.cache) if array is not None}

    def restore(self, leaf: Any, arrays: Arrays) -> Any:
        """An `ArraysCache` with the members that were there."""
        restored = type(leaf)(len(leaf.cache))
        for name, array in arrays.items():
            restored[int(name)] = array
        return restored


_HANDLERS: dict[type, Handler] = {
    mlx_lm_cache.KVCache: TokenSlicedHandler(),
    mlx_lm_cache.RotatingKVCache: WindowedHandler(),
    mlx_lm_cache.ChunkedKVCache: ChunkedHandler(),
    mlx_lm_cache.ArraysCache: RecurrentHandler(),
}


def find_handler(leaf: Any) -> Handler | None:
    """The handler of a leaf's exact class, built in or registered; a subclass may keep more than its parent does."""
    return _HANDLERS.get(type(leaf)) or find_registered_handler(leaf)


def leaves_of(prompt_cache: Sequence[Any]) -> dict[str, Any]:
    """The leaves of a prompt cache by their paths, such as ``"3"`` or, in a `CacheList`, ``"3.0"``."""
    return {path: leaf for index, layer in enumerate(prompt_cache) for path, leaf in _walk(str(index), layer)}


def rebuild(prompt_cache: Sequence[Any], leaves: Mapping[str, Any]) -> list[Any]:
    """A prompt cache of the same structure with other leaves."""
    return [_rebuild(str(index), layer, leaves) for index, layer in enumerate(prompt_cache)]


def _walk(path: str, layer: Any) -> Iterator[tuple[str, Any]]:
    if type(layer) is mlx_lm_cache.CacheList:
        for index, member in enumerate(layer.caches):
            yield from _walk(f"{path}.{index}", member)
    else:
        yield path, layer


def _rebuild(path: str, layer: Any, leaves: Mapping[str, Any]) -> Any:
    if type(layer) is mlx_lm_cache.CacheList:
        members = [_rebuild(f"{path}.{index}", member, leaves) for index, member in enumerate(layer.caches)]
        return mlx_lm_cache.CacheList(*members)
    return leaves[path]
