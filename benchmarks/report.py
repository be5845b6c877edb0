"""Make ``docs/performance.md`` and its plots of the benchmarks' results.

    python benchmarks/report.py [RESULT.json ...]

Without arguments, of all in ``benchmarks/results``; the JSON files go to ``docs/performance`` with the plots, and
results that are there from other machines stay on the page. Of the page itself only the part from the heading
"What was tried and did not help" on is kept: that is written by people.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omlx_plugins.bench.plot import bar_chart, line_chart

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PROSE_HEADING = "## What was tried and did not help"
# Results are shown in this order, those of other names after them.
TITLES = {
    "whole_requests": "Whole requests",
    "cache_ops": "The cache's own operations",
    "overhead": "The engine's overhead per token",
    "batching": "Many requests at once",
    "growth": "Growth",
    "cold_tier": "The SSD tier",
    "writer_busy": "Decoding while the SSD tier writes",
    "cold_bits": "Eight bits on SSD",
    "peers": "Beside other caches",
}
INTRODUCTION = """# Performance

Medians of the scripts in `benchmarks/`, which say in their first lines what each figure is. What is compared was
measured in turn. A *limit* is what the hardware or the other library takes for the same work; a *bar* is what a figure
has to keep to. `make bench` measures again, and `python benchmarks/report.py` writes this page from the results, which
are beside the plots in `docs/performance`. For a model of your own: `omlx-plugins bench --model …`.
"""
PEER_TABLES = {"cache": "64 MiB of keys and values, no model", "requests": "Time to the first token"}
_NO_FIGURES = ("machine", "device", "backend", "load", "versions", "arguments", "runs")

Result = Mapping[str, Any]
Plot = tuple[str, Callable[[Path], None]]


def title_of(name: str) -> str:
    """The heading of a result: by the script's name, and what the file's name says after a dash."""
    script, _, where = name.partition("-")
    return TITLES.get(script, script) + (f" ({where})" if where else "")


def order_of(name: str) -> tuple[int, str]:
    script = name.partition("-")[0]
    return (list(TITLES).index(script) if script in TITLES else len(TITLES), name)


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, alignment, *rows))


def figure_table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Every figure, with its limit and its bar beside it."""
    rows = []
    for figure in figures:
        unit, bar, limit = figure["unit"], figure.get("bar"), figure.get("limit")
        sign = "≥" if figure.get("is_floor") else "≤"
        with_unit = lambda value, unit=unit: f"{number(value)} {unit}".rstrip()  # noqa: E731
        rows.append(
            (
                figure["operation"],
                with_unit(figure["value"]),
                "" if limit is None else with_unit(limit),
                "" if bar is None else f"{sign} {with_unit(bar)}",
                {None: "", True: "met", False: "**missed**"}[figure.get("met")],
            )
        )
    return table(("", "measured", "limit", "bar", ""), rows)


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The values of a nested result, each with the path to it."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        path = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flatten(value, f"{path}: ")
        else:
            rows.append((path, number(value) if isinstance(value, (int, float)) else str(value)))
    return rows


def peer_tables(result: Result) -> str:
    """The medians of each peer, and their ratios to the first one's."""
    tables = []
    for group, title in PEER_TABLES.items():
        columns = result["columns"].get(group, {})
        rows = []
        for label, row in result.get(group, {}).items():
            if row["median_ms"]:
                rows.append((label, *(_peer_cell(row, name) for name in columns)))
        if rows:
            tables.append(table((f"{title}: ms", *columns.values()), rows))
    notes = []
    for label, peer in result["peers"].items():
        facts = [f"{name} {version}" for name, version in peer["versions"].items()]
        facts += [] if peer["written_is_durable"] else ["doesn't sync what it has written"]
        facts += ["answers differ by where its cache comes from"] if peer["same_answers"] is False else []
        notes.append(f"- {label}: {', '.join(facts)}.")
    notes += [f"- {label}: not measured, {why}." for label, why in result["missing"].items()]
    return "\n\n".join([*tables, "\n".join(notes)])


def _peer_cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["median_ms"]:
        return ""
    ratio = row["ratio"].get(name)
    return number(row["median_ms"][name]) + ("" if ratio is None else f" ({number(ratio)} x)")


def plots_of(name: str, result: Result) -> list[Plot]:
    """What can be drawn of a result: the name of each plot, and what draws it to a path."""
    plots: list[Plot] = []
    if "peers" in result:
        return plots
    for shape in dict.fromkeys(request["shape"] for request in result.get("requests", ())):
        groups = {
            f"{request['tokens']:,} tokens": {
                situation: value
                for situation, value in request["medians"].items()
                if situation in ("mlx-lm", "cold", "RAM-warm", "branch", "next turn", "in place")
                or situation.startswith("SSD-warm")
            }
            for request in result["requests"]
            if request["shape"] == shape
        }
        title = f"{shape}: time to the first token"
        plots.append((f"{name}-{shape}", partial(bar_chart, title=title, unit="s", groups=groups)))
    axes = dict.fromkeys((series["axis"], series["unit"]) for series in result.get("series", ()))
    for axis, unit in axes:
        lines = {
            f"{series['name']}: {series['exponent']:.2f}": series["points"]
            for series in result["series"]
            if (series["axis"], series["unit"]) == (axis, unit)
        }
        plot = f"{name}-{axis}-{unit}".replace(" ", "-").lower()
        title = f"Against {axis} (and growth exponents)"
        plots.append((plot, partial(line_chart, title=title, x_label=axis, y_label=unit, lines=lines)))
    return plots


def section(name: str, result: Result) -> str:
    """A result's part of the page."""
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value)
    machine = ", ".join(str(result[key]) for key in ("machine", "device", "backend") if key in result)
    load = f"; load of the minute before: {result['load']}" if result.get("load") is not None else ""
    arguments = ", ".join(f"{key} {value}" for key, value in result.get("arguments", {}).items() if value is not None)
    where = f"{machine}{load}. {versions}." + (f" With {arguments}." if arguments else "")
    if "peers" in result:
        body = peer_tables(result)
    elif "figures" in result:
        body = figure_table(result["figures"])
    else:
        rest = {key: value for key, value in result.items() if key not in _NO_FIGURES}
        body = table(("", "measured"), flatten(rest))
    images = [f"![{plot}](performance/{plot}.svg)" for plot, _ in plots_of(name, result)]
    return "\n\n".join([f"## {title_of(name)}", where, body, *images])


def prose_of(page: str) -> str:
    """What people have written on the page, to be kept."""
    at = page.find(PROSE_HEADING)
    return "" if at < 0 else page[at:].rstrip() + "\n"


def render(results: Mapping[str, Result], prose: str) -> str:
    """The whole page."""
    sections = [section(name, results[name]) for name in sorted(results, key=order_of)]
    return "\n\n".join([INTRODUCTION.rstrip(), *sections, *([prose.rstrip()] if prose else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help=f"default: all in {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    folder = PAGE.with_suffix("")
    folder.mkdir(exist_ok=True)
    for path in args.results or sorted(RESULTS.glob("*.json")):
        shutil.copy(path, folder / path.name)
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    if not results:
        parser.error("there are no results: run_all.py makes them")
    for path in folder.glob("*.svg"):
        path.unlink()
    for name, result in results.items():
        for plot, draw in plots_of(name, result):
            draw(folder / f"{plot}.svg")
    PAGE.write_text(render(results, prose_of(PAGE.read_text() if PAGE.exists() else "")))
    print(PAGE)


if __name__ == "__main__":
    main()
