"""Whether writing to the SSD tier slows decoding down: tokens per second with the writer busy, and with the tier off.

    python benchmarks/writer_busy.py [--runs 7] [--tokens 100] [--layers 12] [--hidden 768] [--directory DIR]

A random-weight llama decodes one request, while an SSD cache of the same process is given blocks as large as this
model's:

- **off**: none.
- **busy**: as many bytes per second as the model's own prefill yields, without a pause; more than an engine has to
  write while it decodes.
- **flooded**: always the next ones, as fast as the disk takes them. No engine does that; it shows where the limit is.

The time that a token takes is compared with that of "off", in turn. A table goes to standard error, JSON to standard
output.
"""

import argparse
import statistics
import tempfile
import threading
import time
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path

from omlx_core.mlx_backend import mx

import numpy as np
from harness import Figure, medians_in_turn, print_report, print_table
from mlx_lm.models.llama import Model, ModelArgs

from omlx_core import CacheSettings, Engine
from omlx_core.cache.block_hash import BlockHash, hash_block, hash_namespace
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

BLOCK_SIZE = 64
PROMPT_TOKENS = 256
VOCAB_SIZE = 32_000
NUM_HEADS = 12
NUM_FED_AT_ONCE = 16  # as many as the writer takes together, and as many waiting
BAR = 1 / 0.95
WAIT_S = 60.0


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
        self._cache.flush(WAIT_S)
        self._cache.clear()

    def _feed(self) -> None:
        free = threading.Semaphore(2 * NUM_FED_AT_ONCE)

        def on_complete(_: BlockHash, is_on_disk: bool) -> None:
            if not is_on_disk:
                raise RuntimeError("a block was not written")
            free.release()

        while not self._stop.wait(self._interval_s):
            if free.acquire(timeout=1.0):
                self._num_fed += 1
                block_hash = hash_block(self._parent, [self._num_fed])
                self._cache.save_block(block_hash, None, [self._num_fed], self._payload, on_complete)


def decode_token_s(engine: Engine, max_tokens: int, writer: AbstractContextManager[None]) -> float:
    with writer:
        arrivals_s = [time.perf_counter() for _ in engine.stream(list(range(PROMPT_TOKENS)), max_tokens=max_tokens)]
        return (arrivals_s[-1] - arrivals_s[0]) / (len(arrivals_s) - 1)


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
    parser.add_argument("--directory", type=Path, help="where to write, on the disk in question")
    args = parser.parse_args()
    model = make_model(args.layers, args.hidden)
    element_bytes = 4 if mx.default_device() == mx.cpu else 2
    block_bytes = 2 * args.layers * (args.hidden // 3) * BLOCK_SIZE * element_bytes
    data = np.random.default_rng(0).integers(0, 256, block_bytes, dtype=np.uint8).data.toreadonly()
    payload = BlockPayload({"layers": BlockTensor("U8", (block_bytes,), data)})
    namespace = hash_namespace({"benchmark": "writer_busy"})
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as root,
        closing(
            PagedSSDCacheManager(
                Path(root) / "kv", max_size_bytes=20 * 1024**3, namespace=namespace, description={"benchmark": True}
            )
        ) as cache,
        Engine(model, name="random", cache=CacheSettings(no_cache=True)) as engine,
    ):
        prefill_rate = prefill_tokens_per_s(engine)
        writers = {
            "busy": BusyWriter(cache, payload, BLOCK_SIZE / prefill_rate),
            "flooded": BusyWriter(cache, payload, 0.0),
        }
        medians_s = medians_in_turn(
            {
                kind: partial(decode_token_s, engine, args.tokens, writers.get(kind, nullcontext()))
                for kind in ("off", *writers)
            },
            args.runs,
            description="decoding",
            warm_up=1,
        )
    figures = [
        Figure(f"time per token, writer {kind} / off", medians_s[kind] / medians_s["off"], "x", BAR) for kind in writers
    ]
    print_table(figures)
    print_report(
        runs=args.runs,
        tokens=args.tokens,
        block_mb=round(block_bytes / 1e6, 2),
        prefill_tokens_per_s=round(prefill_rate, 1),
        written_mb_per_s={
            kind: round(statistics.median(writer.bytes_per_s[1:]) / 1e6, 1) for kind, writer in writers.items()
        },
        decode_tokens_per_s={kind: round(1 / median_s, 2) for kind, median_s in medians_s.items()},
        figures=[figure.as_dict() for figure in figures],
    )


if __name__ == "__main__":
    main()
