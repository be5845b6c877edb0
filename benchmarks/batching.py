"""Many requests at once: throughput of a batch, and how evenly its streams flow while others come.

    python benchmarks/batching.py [--runs 3] [--tokens 64] [--prompt 128] [--long 16384] [--step 512]

- batch: 8 requests at once, against the same in turn, and against mlx-lm's `BatchGenerator` of the same prompts; the
  cache is on and finds nothing.
- gap: the longest wait for a token of a running stream while a long prompt is prefilled, against the longest without,
  and against the slowest step of such a prefill. On a small model with random weights, since the real one's context is
  shorter than that prompt.
- first chunk: from the end of the prefill to the stream's first chunk, against one step of mlx-lm's own.

All in one process, in turn; medians and their ratios go to standard error as a table and to standard output as JSON.
"""

import argparse
import itertools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from omlx_core.mlx_backend import mx

from harness import Figure, print_report, print_table, seconds
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm_alone import batch_generator_arrivals_s
from models import SHAPES, build
from tqdm import tqdm

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.model.loading import load_model
from omlx_core.model.sample_model import ensure_sample_model
from omlx_core.request_timing import draw_tokens

BATCH_SIZE = 8


def make_prompt(seed: int, num_tokens: int) -> list[int]:
    return draw_tokens(seed, num_tokens, SHAPES["small-full"]["vocab_size"])


def longest_gap_s(engine, prompt, num_tokens, meanwhile=None) -> float:
    """The longest wait for a token after the first; `meanwhile` runs on another thread from the first token on."""
    stream = engine.stream(prompt, max_tokens=num_tokens)
    next(stream)
    worker = threading.Thread(target=meanwhile) if meanwhile else None
    if worker:
        worker.start()
    gaps_s, last_s = [], time.perf_counter()
    for _ in stream:
        now_s = time.perf_counter()
        gaps_s.append(now_s - last_s)
        last_s = now_s
        if worker and not worker.is_alive():
            break
    stream.close()
    if worker:
        worker.join()
    return max(gaps_s)


def slowest_step_s(engine, prompt) -> float:
    """The longest time between two reports of a prefill."""
    at_s = [time.perf_counter()]
    engine.generate(prompt, max_tokens=1, on_prefill=lambda *_: at_s.append(time.perf_counter()))
    return max(b - a for a, b in itertools.pairwise(at_s))


def first_chunk_s(engine, prompt) -> float:
    """From the last report of the prefill to the first chunk."""
    done_s = []
    stream = engine.stream(prompt, max_tokens=2, on_prefill=lambda *_: done_s.append(time.perf_counter()))
    next(stream)
    elapsed_s = time.perf_counter() - done_s[-1]
    stream.close()
    return elapsed_s


def own_first_step_s(loaded, prompt) -> float:
    """mlx-lm's step from a prefilled prompt to its first token."""
    cache = make_prompt_cache(loaded.model)
    loaded.model(mx.array(prompt[:-1])[None], cache=cache)
    mx.eval([layer.state for layer in cache])
    return seconds(lambda: next(generate_step(mx.array(prompt[-1:]), loaded.model, prompt_cache=cache, max_tokens=2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--prompt", type=int, default=128, help="length of each prompt of the batch")
    parser.add_argument("--long", type=int, default=16384, help="length of the long prompt")
    parser.add_argument("--step", type=int, default=EngineSettings().prefill_step_size, help="prefill_step_size")
    args = parser.parse_args()
    loaded = load_model(ensure_sample_model())
    times: dict[str, list[float]] = {}

    def measure(name, value_s) -> None:
        times.setdefault(name, []).append(value_s)

    settings = EngineSettings(prefill_step_size=args.step)
    with (
        Engine(loaded.model, cache=CacheSettings(), settings=settings) as engine,
        Engine(build("small-full"), cache=CacheSettings(), settings=settings) as long_engine,
    ):

        def ask(prompt) -> None:
            engine.generate(prompt, max_tokens=args.tokens)

        engine.generate(make_prompt(0, 8), max_tokens=2)
        batch_generator_arrivals_s(loaded.model, [make_prompt(0, 8)], 2)
        seed = 0
        for _ in tqdm(range(args.runs), desc="runs"):
            prompts = [make_prompt(seed := seed + 1, args.prompt) for _ in range(BATCH_SIZE)]
            measure("mlx-lm", seconds(lambda p=prompts: batch_generator_arrivals_s(loaded.model, p, args.tokens)))
            prompts = [make_prompt(seed := seed + 1, args.prompt) for _ in range(BATCH_SIZE)]
            with ThreadPoolExecutor(BATCH_SIZE) as callers:
                measure("at once", seconds(lambda p=prompts, c=callers: list(c.map(ask, p))))
            prompts = [make_prompt(seed := seed + 1, args.prompt) for _ in range(BATCH_SIZE)]
            measure("in turn", seconds(lambda p=prompts: [ask(prompt) for prompt in p]))

            short, long = make_prompt(seed := seed + 1, 16), make_prompt(seed := seed + 1, args.long)
            measure("gap alone", longest_gap_s(long_engine, short, args.tokens))
            prefill = lambda p=long: long_engine.generate(p, max_tokens=1)  # noqa: E731
            measure("gap beside a prefill", longest_gap_s(long_engine, short, 100_000, prefill))
            long = make_prompt(seed := seed + 1, args.long)
            measure("slowest prefill step", slowest_step_s(long_engine, long))

            measure("first chunk", first_chunk_s(engine, make_prompt(seed := seed + 1, args.prompt)))
            measure("own first step", own_first_step_s(loaded, make_prompt(seed := seed + 1, args.prompt)))
    median_s = {name: statistics.median(values) for name, values in times.items()}

    def ratio(operation: str, over: str, under: str) -> Figure:
        return Figure(operation, median_s[over] / median_s[under], "x")

    figures = [
        ratio("throughput at once / in turn", "in turn", "at once"),
        ratio("throughput / mlx-lm BatchGenerator", "mlx-lm", "at once"),
        ratio("longest gap beside a prefill / slowest prefill step", "gap beside a prefill", "slowest prefill step"),
        ratio("first chunk / mlx-lm's own first step", "first chunk", "own first step"),
        *(Figure(name, 1e3 * value_s, "ms") for name, value_s in median_s.items()),
    ]
    print_table(figures)
    print_report(arguments=vars(args), figures=[figure.as_dict() for figure in figures])


if __name__ == "__main__":
    main()
