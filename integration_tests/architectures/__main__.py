"""Runs every architecture, or those named, and prints a table.

OMLX_OPENBLAS=0 python -m integration_tests.architectures [model_type ...]
"""

from __future__ import annotations

import sys

from integration_tests.architectures.measure import STEPS, Measurement, measure
from integration_tests.architectures.table import ARCHITECTURES, NOT_TRIED


def main() -> None:
    steps = " ".join(f"{f'step {step}':>8}" for step in STEPS)
    print(f"{'model type':22} {'s':>5} {'finite':6} {'equal':5} {'tokens':>6} {steps}  caches")
    total_s = 0.0
    for model_type in sys.argv[1:] or ARCHITECTURES:
        result = measure(model_type)
        total_s += result.wall_s
        print(f"{model_type:22} {_row(result)}", flush=True)
    for model_type, reason in NOT_TRIED.items():
        print(f"{model_type:22} not tried, {reason}")
    print(f"{total_s:.1f} s to build them and to generate once")


def _row(result: Measurement) -> str:
    differences = " ".join(f"{value:8.1e}" if value else f"{0:8}" for value in result.differences)
    notes = [result.caches]
    if result.never_filled:
        notes.append(f"never filled: {', '.join(map(str, result.never_filled))}")
    if result.unmergeable:
        notes.append(f"no merge: {', '.join(result.unmergeable)}")
    return (
        f"{result.wall_s:5.2f} {result.is_finite!s:6} {result.has_equal_tokens!s:5} {result.num_distinct:6}"
        f" {differences}  {'; '.join(notes)}"
    )


if __name__ == "__main__":
    main()
