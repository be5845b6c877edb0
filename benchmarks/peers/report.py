"""From samples to medians, ratios and tables. Knows no peer and measures nothing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Samples:
    """What was measured of one peer, run by run.

    Attributes:
        label: its name.
        seconds: the samples of each measure.
        skipped: why nothing, or nothing more, was measured; None if all was.
    """

    label: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: str | None = None

    def add(self, measured: Mapping[str, Any]) -> None:
        """Take a run's answer; of it, what is named ``…_s``."""
        for name, value in measured.items():
            if name.endswith("_s"):
                self.seconds.setdefault(name, []).append(float(value))

    def medians_s(self) -> dict[str, float]:
        """The median of each measure."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


@dataclass(frozen=True)
class Table:
    """A table of medians, and of their ratios to those of the first row.

    Attributes:
        title: what it is about.
        columns: the measures, each with its heading.
        rows: the peers; the first is what the others are compared with.
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Samples]

    def lines(self) -> list[str]:
        """For people, in Markdown; peers without a single figure follow as notes."""
        measured = [row for row in self.rows if row.seconds]
        baseline = self.rows[0].medians_s()
        cells = [["", *self.columns.values()]]
        for row in measured:
            medians = row.medians_s()
            cells.append([row.label, *(_cell(medians.get(name), baseline.get(name)) for name in self.columns)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        lines = [f"{self.title}, median in ms (ratio to {self.rows[0].label})", ""]
        for row_cells in cells:
            padded = (cell.ljust(width) for cell, width in zip(row_cells, widths, strict=True))
            lines.append(f"| {' | '.join(padded)} |")
        skipped = [f"{row.label}: skipped, {row.skipped}" for row in self.rows if row.skipped is not None]
        return [*lines, *([""] if skipped else []), *skipped]

    def as_dict(self) -> dict[str, Any]:
        """For the report in JSON."""
        baseline = self.rows[0].medians_s()
        return {row.label: _row_as_dict(row, baseline) for row in self.rows}


def _cell(median_s: float | None, baseline_s: float | None) -> str:
    if median_s is None:
        return "-"
    text = f"{1e3 * median_s:,.3g}" if median_s < 1 else f"{1e3 * median_s:,.0f}"
    return text if baseline_s is None else f"{text} ({median_s / baseline_s:.2g}x)"


def _row_as_dict(row: Samples, baseline: Mapping[str, float]) -> dict[str, Any]:
    medians = row.medians_s()
    return {
        "median_ms": {name: float(f"{1e3 * value:.4g}") for name, value in medians.items()},
        "ratio": {
            name: float(f"{value / baseline[name]:.3g}") for name, value in medians.items() if baseline.get(name)
        },
        "samples_ms": {name: [float(f"{1e3 * value:.4g}") for value in values] for name, values in row.seconds.items()},
        "skipped": row.skipped,
    }
