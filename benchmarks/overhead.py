"""What the engine costs for each decoded token beyond mlx-lm's own loop over `BatchGenerator`.

    python benchmarks/overhead.py [--model minimal smollm2] [--tokens 400] [--runs 7] [--profile FILE]

Eight streams decode the same prompts in both. The overhead *per token* is the step's divided by eight, the number of
tokens that a step gives; the figures of a whole step are given too. Callers wait on a thread each, or on one event
loop.

- *overhead*: how much longer a step takes than one of mlx-lm's loop. Where a step takes long, its noise is larger.
- *between steps*: the time from the end of one call of `BatchGenerator.next` to the beginning of the next one, median.
  It has no such noise, and misses what callers take from the interpreter's lock during a call.

- **minimal**: a model of one layer, of which a step is almost all Python.
- **smollm2**: the real model, and with it the text of its answers.

`--profile` writes what cProfile says of the engine's thread.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Sequence
from functools import partial

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from decode_rate import Decode, DecodeRate, Prompts
from harness import Figure, medians_in_turn, print_report, print_table
from mlx_lm_alone import batch_generator_arrivals_s
from models import SAMPLE_MODEL, build
from steps import between_steps_us, timed_steps

from omlx_core import CacheSettings, Engine
from omlx_core.model.loading import load_model
from omlx_core.model.sample_model import ensure_sample_model
from omlx_core.request_timing import stream_at_once, warm_up

BATCH_SIZE = 8
PROMPT_TOKENS = 32
BAR_US = 150.0


def on_event_loop(engine: Engine, prompts: Prompts, num_tokens: int) -> list[list[float]]:
    """When each token of each answer came, all of them awaited on one event loop."""

    async def arrivals_s(prompt: Sequence[int]) -> list[float]:
        stream = engine.astream(prompt, max_tokens=num_tokens)
        return [time.perf_counter() async for chunk in stream if chunk.token_ids]

    async def gather() -> list[list[float]]:
        return await asyncio.gather(*map(arrivals_s, prompts))

    return asyncio.run(gather())


def open_engine(name: str) -> Engine:
    if name == SAMPLE_MODEL:
        loaded = load_model(ensure_sample_model())
        return Engine(loaded.model, loaded.tokenizer, cache=CacheSettings())
    return Engine(build(name), cache=CacheSettings())


def measure(name: str, args: argparse.Namespace) -> list[Figure]:
    with open_engine(name) as engine:
        model = engine._scheduler._model
        warm_up(engine)
        rate = DecodeRate(model, PROMPT_TOKENS, args.tokens)

        def us_per_token(decode: Decode) -> float:
            return 1e6 / rate.tokens_per_s(decode, BATCH_SIZE)

        ways: dict[str, Decode] = {
            "BatchGenerator": partial(batch_generator_arrivals_s, model),
            "threads": partial(stream_at_once, engine),
            "event loop": partial(on_event_loop, engine),
        }
        measures = {way: partial(us_per_token, decode) for way, decode in ways.items()}
        medians = medians_in_turn(measures, args.runs, description=name, warm_up=1)
        gaps_us = {}
        for way in ("threads", "event loop"):
            with timed_steps() as calls:
                us_per_token(ways[way])
            gaps_us[way] = between_steps_us(calls, BATCH_SIZE)
        if args.profile:
            profile = cProfile.Profile()
            engine._scheduler.thread.call(profile.enable)
            us_per_token(ways["threads"])
            engine._scheduler.thread.call(profile.disable)
            pstats.Stats(profile).dump_stats(f"{args.profile}.{name}")
    base_us = medians["BatchGenerator"]
    figures = [Figure(f"{name}: BatchGenerator, per step", BATCH_SIZE * base_us, "us")]
    for way in ("threads", "event loop"):
        over_us = medians[way] - base_us
        figures += [
            Figure(f"{name}: overhead per token, {way}", over_us, "us", bar=BAR_US),
            Figure(f"{name}: overhead per step of {BATCH_SIZE}, {way}", BATCH_SIZE * over_us, "us"),
            Figure(f"{name}: between steps, per token, {way}", gaps_us[way] / BATCH_SIZE, "us", bar=BAR_US),
            Figure(f"{name}: between steps of {BATCH_SIZE}, {way}", gaps_us[way], "us"),
        ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["minimal", SAMPLE_MODEL])
    parser.add_argument("--tokens", type=int, default=400, help="length of each answer")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--profile", metavar="FILE", help="write the profile of the engine's thread to FILE.MODEL")
    args = parser.parse_args()
    figures = [figure for name in args.model for figure in measure(name, args)]
    print_table(figures)
    print_report(arguments=vars(args), figures=[figure.as_dict() for figure in figures])


if __name__ == "__main__":
    main()
