"""Whole requests: time to the first token by what is cached, against mlx-lm alone and against what bounds a restore.

    python benchmarks/whole_requests.py [--shape smollm2|small-full|…|qwen3-8b ...] [--tokens 2048 8192] [--runs 5]

A prompt is `--tokens` of context and a question of 32.

- **TTFT** cold, RAM-warm (the same prompt again), for a branch (same context, another question), for the next turn, and
  SSD-warm: by an engine that has just started, with the files in the page cache, and with the page cache dropped.
- **cold / mlx-lm**: against `generate_step` with a prompt cache of its own, at its default step and at the engine's.
- **limits**: the question alone on an mlx-lm cache that holds the context already (*in place*); a copy of that cache
  (*copy*); `preadv` of the block files, one thread, page cache warm (*read*).
- **decode**: tokens per second of 1 and of 8 streams with the cache on and nothing found, against `generate_step` and
  against `BatchGenerator`.

What is compared is measured in turn. On a GPU, mlx-lm and each engine read another conversation of that length first,
untimed.
A table goes to standard error, JSON to standard output. The name is not `requests`, because scripts here would then
import it in place of the library of that name.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import numpy as np
from decode_rate import Decode, DecodeRate
from harness import CAN_DROP_PAGE_CACHE, Figure, drop_page_cache, medians_in_turn, print_report, print_table, seconds
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm_alone import batch_generator_arrivals_s, generate_step_arrivals_s
from models import FAMILIES, SAMPLE_MODEL, SHAPES, build, vocab_size
from tqdm import trange

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.request_timing import (
    Conversation,
    Situation,
    stream_at_once,
    time_from_ssd,
    time_in_process,
    warm_up,
)
from omlx_core.state.handlers import leaves_of

MLX_LM_STEP = 2048
BATCH_SIZE = 8
DECODE_PROMPT_TOKENS = 200  # with an answer of 64 a stream crosses the end of a block, where the cache has work
WAIT_S = 600.0
_OTHER_SEEDS = itertools.count(10**9)

Samples = dict[str, list[float]]


def mlx_lm_ttft_s(model: Any, prompt: Sequence[int], step: int, prompt_cache: list[Any] | None = None) -> float:
    """`generate_step`'s time to its first token."""
    cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    begin_s = time.perf_counter()
    tokens = generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=1, prefill_step_size=step)
    next(tokens)
    elapsed_s = time.perf_counter() - begin_s
    tokens.close()
    mx.synchronize()  # it has begun a token more
    return elapsed_s


def fill_in_place(model: Any, context: Sequence[int]) -> list[Any]:
    """An mlx-lm cache that holds the context, with room for a question and its answer."""
    cache = make_prompt_cache(model)
    for start in range(0, len(context), MLX_LM_STEP):
        model(mx.array(context[start : start + MLX_LM_STEP])[None], cache=cache)
        mx.eval([leaf.state for leaf in cache])
    for leaf in leaves_of(cache).values():
        if type(leaf) is KVCache:
            room = mx.zeros((*leaf.keys.shape[:2], 2 * KVCache.step, leaf.keys.shape[3]), leaf.keys.dtype)
            leaf.keys, leaf.values = (mx.concatenate([x, room], axis=2) for x in (leaf.keys, leaf.values))
            mx.eval(leaf.keys, leaf.values)
    mx.clear_cache()
    return cache


def copy_once_s(prompt_cache: list[Any]) -> tuple[float, int]:
    """Seconds and bytes of copying every array of a cache on its device, or with one thread on a CPU."""
    arrays = [x for _, x in tree_flatten([leaf.state for leaf in prompt_cache]) if isinstance(x, mx.array)]
    mx.eval(arrays)
    size_bytes = sum(x.nbytes for x in arrays)
    if mx.default_device() == mx.gpu:
        copy = lambda: mx.eval([x * 1 for x in arrays])  # noqa: E731
        copy()  # the buffers of the second come from MLX's pool, as those of a restore do
        return seconds(copy), size_bytes
    sources = [np.array(x.view(mx.uint8) if x.dtype == mx.bfloat16 else x) for x in arrays]
    copies = [np.zeros_like(x) for x in sources]
    return seconds(lambda: [np.copyto(*pair) for pair in zip(copies, sources, strict=True)]), size_bytes


def flush(engine: Engine) -> None:
    if not engine.cache.flush(WAIT_S):
        raise RuntimeError("not written in time")


def block_files(directory: str) -> list[Path]:
    return sorted(Path(directory).rglob("*.safetensors"))


def read_s(paths: Sequence[Path]) -> tuple[float, int]:
    """Seconds and bytes of reading files whole, one after the other, into memory that is there already."""
    size_bytes = sum(path.stat().st_size for path in paths)
    buffer = np.zeros(size_bytes, np.uint8)

    def read() -> None:
        at = 0
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            at += os.preadv(fd, [buffer[at:]], 0)
            os.close(fd)
        if at != size_bytes:
            raise RuntimeError(f"{at} of {size_bytes} bytes were read")

    read()
    return seconds(read), size_bytes


# TTFT


def time_requests(
    model: Any, conversation: Conversation, args: argparse.Namespace, samples: Samples, *, is_even: bool
) -> None:
    """One run: everything that is timed of one conversation, added to the samples."""

    def add(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    def add_mlx_lm() -> None:
        add("mlx-lm", mlx_lm_ttft_s(model, conversation.prompt, MLX_LM_STEP))
        add("mlx-lm, engine's step", mlx_lm_ttft_s(model, conversation.prompt, args.step))

    with tempfile.TemporaryDirectory(dir=args.directory) as directory:

        def start() -> Engine:
            cache = CacheSettings(paged_ssd_cache_dir=Path(directory), hot_cache_max_size=0)
            engine = Engine(model, cache=cache, settings=EngineSettings(prefill_step_size=args.step))
            warm_up(engine)
            if mx.default_device() == mx.gpu:
                # CUDA graphs belong to a thread: `warm_up_mlx_lm` makes those of the main thread.
                others = Conversation.draw(next(_OTHER_SEEDS), len(conversation.context), vocab_size(model))
                time_in_process(engine, others)
                flush(engine)
            return engine

        if is_even:
            add_mlx_lm()
        with start() as engine:
            for timing in time_in_process(engine, conversation):
                add(timing.situation, timing.ttft_s)
                add(f"reused, {timing.situation}", timing.reused_tokens)
            flush(engine)
        if not is_even:
            add_mlx_lm()

        in_place = fill_in_place(model, conversation.context)
        copied_s, copied_bytes = copy_once_s(in_place)
        add("copy", copied_s)
        add("copied bytes", copied_bytes)
        add("in place", mlx_lm_ttft_s(model, conversation.question, MLX_LM_STEP, in_place))
        del in_place

        files = block_files(directory)
        elapsed_s, size_bytes = read_s(files)
        add("read bytes/s", size_bytes / elapsed_s)
        for situation in (Situation.SSD, Situation.SSD_DROPPED):
            if situation == Situation.SSD_DROPPED:
                if not CAN_DROP_PAGE_CACHE:
                    continue
                drop_page_cache(files)
            with start() as engine:
                timing = time_from_ssd(engine, conversation, situation)
                add(situation, timing.ttft_s)
                add(f"reused, {situation}", timing.reused_tokens)
                add("restored bytes", engine.cache.ssd.stats().bytes_read)


def warm_up_mlx_lm(model: Any, num_tokens: int, args: argparse.Namespace) -> None:
    """Have mlx-lm do once, untimed, all that it is timed for."""
    conversation = Conversation.draw(next(_OTHER_SEEDS), num_tokens, vocab_size(model))
    for step in (MLX_LM_STEP, args.step):
        mlx_lm_ttft_s(model, conversation.prompt, step)
    mlx_lm_ttft_s(model, conversation.question, MLX_LM_STEP, fill_in_place(model, conversation.context))


def ttft_figures(name: str, medians: dict[str, float]) -> list[Figure]:
    def figure(operation: str, value_s: float, limit_s: float | None = None, bar_s: float | None = None) -> Figure:
        return Figure(
            f"{name}: {operation}",
            1e3 * value_s,
            "ms",
            bar=None if bar_s is None else 1e3 * bar_s,
            limit=None if limit_s is None else 1e3 * limit_s,
        )

    own, same = medians["mlx-lm"], medians["mlx-lm, engine's step"]
    ram_s = medians["in place"] + medians["copy"]
    ssd_s = medians["restored bytes"] / medians["read bytes/s"]
    figures = [
        figure("cold TTFT; limit: mlx-lm", medians[Situation.COLD], own, 1.02 * own),
        figure("cold TTFT; limit: mlx-lm at the engine's step", medians[Situation.COLD], same, 1.02 * same),
    ]
    for situation in (Situation.RAM, Situation.BRANCH):
        figures.append(figure(f"{situation} TTFT; limit: in place + copy", medians[situation], ram_s, 1.2 * ram_s))
    figures.append(figure(f"{Situation.NEXT_TURN} TTFT", medians[Situation.NEXT_TURN]))
    limit_s, bar_s = ram_s + ssd_s, 1.2 * ram_s + ssd_s / 0.8
    figures.append(
        figure(f"{Situation.SSD} TTFT; limit: in place + copy + read", medians[Situation.SSD], limit_s, bar_s)
    )
    if Situation.SSD_DROPPED in medians:
        figures.append(figure(f"{Situation.SSD_DROPPED} TTFT", medians[Situation.SSD_DROPPED]))
    return figures


# Decode


def decode_figures(name: str, model: Any, args: argparse.Namespace) -> list[Figure]:
    """Decoding speed, everything missing the cache."""
    figures, rate = [], DecodeRate(model, DECODE_PROMPT_TOKENS, args.decode_tokens)
    with Engine(model, cache=CacheSettings(), settings=EngineSettings(prefill_step_size=args.step)) as engine:
        warm_up(engine)
        for batch_size, theirs in ((1, generate_step_arrivals_s), (BATCH_SIZE, batch_generator_arrivals_s)):
            ways: dict[str, Decode] = {
                "engine": partial(stream_at_once, engine),
                "mlx-lm": partial(theirs, model),
            }

            measures = {way: partial(rate.tokens_per_s, decode, batch_size) for way, decode in ways.items()}
            medians = medians_in_turn(measures, args.runs, description=f"{name}, decode {batch_size}", warm_up=1)
            limit = medians["mlx-lm"]
            other = "generate_step" if batch_size == 1 else "BatchGenerator"
            figures.append(
                Figure(
                    f"{name}: decode, batch {batch_size}; limit: mlx-lm {other}",
                    medians["engine"],
                    "tokens/s",
                    bar=0.97 * limit,
                    is_floor=True,
                    limit=limit,
                )
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = (SAMPLE_MODEL, *SHAPES)
    parser.add_argument("--shape", choices=shapes, nargs="+", default=[SAMPLE_MODEL, *FAMILIES])
    parser.add_argument("--layers", type=int, help="as many layers as this instead of the shape's")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 1792], help="lengths of the context")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--step", type=int, default=EngineSettings().prefill_step_size, help="prefill_step_size")
    parser.add_argument("--decode-tokens", type=int, default=64, help="length of each answer; 0 leaves decoding out")
    parser.add_argument("--directory", type=Path, help="where to write, on the disk in question")
    args = parser.parse_args()
    figures: list[Figure] = []
    results: list[dict[str, Any]] = []
    for shape in args.shape:
        model = build(shape, layers=args.layers)
        for num_tokens in args.tokens:
            samples: Samples = {}
            name = f"{shape}, {num_tokens:,} tokens"
            if mx.default_device() == mx.gpu:
                warm_up_mlx_lm(model, num_tokens, args)
            for run in trange(args.runs, desc=name):
                conversation = Conversation.draw(1000 * num_tokens + run, num_tokens, vocab_size(model))
                time_requests(model, conversation, args, samples, is_even=run % 2 == 0)
            medians = {key: statistics.median(values) for key, values in samples.items()}
            figures += ttft_figures(name, medians)
            results.append({"shape": shape, "tokens": num_tokens, "medians": medians})
        if args.decode_tokens:
            figures += decode_figures(shape, model, args)
        del model
        mx.clear_cache()
    print_table(figures)
    print_report(
        arguments={key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        figures=[figure.as_dict() for figure in figures],
        requests=results,
    )


if __name__ == "__main__":
    main()
