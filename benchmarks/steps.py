"""The steps of a running batch, seen from outside."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import BatchGenerator


@contextmanager
def timed_steps() -> Iterator[list[tuple[float, float, int]]]:
    """Record when each call of `BatchGenerator.next` begins and ends, and how many tokens it gives."""
    calls: list[tuple[float, float, int]] = []
    original = BatchGenerator.next

    def timed(self: BatchGenerator) -> Any:
        begin_s = time.perf_counter()
        responses = original(self)
        calls.append((begin_s, time.perf_counter(), len(responses[1])))
        return responses

    BatchGenerator.next = timed
    try:
        yield calls
    finally:
        BatchGenerator.next = original


def between_steps_us(calls: Sequence[tuple[float, float, int]], batch_size: int) -> float:
    """The median time between two steps that give a token to each of `batch_size` streams, in microseconds."""
    gaps_s = [
        begin_s - end_s
        for (_, end_s, before), (begin_s, _, after) in itertools.pairwise(calls)
        if before == after == batch_size
    ]
    return 1e6 * statistics.median(gaps_s)
