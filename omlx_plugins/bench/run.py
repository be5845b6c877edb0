"""Measures a model, prints the table, and writes the figures and the plot."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omlx_core import CacheSettings, Engine
from omlx_core.environment import describe_environment
from omlx_core.errors import EngineError, InvalidParameterError
from omlx_core.request_timing import (
    ANSWER_TOKENS,
    MEANINGS,
    QUESTION_TOKENS,
    Conversation,
    Situation,
    Timing,
    decode_tokens_per_s,
    draw_tokens,
    stream_at_once,
    time_in_process,
    warm_up,
)
from omlx_core.settings import user_cache_dir
from omlx_plugins.bench.child import Job
from omlx_plugins.bench.plot import bar_chart
from omlx_plugins.plugins import register_state_handlers

DEFAULT_TOKENS = (1024, 4096)
BATCH_SIZES = (1, 8)
_SITUATIONS = [situation for situation in Situation if situation != Situation.SSD_DROPPED]
# What the next turn has besides the context.
_MORE_TOKENS = 2 * QUESTION_TOKENS + ANSWER_TOKENS + 1
_DECODE_PROMPT_TOKENS = 64
_DECODE_SEED = 1 << 20  # conversations have those below
_FLUSH_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result.

    Attributes:
        context_tokens: length of the context.
        situation: what the cache had.
        prompt_tokens: tokens of the prompt.
        reused_tokens: of these, how many came from the cache; the median.
        ttft_s: the median time to the first token, in seconds.
        fastest_s: the shortest.
        slowest_s: the longest.
    """

    context_tokens: int
    situation: Situation
    prompt_tokens: int
    reused_tokens: int
    ttft_s: float
    fastest_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured.

    Attributes:
        rows: by length of the context, and in it by situation.
        decode_tokens_per_s: the median speed of all streams together, by their number; None where one ended before
            another began.
    """

    rows: list[Row]
    decode_tokens_per_s: dict[int, float | None]


def run(
    *,
    model: str | None,
    tokens: Sequence[int] | None,
    runs: int,
    decode_tokens: int,
    directory: Path | None,
    json_path: Path | None,
    svg_path: Path | None,
    cache_options: Mapping[str, Any],
) -> int:
    """Run the benchmark; see ``omlx-plugins bench --help``.

    Returns:
        The exit status.

    Raises:
        InvalidParameterError: a number that can't be measured with.
        MissingDependencyError: a plot is wanted and matplotlib isn't there.
        OMLXError: the model can't be loaded or run.
    """
    for flag, number, least in (("runs", runs, 1), ("decode-tokens", decode_tokens, 2)):
        if number < least:
            raise InvalidParameterError(f"--{flag} {number}: give at least {least}")
    if model is None:
        from omlx_core.model.sample_model import ensure_sample_model

        model = str(ensure_sample_model())
    parent = user_cache_dir() if directory is None else directory
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder:
        environment = describe_environment()
        result = measure(model, tokens, runs, decode_tokens, {**cache_options, "paged_ssd_cache_dir": folder})
    print(render(result))
    name = Path(model).name
    if json_path is not None:
        content = {"model": name, **environment, "runs": runs, **dataclasses.asdict(result)}
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    if svg_path is not None:
        bar_chart(svg_path, f"{name}: time to the first token", "s", _bars(result.rows))
    return 0


def measure(
    model: str, tokens: Sequence[int] | None, runs: int, decode_tokens: int, cache_options: dict[str, Any]
) -> Result:
    """Measure everything, each run with conversations of its own.

    Args:
        model: a folder or a repository id.
        tokens: lengths of the context; None takes those of `DEFAULT_TOKENS` that fit the model.
        runs: how many of each.
        decode_tokens: length of the answers that the decoding speed is taken from.
        cache_options: keyword arguments of `CacheSettings`, with an empty folder for the SSD tier.
    """
    register_state_handlers()
    with Engine.from_pretrained(model, cache=CacheSettings(**cache_options)) as engine:
        lengths = _lengths(engine.context_length, tokens)
        vocab_size = len(engine.tokenizer.get_vocab())
        conversations = [(run * len(lengths) + index, n) for run in range(runs) for index, n in enumerate(lengths)]
        num_steps = len(conversations) * len(_SITUATIONS) + runs * len(BATCH_SIZES)
        bar = tqdm(total=num_steps, unit=" requests", desc="Warming up")
        warm_up(engine)
        timings = []
        for seed, num_tokens in conversations:
            bar.set_description(f"{num_tokens:,} tokens")
            found = time_in_process(engine, Conversation.draw(seed, num_tokens, vocab_size))
            timings += [(num_tokens, timing) for timing in found]
            bar.update(len(found))
        rates = _measure_decoding(engine, vocab_size, runs, decode_tokens, bar)
        engine.cache.flush(_FLUSH_TIMEOUT_S)
    # The first engine is closed by now: a model that fills half of the memory can be measured, too.
    bar.set_description("New process")
    restored = _in_new_process(Job(model, cache_options, vocab_size, conversations))
    for (_, num_tokens), timing in zip(conversations, restored, strict=True):
        timings.append((num_tokens, timing))
        bar.update()
    bar.close()
    return Result(summarize(timings), rates)


def _measure_decoding(
    engine: Engine, vocab_size: int, runs: int, decode_tokens: int, bar: Any
) -> dict[int, float | None]:
    rates: dict[int, list[float]] = {batch_size: [] for batch_size in BATCH_SIZES}
    for run in range(runs):
        for batch_size in BATCH_SIZES:
            bar.set_description(f"Decoding, {batch_size} at once")
            seeds = range(_DECODE_SEED + run * batch_size, _DECODE_SEED + (run + 1) * batch_size)
            prompts = [draw_tokens(seed, _DECODE_PROMPT_TOKENS, vocab_size) for seed in seeds]
            rate = decode_tokens_per_s(stream_at_once(engine, prompts, decode_tokens))
            rates[batch_size] += [] if rate is None else [rate]
            bar.update()
    return {batch_size: statistics.median(found) if found else None for batch_size, found in rates.items()}


def _lengths(context_length: int | None, tokens: Sequence[int] | None) -> list[int]:
    room = sys.maxsize if context_length is None else context_length - _MORE_TOKENS
    if tokens is None:
        return [n for n in DEFAULT_TOKENS if n <= room] or [max(room // 2, 1)]
    for num_tokens in tokens:
        if not 1 <= num_tokens <= room:
            raise InvalidParameterError(
                f"--tokens {num_tokens}: give 1 to {room}, since the model's context has {context_length} tokens and "
                f"{_MORE_TOKENS} of them are for the questions"
            )
    return list(dict.fromkeys(tokens))


def _in_new_process(job: Job) -> Iterator[Timing]:
    command = [sys.executable, "-m", "omlx_plugins.bench.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise EngineError("the new process has no pipes")
        process.stdin.write(json.dumps(dataclasses.asdict(job)))
        process.stdin.close()
        for line in process.stdout:
            fields = json.loads(line)
            yield Timing(**{**fields, "situation": Situation(fields["situation"])})
    if process.returncode:
        raise EngineError(f"the new process ended with status {process.returncode}; what it said is above")


def summarize(timings: Sequence[tuple[int, Timing]]) -> list[Row]:
    """Medians by length of the context and situation, in the order of their first appearance.

    Args:
        timings: each with the length of its context.
    """
    groups: dict[tuple[int, Situation], list[Timing]] = {}
    for num_tokens, timing in timings:
        groups.setdefault((num_tokens, timing.situation), []).append(timing)
    lengths = list(dict.fromkeys(num_tokens for num_tokens, _ in groups))
    return [
        _row(num_tokens, situation, found)
        for length in lengths
        for (num_tokens, situation), found in groups.items()
        if num_tokens == length
    ]


def _row(num_tokens: int, situation: Situation, timings: Sequence[Timing]) -> Row:
    times_s = [timing.ttft_s for timing in timings]
    return Row(
        context_tokens=num_tokens,
        situation=situation,
        prompt_tokens=timings[0].prompt_tokens,
        reused_tokens=statistics.median_low([timing.reused_tokens for timing in timings]),
        ttft_s=statistics.median(times_s),
        fastest_s=min(times_s),
        slowest_s=max(times_s),
    )


def render(result: Result) -> str:
    """The result as a table for people."""
    header = ("context", "request", "prompt", "reused", "first token", "fastest - slowest", "of cold")
    lines = [header]
    cold_s = {row.context_tokens: row.ttft_s for row in result.rows if row.situation == Situation.COLD}
    for row in result.rows:
        lines.append(
            (
                f"{row.context_tokens:,}",
                row.situation,
                f"{row.prompt_tokens:,}",
                f"{row.reused_tokens:,}",
                f"{row.ttft_s:.3f} s",
                f"{row.fastest_s:.3f} - {row.slowest_s:.3f} s",
                f"{row.ttft_s / cold_s[row.context_tokens]:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    decode = [
        f"decode, {batch_size} at once: " + ("ended too early to tell" if rate is None else f"{rate:.1f} tokens/s")
        for batch_size, rate in result.decode_tokens_per_s.items()
    ]
    meanings = [f"{situation}: {MEANINGS[situation]}" for situation in _SITUATIONS]
    return "\n".join([*table, "", *decode, "", *meanings])


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(f"{row.context_tokens:,} tokens", {})[row.situation] = row.ttft_s
    return groups
