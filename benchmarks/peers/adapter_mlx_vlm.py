"""mlx-vlm's automatic prefix cache (APC): blocks in RAM, and files of up to 256 blocks.

Guarantees: a file appears by a rename, without fsync; it carries no checksum, and the tokens that it was made from are
compared before it is used. The thread that computes copies the blocks for RAM; the files are written behind it.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_operations import Layers, cache_operations
from mlx_vlm.apc import APCManager, DiskBlockStore
from mlx_vlm.models.cache import KVCache
from protocol import APPENDED_TOKENS, NUM_LAYERS, NUM_TOKENS, make_tokens, serve

BLOCK_SIZE = int(os.environ["APC_BLOCK_SIZE"])
TOKENS = make_tokens()


class ApcCache:
    """`APCManager` behind its coordinator, as mlx-vlm's generation uses it for a text prompt."""

    def __init__(self, directory: Path, _hot: bool) -> None:
        self._manager = APCManager(block_size=BLOCK_SIZE, disk=DiskBlockStore(directory))
        model = SimpleNamespace(make_cache=lambda: [KVCache() for _ in range(NUM_LAYERS)])
        self._coordinator = self._manager.coordinator(model)

    def store(self, layers: Layers) -> None:
        if not self._coordinator.commit(layers, TOKENS):
            raise RuntimeError("APC didn't take the prompt")

    def flush(self) -> None:
        self._manager.disk.flush()

    def restore(self) -> Layers:
        hit: dict[str, Any] | None = self._coordinator.lookup(
            [*TOKENS, *range(APPENDED_TOKENS)],
            extra_hash=0,
            safe_lookup_min=0,
            suffix_is_text_only=lambda _: True,
            prefix_has_media=lambda _: False,
        )
        if hit is None or hit["prefix_len"] != NUM_TOKENS:
            raise RuntimeError(f"APC found {hit and hit['prefix_len']} of {NUM_TOKENS} tokens")
        layers = self._coordinator.materialize_single(hit, min_capacity_tokens=NUM_TOKENS + APPENDED_TOKENS + 1)
        self._coordinator.release_hit(hit)
        return list(layers)

    def close(self) -> None:
        self._manager.close()


if __name__ == "__main__":
    serve(cache_operations(ApcCache, KVCache), ("mlx-vlm", "mlx"))
