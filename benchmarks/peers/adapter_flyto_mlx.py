"""flyto-mlx, a derivative of oMLX: its block-aware prefix cache over `PagedSSDCacheManager`, 256 tokens a block.

Guarantees: a file appears by a rename, without fsync; it carries no checksum. Its server stores from a worker thread,
so a request waits for less than ``store`` takes here. The tier in RAM, off by default, holds raw bytes and is written
to files only when it overflows or closes; hits are measured with it, everything else without.
"""

from pathlib import Path
from types import SimpleNamespace

from protocol import NUM_LAYERS, NUM_TOKENS, bare_package, make_tokens, serve

# Its __init__ imports the server, and with it packages that the cache doesn't need, such as torch.
bare_package("omlx")

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import KVCache  # noqa: E402
from mlx_operations import Layers, cache_operations  # noqa: E402
from omlx.cache.hybrid_cache import ModelCacheConfig  # noqa: E402
from omlx.cache.paged_cache import PagedCacheManager  # noqa: E402
from omlx.cache.paged_ssd_cache import PagedSSDCacheManager  # noqa: E402
from omlx.cache.prefix_cache import BlockAwarePrefixCache  # noqa: E402

# Its scheduler's defaults.
BLOCK_SIZE, MAX_BLOCKS, MAX_SSD_BYTES = 256, 100_000, 100 * 2**30
HOT_BYTES = 2**30
REQUEST = "request"
TOKENS = make_tokens()


class FlytoCache:
    """The three managers as its scheduler puts them together."""

    def __init__(self, directory: Path, hot: bool) -> None:
        self._ssd = PagedSSDCacheManager(directory, MAX_SSD_BYTES, hot_cache_max_bytes=HOT_BYTES if hot else 0)
        self._paged = PagedCacheManager(block_size=BLOCK_SIZE, max_blocks=MAX_BLOCKS, model_name="benchmark")
        self._paged.set_paged_ssd_cache_manager(self._ssd)
        model = SimpleNamespace(make_cache=lambda: [KVCache() for _ in range(NUM_LAYERS)])
        self._prefixes = BlockAwarePrefixCache(model, self._paged, self._ssd)

    def store(self, layers: Layers) -> None:
        config = ModelCacheConfig.from_cache_list(layers, model_name="benchmark")
        states = [
            {
                "state": layer.state,
                "meta_state": layer.meta_state,
                "class_name": "KVCache",
                "cache_type": "KVCache",
            }
            for layer in layers
        ]
        mx.eval([state["state"] for state in states])
        table = self._prefixes.store_cache(REQUEST, TOKENS, states, model_cache_config=config)
        if table is None or table.num_tokens != NUM_TOKENS:
            raise RuntimeError(f"stored {table and table.num_tokens} of {NUM_TOKENS} tokens")
        self._paged.release_for_eviction(table.block_ids)
        self._prefixes.clear_request_entry(REQUEST)

    def flush(self) -> None:
        self._ssd.close()  # it has nothing else that waits for the writer

    def restore(self) -> Layers:
        table, _ = self._prefixes.fetch_cache(REQUEST, TOKENS)
        layers = self._prefixes.reconstruct_cache(table)
        if layers is None or table.num_tokens != NUM_TOKENS:
            raise RuntimeError(f"found {table and table.num_tokens} of {NUM_TOKENS} tokens")
        self._paged.delete_block_table(REQUEST)
        return list(layers)

    def close(self) -> None:
        self._ssd.close()


if __name__ == "__main__":
    serve(cache_operations(FlytoCache, KVCache), ("flyto-mlx", "mlx-lm", "mlx"))
