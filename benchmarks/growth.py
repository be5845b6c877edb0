"""How time and memory grow: with the context, with what is stored, with requests at once.

    python benchmarks/growth.py [--only context bookkeeping stored concurrent waiting] [--runs 3] [--max-context 131072]

Every series is set against its *work*: how what has to be done grows with the same number. A restore moves all bytes of
a prefix, so its work grows with the first power; a look-up in a cache that holds more has no more to do, and its power
is 0. The *exponent* is the slope of the upper half of the points on logarithmic axes, where fixed costs count little.

- **context**: TTFT cold, RAM-warm and SSD-warm, and bytes in RAM and on SSD, against 1k to 128k tokens. The model's
  computation is linear, since the square that attention adds would hide the rest.
- **bookkeeping**: the pool alone, without a model: matching, publishing, holding and freeing up to 10M tokens.
- **stored**: TTFT of a prompt that is cached, and of one that isn't, against 1 to 256 stored conversations.
- **concurrent**: the engine's time between two steps of the batch, the last TTFT of requests that come at once, and
  memory, against 1 to 32 of them.
- **waiting**: the same time between two steps, against 1 to 1,024 requests that wait in line.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import numpy as np
from harness import Figure, print_report, print_table, seconds
from models import LINEAR, build, vocab_size
from steps import between_steps_us, timed_steps
from tqdm import tqdm

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.cache.block_hash import hash_namespace
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.request_timing import Conversation, Situation, draw_tokens, time_from_ssd, time_in_process, warm_up

BLOCK_SIZE = 256
WAIT_S = 600.0
TIME_TOLERANCE = 0.15
BYTES_TOLERANCE = 0.03
NAMESPACE = hash_namespace({"benchmark": "growth"})


@dataclass
class Series:
    """What was measured at several sizes.

    Attributes:
        name: what was measured.
        axis: what was varied.
        unit: of the values.
        work: the exponent with which the work grows.
        tolerance: how much more the exponent may be.
        samples: the values at each size.
    """

    name: str
    axis: str
    unit: str
    work: float
    tolerance: float = TIME_TOLERANCE
    samples: dict[int, list[float]] = field(default_factory=dict)

    def add(self, size: int, value: float) -> None:
        self.samples.setdefault(size, []).append(value)

    @property
    def points(self) -> list[tuple[int, float]]:
        return [(size, statistics.median(values)) for size, values in sorted(self.samples.items())]

    @property
    def exponent(self) -> float:
        """Slope over the upper half of the sizes, on logarithmic axes."""
        points = self.points[-max(len(self.points) // 2 + 1, 2) :]
        sizes, values = np.log(np.array(points, float)).T
        return float(np.polyfit(sizes, values, 1)[0])

    def figure(self) -> Figure:
        name = f"{self.name} against {self.axis}: growth exponent"
        return Figure(name, self.exponent, "", bar=self.work + self.tolerance, limit=self.work)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "axis": self.axis,
            "unit": self.unit,
            "work": self.work,
            "exponent": round(self.exponent, 3),
            "points": [[size, float(f"{value:.4g}")] for size, value in self.points],
        }


def powers(first: int, last: int, factor: int = 2) -> list[int]:
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


def measure_context(args: argparse.Namespace) -> list[Series]:
    axis = "tokens of context"
    times = {s: Series(f"{s} TTFT", axis, "s", 1.0) for s in Situation if s != Situation.SSD_DROPPED}
    ram, ssd, peak = (
        Series(name, axis, "bytes", 1.0, BYTES_TOLERANCE)
        for name in ("bytes in RAM", "bytes on SSD", "peak of MLX's memory")
    )
    model = build(LINEAR)
    for num_tokens in tqdm(powers(1024, args.max_context), desc="context"):
        for run in range(args.runs):
            conversation = Conversation.draw(run, num_tokens, vocab_size(model))
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                cache = CacheSettings(paged_ssd_cache_dir=Path(directory), hot_cache_max_size=0)
                mx.clear_cache()
                mx.reset_peak_memory()
                before_bytes = mx.get_active_memory()
                with Engine(model, cache=cache) as engine:
                    warm_up(engine)
                    timings = time_in_process(engine, conversation)
                    peak.add(num_tokens, mx.get_peak_memory() - before_bytes)
                    engine.cache.flush(WAIT_S)
                    stats = engine.cache.stats()
                    ram.add(num_tokens, stats.hot.hot_bytes)
                    ssd.add(num_tokens, stats.cold.size_bytes)
                with Engine(model, cache=cache) as engine:
                    warm_up(engine)
                    timings.append(time_from_ssd(engine, conversation))
            for timing in timings:
                times[timing.situation].add(num_tokens, timing.ttft_s)
    return [*times.values(), ram, ssd, peak]


def measure_bookkeeping(args: argparse.Namespace) -> list[Series]:
    """The pool and its index, with blocks of one byte."""
    axis = "tokens in the pool"
    names = ("account for", "publish", "match", "fork", "free")
    times = {name: Series(name, axis, "s", 1.0) for name in names}
    # The pool and Python's lists grow by factors, so that what they take is up to twice what they need.
    memory = Series("memory of the records", axis, "bytes", 1.0, tolerance=TIME_TOLERANCE)
    payload = BlockPayload({"rows": BlockTensor("U8", (1,), memoryview(b"x"))})
    for num_tokens in tqdm(powers(10_000, 10_000_000, 10), desc="bookkeeping"):
        tokens = np.random.default_rng(0).integers(0, 150_000, num_tokens).tolist()
        for run in range(1 + args.runs):
            is_traced = not run
            gc.collect()
            if is_traced:
                tracemalloc.start()
            paged = PagedCacheManager(NAMESPACE, block_size=BLOCK_SIZE)
            table = paged.get_computed_blocks(tokens)

            def account(paged: PagedCacheManager = paged, table: Any = table, tokens: list[int] = tokens) -> None:
                for start in range(0, len(tokens), 512):  # a prefill step
                    paged.append_tokens(table, tokens[start : start + 512])

            def publish(paged: PagedCacheManager = paged, table: Any = table) -> None:
                while (full := paged.next_full_block(table)) is not None:
                    paged.commit_block(table, full, payload)

            steps: list[tuple[str, Callable[[], object]]] = [("account for", account), ("publish", publish)]
            found: list[Any] = []
            steps += [
                ("fork", lambda paged=paged, table=table, found=found: found.append(paged.fork_block_table(table))),
                ("free", lambda paged=paged, table=table: paged.free_block_table(table)),
                ("match", lambda paged=paged, found=found, ids=tokens: found.append(paged.get_computed_blocks(ids))),
            ]
            for name, action in steps:
                elapsed_s = seconds(action)
                if not is_traced:  # tracing slows all of it down
                    times[name].add(num_tokens, elapsed_s)
            for forked in found:
                paged.free_block_table(forked)
            found.clear()
            if is_traced:
                memory.add(num_tokens, tracemalloc.get_traced_memory()[0])
                tracemalloc.stop()
    return [*times.values(), memory]


def measure_stored(args: argparse.Namespace) -> list[Series]:
    axis = "stored conversations"
    warm, cold, branch = (
        Series(f"{name} TTFT", axis, "s", 0.0) for name in (Situation.RAM, Situation.COLD, Situation.BRANCH)
    )
    ram = Series("bytes in RAM", axis, "bytes", 1.0, BYTES_TOLERANCE)
    series = {Situation.RAM: warm, Situation.COLD: cold, Situation.BRANCH: branch}
    model = build(LINEAR)
    with Engine(model, cache=CacheSettings()) as engine:
        warm_up(engine)
        shared = draw_tokens(0, 2 * BLOCK_SIZE, vocab_size(model))  # the system prompt of all conversations

        def ask(conversation: Conversation) -> list[Any]:
            context = shared + conversation.context
            whole = Conversation(context, conversation.question, conversation.other_question, conversation.reply)
            return time_in_process(engine, whole)

        num_stored = probe_bytes = 0
        for size in tqdm(powers(1, 256), desc="stored"):
            while num_stored < size:
                num_stored += 1
                ask(Conversation.draw(num_stored, 2 * BLOCK_SIZE, vocab_size(model)))
            before_bytes = engine.cache.stats().hot.hot_bytes
            ram.add(size, before_bytes - probe_bytes)
            for run in range(3 * args.runs):
                for timing in ask(Conversation.draw(10_000 * size + run, 2 * BLOCK_SIZE, vocab_size(model))):
                    if timing.situation in series:
                        series[timing.situation].add(size, timing.ttft_s)
            probe_bytes += engine.cache.stats().hot.hot_bytes - before_bytes
    return [warm, cold, branch, ram]


def measure_concurrent(args: argparse.Namespace) -> list[Series]:
    axis = "requests at once"
    gap = Series("time between two steps", axis, "us", 1.0)
    cold, warm = (Series(f"last {name} TTFT", axis, "s", 1.0) for name in (Situation.COLD, Situation.RAM))
    memory = Series("MLX's memory while they decode", axis, "bytes", 1.0, BYTES_TOLERANCE)
    model = build(LINEAR)
    for size in tqdm(powers(1, 32), desc="concurrent"):
        with Engine(model, cache=CacheSettings()) as engine, ThreadPoolExecutor(size) as callers:
            warm_up(engine)
            for run in range(args.runs):
                prompts = [draw_tokens(1000 * run + s, 2 * BLOCK_SIZE + 32, vocab_size(model)) for s in range(size)]

                def ask(prompt: Sequence[int], num_tokens: int, engine: Engine = engine) -> float:
                    return engine.generate(prompt, max_tokens=num_tokens).ttft_s

                for series in (cold, warm):
                    series.add(size, max(callers.map(ask, prompts, [1] * size)))
                with timed_steps() as calls:
                    list(callers.map(ask, prompts, [100] * size))
                gap.add(size, between_steps_us(calls, size))
                mx.clear_cache()
                mx.reset_peak_memory()
                before_bytes = mx.get_active_memory()
                list(callers.map(ask, prompts, [20] * size))
                memory.add(size, mx.get_peak_memory() - before_bytes)
    return [gap, cold, warm, memory]


def measure_waiting(args: argparse.Namespace) -> list[Series]:
    """A stream decodes while others wait for room in the batch, which has none."""
    series = Series("time between two steps", "requests that wait in line", "us", 0.0)
    model = build(LINEAR)
    for size in tqdm(powers(1, 1024, 4), desc="waiting"):
        for run in range(args.runs):
            series.add(size, asyncio.run(_step_beside_waiting(model, size, run)))
    return [series]


async def _step_beside_waiting(model: Any, num_waiting: int, seed: int) -> float:
    settings = EngineSettings(max_batch_size=1)
    with Engine(model, cache=CacheSettings(), settings=settings) as engine:
        warm_up(engine)
        stream = engine.astream(draw_tokens(seed, 32, vocab_size(model)), max_tokens=500_000)
        await anext(stream)
        prompts = [draw_tokens(1 + seed + index, 32, vocab_size(model)) for index in range(num_waiting)]
        waiting = [asyncio.create_task(engine.agenerate(prompt, max_tokens=1)) for prompt in prompts]
        while engine.num_active_requests <= num_waiting:
            await anext(stream)
        with timed_steps() as calls:
            while len(calls) < 200:
                await anext(stream)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await stream.aclose()
    return between_steps_us(calls, 1)


GROUPS = {
    "context": measure_context,
    "bookkeeping": measure_bookkeeping,
    "stored": measure_stored,
    "concurrent": measure_concurrent,
    "waiting": measure_waiting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-context", type=int, default=131072)
    parser.add_argument("--directory", type=Path, help="where to write, on the disk in question")
    args = parser.parse_args()
    series = [each for group in args.only for each in GROUPS[group](args)]
    figures = [each.figure() for each in series]
    print_table(figures)
    print_report(
        arguments={key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        figures=[figure.as_dict() for figure in figures],
        series=[each.as_dict() for each in series],
    )


if __name__ == "__main__":
    main()
