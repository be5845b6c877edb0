"""SVG plots. The same figures give the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omlx_plugins.extras import import_with_extra

Points = Sequence[tuple[float, float]]

_SIZE_INCHES = (8.0, 4.2)
_STYLE = {
    "svg.hashsalt": "omlx-plugins",  # ids of elements are random otherwise
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_MARKERS = "osD^vPX*"
_BAR_GROUP_WIDTH = 0.8


def bar_chart(path: Path, title: str, unit: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Bars side by side, each with its value above it; the axis begins at 0.

    Args:
        path: the file to write.
        title: above the plot.
        unit: of the values.
        groups: from the name of a group to its bars, by name; a bar may be missing from a group.

    Raises:
        MissingDependencyError: matplotlib isn't installed.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    with _plot(path, title) as axes:
        width = _BAR_GROUP_WIDTH / len(names)
        for index, name in enumerate(names):
            places = {place: bars[name] for place, bars in enumerate(groups.values()) if name in bars}
            drawn = axes.bar([place + index * width for place in places], list(places.values()), width, label=name)
            axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        middle = (_BAR_GROUP_WIDTH - width) / 2
        axes.set_xticks([place + middle for place in range(len(groups))], list(groups))
        axes.set_ylabel(unit)
        axes.grid(axis="y", alpha=0.3)


def line_chart(path: Path, title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> None:
    """Lines over logarithmic axes, where a power law is straight and its exponent the slope.

    Args:
        path: the file to write.
        title: above the plot.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, with its unit.
        lines: from the name of a line to its points, all of them positive.

    Raises:
        MissingDependencyError: matplotlib isn't installed.
    """
    with _plot(path, title) as axes:
        for index, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), marker=_MARKERS[index % len(_MARKERS)], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        places = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(places, [_short(x) for x in places], fontsize=8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)


@contextmanager
def _plot(path: Path, title: str) -> Iterator[Any]:
    """Axes to draw on, of a figure that is saved in the end. Neither a window system nor a user's style counts."""
    rc_context, rc_defaults, rc_params = (
        import_with_extra("matplotlib", name, extra="bench", package="matplotlib")
        for name in ("rc_context", "rcdefaults", "rcParams")
    )
    figure_class = import_with_extra("matplotlib.figure", "Figure", extra="bench", package="matplotlib")
    with rc_context():
        rc_defaults()
        rc_params.update(_STYLE)
        figure = figure_class(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        yield axes
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _short(number: float) -> str:
    """1024 as 1k, 1048576 as 1M."""
    for size, suffix in ((1 << 20, "M"), (1 << 10, "k")):
        if number >= size and not number % size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"
