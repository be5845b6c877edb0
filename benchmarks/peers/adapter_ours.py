"""This project: the cache as `cache_ops` measures it, and the engine.

Guarantees: what `flush` waited for is durable (fsync, rename, index row); every block's checksum is verified when it is
read; a restored prefix has the same bits.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx  # noqa: F401 - puts OpenBLAS in place

from cache_ops import SHAPES, WAIT_S, capture_from, make_codec, open_cache, restore, store
from mlx_lm.models.cache import KVCache
from mlx_operations import Layers, cache_operations
from protocol import APPENDED_TOKENS, NUM_TOKENS, make_tokens, serve

from omlx_core import CacheSettings, Engine

CODEC, TOKENS = make_codec(SHAPES["small"]), make_tokens()


class OurCache:
    """Both tiers, as by default."""

    def __init__(self, directory: Path, _hot: bool) -> None:
        self._open = ExitStack()
        self._cache = self._open.enter_context(open_cache(directory))

    def store(self, layers: Layers) -> None:
        store(self._cache, TOKENS, capture_from(CODEC, layers))

    def flush(self) -> None:
        if not self._cache.flush(WAIT_S):
            raise RuntimeError("not written in time")

    def restore(self) -> Layers:
        return restore(self._cache, CODEC, TOKENS, NUM_TOKENS + APPENDED_TOKENS)

    def close(self) -> None:
        self._open.close()


def ask_twice(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    with Engine.from_pretrained(model, cache=CacheSettings(paged_ssd_cache_dir=directory)) as engine:
        engine.generate(warm_up, max_tokens=1)
        cold = engine.generate(prompt, max_tokens=max_tokens)
        warm = engine.generate(prompt, max_tokens=max_tokens)
    return {"cold_s": cold.ttft_s, "cold": cold.token_ids, "ram_s": warm.ttft_s, "ram": warm.token_ids}


def ask_again(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    with Engine.from_pretrained(model, cache=CacheSettings(paged_ssd_cache_dir=directory)) as engine:
        engine.generate(warm_up, max_tokens=1)
        restored = engine.generate(prompt, max_tokens=max_tokens)
    return {"ssd_s": restored.ttft_s, "ssd": restored.token_ids}


if __name__ == "__main__":
    operations = {**cache_operations(OurCache, KVCache), "ask_twice": ask_twice, "ask_again": ask_again}
    serve(operations, ("omlx-plugins", "mlx", "mlx-lm"))
