"""What the benchmarks share: timing in turn, medians, a JSON report, and a table of figures against their bars.

Alternatives are always measured in turn, in both orders, so that a busy machine is equally bad for each. Their ratio
can then be trusted where the times themselves can't.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import trange

from omlx_core.environment import describe_environment

CAN_DROP_PAGE_CACHE = hasattr(os, "posix_fadvise")
ENVIRONMENT = describe_environment()  # taken before anything is measured: its load is what else the machine does


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes. What it returns is freed afterwards, outside the time."""
    begin_s = time.perf_counter()
    result = action()
    elapsed_s = time.perf_counter() - begin_s
    del result
    return elapsed_s


def median_s(action: Callable[[], object], runs: int) -> float:
    """The median time of a call that has no alternative."""
    return statistics.median(seconds(action) for _ in range(runs))


def medians_in_turn(
    measures: Mapping[str, Callable[[], float]], runs: int, *, description: str = "runs", warm_up: int = 0
) -> dict[str, float]:
    """The medians of what several measures return, each called once per run, every other run in reverse order.

    Args:
        measures: each prepares, measures and cleans up by itself, and returns the seconds, or bytes, that count.
        runs: how many of each count.
        description: of the progress bar.
        warm_up: runs before those, that don't count.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    for run in trange(warm_up + runs, desc=description):
        for name in list(measures)[:: 1 if run % 2 else -1]:
            value = measures[name]()
            if run >= warm_up:
                values[name].append(value)
    return {name: statistics.median(samples) for name, samples in values.items()}


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Have the system forget what it keeps of files, if it `CAN_DROP_PAGE_CACHE`."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def print_report(**content: Any) -> None:
    """Print the environment and what was found as JSON, to standard output."""
    json.dump({**ENVIRONMENT, **content}, sys.stdout, indent=2)
    print()


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and the bar that it has to stay under.

    Attributes:
        operation: what was measured, and against what.
        value: the figure.
        unit: its unit, such as "ms"; "x" for a ratio.
        bar: the highest value that is good enough; None if the figure only informs.
        is_floor: the bar is the lowest that is good enough instead.
        limit: the same, of the way that it is set against: what the hardware or the other library takes.
    """

    operation: str
    value: float
    unit: str
    bar: float | None = None
    is_floor: bool = False
    limit: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is kept; None without one."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.is_floor else self.value <= self.bar

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "operation": self.operation,
            "value": float(f"{self.value:.4g}"),
            "unit": self.unit,
            "bar": self.bar,
            "is_floor": self.is_floor,
            "limit": None if self.limit is None else float(f"{self.limit:.4g}"),
            "met": self.is_met,
        }


def print_table(figures: Sequence[Figure]) -> None:
    """Print the figures for people, to standard error, so that standard output is JSON alone."""
    rows = [("operation", "measured", "limit", "bar", "")]
    for figure in figures:
        limit = "" if figure.limit is None else f"{figure.limit:.3g} {figure.unit}"
        bar = "" if figure.bar is None else f"{'>=' if figure.is_floor else '<='} {figure.bar:.3g} {figure.unit}"
        met = {None: "", True: "met", False: "MISSED"}[figure.is_met]
        rows.append((figure.operation, f"{figure.value:.3g} {figure.unit}", limit, bar, met))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=sys.stderr)
