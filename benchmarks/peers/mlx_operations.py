"""The cache operations that are measured, for adapters of peers on MLX: store, RAM hit, restore."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from protocol import APPENDED_TOKENS, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, NUM_TOKENS, Operation, Stopwatch, sync_files

Layers = list[Any]
Rows = list[tuple[mx.array, mx.array]]


class PrefixCache(Protocol):
    """A peer's cache, with a folder of its own, in the way its own server uses it."""

    def store(self, layers: Layers) -> None:
        """Keep the state of a prompt of `protocol.make_tokens`, as far as a request has to wait for it."""

    def flush(self) -> None:
        """Return once all that was stored is in files, in the peer's own sense."""

    def restore(self) -> Layers:
        """The state of that prompt, from RAM or else from the files, to be continued by a few tokens."""

    def close(self) -> None: ...


OpenCache = Callable[[Path, bool], PrefixCache]
"""Opens the cache in a folder; True asks for a tier in RAM where the peer's default is to have none."""


def make_rows(num_tokens: int = NUM_TOKENS, seed: int = 0) -> Rows:
    """Keys and values of each layer, float16, each ``[1, heads, tokens, dim]``; the same in every process."""
    mx.random.seed(seed)
    size = (1, NUM_KV_HEADS, num_tokens, HEAD_DIM)

    def make() -> mx.array:
        return mx.random.normal(size, dtype=mx.float16)

    rows = [(make(), make()) for _ in range(NUM_LAYERS)]
    mx.eval(rows)
    return rows


def append_rows(layers: Layers, rows: Rows) -> None:
    """What a model's step does to its cache. Returns once all is computed."""
    for layer, (keys, values) in zip(layers, rows, strict=True):
        layer.update_and_fetch(keys, values)
    mx.eval([(layer.keys, layer.values) for layer in layers])


def check_layers(layers: Layers) -> None:
    """Raise unless these hold the rows of `make_rows`, bit for bit, and those that were appended."""
    for number, (layer, (keys, values)) in enumerate(zip(layers, make_rows(), strict=True)):
        if layer.offset != NUM_TOKENS + APPENDED_TOKENS:
            raise RuntimeError(f"layer {number} holds {layer.offset} tokens")
        for restored, original in ((layer.keys, keys), (layer.values, values)):
            if not mx.array_equal(restored[..., :NUM_TOKENS, :].view(mx.uint16), original.view(mx.uint16)).item():
                raise RuntimeError(f"layer {number} was restored with other bits")


def cache_operations(open_cache: OpenCache, make_layer: Callable[[], Any]) -> dict[str, Operation]:
    """What `protocol.serve` offers of a peer that is a cache.

    Args:
        open_cache: opens the peer's cache.
        make_layer: makes a layer's empty prompt cache.
    """
    appended = make_rows(APPENDED_TOKENS, seed=1)
    kept: dict[str, Any] = {}

    def layers() -> Layers:
        """The state of the prompt, as a prefill leaves it."""
        if "layers" not in kept:
            kept["layers"] = [make_layer() for _ in range(NUM_LAYERS)]
            append_rows(kept["layers"], make_rows())
        return kept["layers"]

    def restore_and_append(cache: PrefixCache) -> Layers:
        restored = cache.restore()
        append_rows(restored, appended)
        return restored

    def store(directory: str) -> dict[str, Any]:
        """Into an empty folder."""
        prompt = layers()
        with closing(open_cache(Path(directory), False)) as cache:
            watch = Stopwatch()
            cache.store(prompt)
            returned_s = watch.elapsed_s()
            cache.flush()
            flushed_s = watch.elapsed_s()
            sync_files(directory)
            return {"returned_s": returned_s, "flushed_s": flushed_s, "synced_s": watch.elapsed_s()}

    def hit(directory: str) -> dict[str, Any]:
        """From RAM, where the first call puts the prompt."""
        if "cache" not in kept:
            kept["cache"] = open_cache(Path(directory), True)
            kept["cache"].store(layers())
            check_layers(restore_and_append(kept["cache"]))
        watch = Stopwatch()
        restored = restore_and_append(kept["cache"])
        hit_s = watch.elapsed_s()
        del restored
        return {"hit_s": hit_s}

    def restore(directory: str) -> dict[str, Any]:
        """From the files of another process."""
        opening = Stopwatch()
        with closing(open_cache(Path(directory), False)) as cache:
            opened_s = opening.elapsed_s()
            watch = Stopwatch()
            restored = restore_and_append(cache)
            restored_s = watch.elapsed_s()
            check_layers(restored)
            return {"opened_s": opened_s, "restored_s": restored_s}

    return {"store": store, "hit": hit, "restore": restore}
