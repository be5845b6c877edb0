from __future__ import annotations

import time

import pytest

pytest.importorskip("matplotlib", reason="the extra bench brings matplotlib")

from omlx_plugins.bench.plot import bar_chart, line_chart


def test_the_same_figures_give_the_same_file(tmp_path, monkeypatch):
    groups = {"1k": {"cold": 2.0, "warm": 0.5}, "2k": {"cold": 4.0}}
    bar_chart(tmp_path / "a.svg", "TTFT", "s", groups)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    bar_chart(tmp_path / "b.svg", "TTFT", "s", groups)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_bar_chart_names_its_groups_and_bars_and_says_their_values(tmp_path):
    bar_chart(tmp_path / "a.svg", "TTFT", "seconds", {"1k": {"cold": 2.5}, "2k": {"cold": 4.0, "warm": 0.125}})
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{label}<" in text for label in ("TTFT", "seconds", "1k", "2k", "cold", "warm", "2.5", "0.125"))


def test_a_line_chart_names_its_axes_lines_and_places(tmp_path):
    line_chart(tmp_path / "a.svg", "Growth", "tokens", "seconds", {"match": [(1024, 0.1), (1048576, 90.0)]})
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{label}<" in text for label in ("Growth", "tokens", "seconds", "match", "1k", "1M"))


def test_plotting_leaves_the_users_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    bar_chart(tmp_path / "a.svg", "TTFT", "s", {"1k": {"cold": 1.0}})
    assert dict(matplotlib.rcParams) == before
