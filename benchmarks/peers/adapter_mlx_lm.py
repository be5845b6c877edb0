"""mlx-lm's own prompt cache: whole sequences in RAM, and one file per sequence, written when its user asks for it.

Guarantees: none of fsync, rename or checksum; a file cut short is an error, one with flipped bits is taken as it is.
A sequence in RAM is kept by reference and copied when it is fetched.
"""

import copy
import importlib
import os
from pathlib import Path
from typing import Any

from protocol import APPENDED_TOKENS, Stopwatch, bare_package, make_tokens, serve

# The same OpenBLAS as ours, loaded by the same code, or this would compare that with the reference BLAS.
bare_package("omlx_core", os.environ["OMLX_CORE"])
importlib.import_module("omlx_core.mlx_backend")

import mlx.core as mx  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    LRUPromptCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import load  # noqa: E402
from mlx_operations import Layers, cache_operations  # noqa: E402

FILE_NAME = "prompt.safetensors"
TOKENS = make_tokens()
MODEL_KEY = "model"


class MlxLmCache:
    """`LRUPromptCache` as `mlx_lm.server` uses it, then the file as ``mlx_lm.cache_prompt`` writes it."""

    def __init__(self, directory: Path, _hot: bool) -> None:
        self._file = str(directory / FILE_NAME)
        self._lru = LRUPromptCache()

    def store(self, layers: Layers) -> None:
        self._lru.insert_cache(MODEL_KEY, TOKENS, layers)

    def flush(self) -> None:
        layers, _ = self._lru.fetch_nearest_cache(MODEL_KEY, TOKENS)
        save_prompt_cache(self._file, layers)

    def restore(self) -> Layers:
        layers, _ = self._lru.fetch_nearest_cache(MODEL_KEY, [*TOKENS, *range(APPENDED_TOKENS)])
        return load_prompt_cache(self._file) if layers is None else layers

    def close(self) -> None:
        pass


def answer(model: Any, tokens: list[int], layers: Layers, max_tokens: int, watch: Stopwatch) -> tuple[float, list[int]]:
    """Seconds until the first token, on a watch that has been running since the request came, and all tokens."""
    steps = generate_step(mx.array(tokens), model, max_tokens=max_tokens, prompt_cache=layers)
    first, _ = next(steps)
    ttft_s = watch.elapsed_s()
    return ttft_s, [first, *(token for token, _ in steps)]


def ask_twice(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    network, _ = load(model)
    answer(network, warm_up, make_prompt_cache(network), 1, Stopwatch())
    lru = LRUPromptCache()

    def ask() -> tuple[float, list[int], Layers]:
        watch = Stopwatch()
        layers, rest = lru.fetch_nearest_cache(MODEL_KEY, prompt)
        layers = make_prompt_cache(network) if layers is None else layers
        ttft_s, tokens = answer(network, rest, layers, max_tokens, watch)
        # Of the last token there are no keys and values yet.
        lru.insert_cache(MODEL_KEY, [*prompt, *tokens][: layers[0].offset], layers)
        return ttft_s, tokens, layers

    cold_s, cold, layers = ask()
    ram_s, ram, _ = ask()
    # One token short of the prompt, so that something is left to ask the model for.
    saved = copy.deepcopy(layers)
    trim_prompt_cache(saved, saved[0].offset - (len(prompt) - 1))
    save_prompt_cache(str(Path(directory) / FILE_NAME), saved)
    return {"cold_s": cold_s, "cold": cold, "ram_s": ram_s, "ram": ram}


def ask_again(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    network, _ = load(model)
    answer(network, warm_up, make_prompt_cache(network), 1, Stopwatch())
    watch = Stopwatch()
    layers = load_prompt_cache(str(Path(directory) / FILE_NAME))
    ssd_s, tokens = answer(network, prompt[layers[0].offset :], layers, max_tokens, watch)
    return {"ssd_s": ssd_s, "ssd": tokens}


if __name__ == "__main__":
    operations = {**cache_operations(MlxLmCache, KVCache), "ask_twice": ask_twice, "ask_again": ask_again}
    serve(operations, ("mlx-lm", "mlx"))
