"""Whether writing to the SSD tier slows decoding down: tokens per second with the writer busy, and with the tier off.

    python benchmarks/writer_busy.py [--runs 7] [--tokens 100] [--layers 12] [--hidden 768]

A random-weight llama decodes one request, while an SSD cache of the same process is given blocks as large as this
model's:

- **off**: none.
- **busy**: as many bytes per second as the model's own prefill yields, without a pause; more than an engine has to
  write while it decodes.
- **flooded**: always the next one, as fast as the disk takes them. No engine does that; it shows where the limit is.

The three alternate, so that a busy machine is equally bad for each; medians and their ratios to "off" are printed as
JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path

from omlx_core.mlx_backend import backend_name, mx

import numpy as np
from mlx_lm.models.llama import Model, ModelArgs
from tqdm import trange

from omlx_core import CacheSettings, Engine
from omlx_core.cache.block_hash import BlockHash, hash_block, hash_namespace
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

BLOCK_SIZE = 64
PROMPT_TOKENS = 256
VOCAB_SIZE = 32_000
NUM_HEADS = 12


def make_model(num_layers: int, hidden_size: int) -> Model:
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            intermediate_size=hidden_size * 8 // 3,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS // 3,
            rms_norm_eps=1e-5,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32)
    mx.eval(model.parameters())
    return model


class BusyWriter:
    """Keeps the writer of an SSD cache at work while it is entered.

    Args:
        cache: the cache.
        payload: what to write, as a new block each time.
        interval_s: the time from one block to the next, if the disk is fast enough.
    """

    def __init__(self, cache: PagedSSDCacheManager, payload: BlockPayload, interval_s: float) -> None:
        self._cache = cache
        self._payload = payload
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._parent = hash_namespace({"benchmark": "writer_busy"})
        self._num_fed = 0
        self.bytes_per_s: list[float] = []

    def __enter__(self) -> None:
        self._stop.clear()
        self._begin_s, self._begin_bytes = time.perf_counter(), self._cache.stats().bytes_written
        self._thread = threading.Thread(target=self._feed)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        written_bytes = self._cache.stats().bytes_written - self._begin_bytes
        self.bytes_per_s.append(written_bytes / (time.perf_counter() - self._begin_s))
        self._stop.set()
        self._thread.join()
        self._cache.flush(60)
        self._cache.clear()

    def _feed(self) -> None:
        free = threading.Semaphore(2)  # one being written, one waiting

        def on_complete(_: BlockHash, is_on_disk: bool) -> None:
            if not is_on_disk:
                raise RuntimeError("a block was not written")
            free.release()

        while not self._stop.wait(self._interval_s):
            if free.acquire(timeout=1.0):
                self._num_fed += 1
                block_hash = hash_block(self._parent, [self._num_fed])
                self._cache.save_block(block_hash, None, [self._num_fed], self._payload, on_complete)


def decode_tokens_per_s(engine: Engine, max_tokens: int) -> float:
    arrivals_s = [time.perf_counter() for _ in engine.stream(list(range(PROMPT_TOKENS)), max_tokens=max_tokens)]
    return (len(arrivals_s) - 1) / (arrivals_s[-1] - arrivals_s[0])


def prefill_tokens_per_s(engine: Engine) -> float:
    rates = []
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, VOCAB_SIZE, 2 * PROMPT_TOKENS).tolist()
        rates.append(len(prompt) / engine.generate(prompt, max_tokens=1).ttft_s)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="of each kind")
    parser.add_argument("--tokens", type=int, default=100, help="to decode in each run")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--directory", help="where to write, on the disk in question")
    args = parser.parse_args()
    model = make_model(args.layers, args.hidden)
    element_bytes = 4 if mx.default_device() == mx.cpu else 2
    block_bytes = 2 * args.layers * (args.hidden // 3) * BLOCK_SIZE * element_bytes
    data = np.random.default_rng(0).integers(0, 256, block_bytes, dtype=np.uint8).data.toreadonly()
    payload = BlockPayload({"layers": BlockTensor("U8", (block_bytes,), data)})
    namespace = hash_namespace({"benchmark": "writer_busy"})
    rates: dict[str, list[float]] = {"off": [], "busy": [], "flooded": []}
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as root,
        closing(
            PagedSSDCacheManager(
                Path(root) / "kv", max_size_bytes=20 * 1024**3, namespace=namespace, description={"benchmark": True}
            )
        ) as cache,
        Engine(model, name="random", cache=CacheSettings(no_cache=True)) as engine,
    ):
        decode_tokens_per_s(engine, 20)  # the first call pays for memory that later ones reuse
        prefill_rate = prefill_tokens_per_s(engine)
        writers = {
            "busy": BusyWriter(cache, payload, BLOCK_SIZE / prefill_rate),
            "flooded": BusyWriter(cache, payload, 0.0),
        }
        for run in trange(args.runs, desc="runs"):
            for kind in list(rates)[:: 1 if run % 2 else -1]:
                with writers.get(kind, nullcontext()):
                    rates[kind].append(decode_tokens_per_s(engine, args.tokens))
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    json.dump(
        {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {backend_name()}",
            "versions": {name: version(name) for name in ("omlx-plugins", "mlx", "mlx-lm")},
            "runs": args.runs,
            "tokens": args.tokens,
            "block_mb": round(block_bytes / 1e6, 2),
            "prefill_tokens_per_s": round(prefill_rate, 1),
            "written_mb_per_s": {
                kind: round(statistics.median(writer.bytes_per_s) / 1e6, 1) for kind, writer in writers.items()
            },
            "decode_tokens_per_s": {kind: round(value, 2) for kind, value in medians.items()},
            "ratio_to_off": {kind: round(medians[kind] / medians["off"], 3) for kind in writers},
        },
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    main()
