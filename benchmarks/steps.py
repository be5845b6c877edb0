"""The steps of a running batch, seen from outside."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import BatchGenerator

from omlx_core.engine.sequential_batch import SequentialBatch


@contextmanager
def timed_steps() -> Iterator[list[tuple[float, float, int]]]:
    """Record when each step of the batch, or of a lone answer, begins and ends, and how many tokens it gives."""
    calls: list[tuple[float, float, int]] = []
    originals = {batch: batch.next for batch in (BatchGenerator, SequentialBatch)}

    def timed(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def step(batch: Any) -> Any:
            begin_s = time.perf_counter()
            responses = original(batch)
            calls.append((begin_s, time.perf_counter(), len(responses[1])))
            return responses

        return step

    for batch, original in originals.items():
        batch.next = timed(original)
    try:
        yield calls
    finally:
        for batch, original in originals.items():
            batch.next = original


def between_steps_us(calls: Sequence[tuple[float, float, int]], batch_size: int) -> float:
    """The median time between two steps that give a token to each of `batch_size` streams, in microseconds."""
    gaps_s = [
        begin_s - end_s
        for (_, end_s, before), (begin_s, _, after) in itertools.pairwise(calls)
        if before == after == batch_size
    ]
    return 1e6 * statistics.median(gaps_s)
