from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report.py"
ENVIRONMENT = {"machine": "Linux, 2 cores", "backend": "cpu", "load": 0.25, "versions": {"mlx": "0.32", "x": None}}


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(**changes: Any) -> dict[str, Any]:
    values = {"operation": "cold", "value": 12.345, "unit": "ms", "bar": 13.0, "is_floor": False, "limit": 11.0}
    return {**values, "met": True, **changes}


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (12.345, "12.3"), (99.96, "100"), (123456, "123,000"), (0, "0")]
)
def test_numbers_have_three_digits_that_count(report, value, text):
    assert report.number(value) == text


def test_each_figure_stands_beside_its_limit_and_its_bar(report):
    figures = [
        figure(),
        figure(operation="decode", value=9.0, unit="tokens/s", bar=10.0, is_floor=True, limit=10.3, met=False),
        figure(operation="next turn", bar=None, limit=None, met=None),
        {"operation": "old", "value": 2.0, "unit": "x", "bar": 3.0, "met": True},
    ]
    assert report.figure_table(figures).splitlines()[2:] == [
        "| cold | 12.3 ms | 11 ms | ≤ 13 ms | met |",
        "| decode | 9 tokens/s | 10.3 tokens/s | ≥ 10 tokens/s | **missed** |",
        "| next turn | 12.3 ms |  |  |  |",
        "| old | 2 x |  | ≤ 3 x | met |",
    ]


def test_peers_stand_beside_each_other(report):
    result = {
        **ENVIRONMENT,
        "peers": {
            "ours": {"versions": {"omlx": "0.1"}, "written_is_durable": True, "same_answers": True},
            "other": {"versions": {"other": "2", "mlx": "3"}, "written_is_durable": False, "same_answers": False},
        },
        "missing": {"third": "it can't be installed"},
        "columns": {"cache": {"hit_s": "RAM", "opened_s": "open"}, "requests": {"cold_s": "cold"}},
        "cache": {
            "ours": {"median_ms": {"hit_s": 10.0, "opened_s": 1.0}, "ratio": {"hit_s": 1.0, "opened_s": 1.0}},
            "other": {"median_ms": {"hit_s": 25.0}, "ratio": {"hit_s": 2.5}},
        },
        "requests": {"ours": {"median_ms": {}, "ratio": {}}},
    }
    text = report.section("peers", result)
    assert "| ours | 10 (1 x) | 1 (1 x) |\n| other | 25 (2.5 x) |  |" in text
    assert "cold" not in text
    assert "- ours: omlx 0.1.\n- other: other 2, mlx 3, doesn't sync what it has written, answers differ" in text
    assert text.endswith("- third: not measured, it can't be installed.")


def test_a_result_without_figures_is_shown_value_by_value(report):
    text = report.section("writer_busy", {**ENVIRONMENT, "runs": 7, "ratio_to_off": {"busy": 0.98}, "disk": "nvme"})
    assert "| ratio to off: busy | 0.98 |" in text
    assert "| disk | nvme |" in text
    assert "runs" not in text
    assert "Linux, 2 cores, cpu; load of the minute before: 0.25. mlx 0.32." in text


def test_results_come_in_a_fixed_order_and_those_of_other_machines_by_name(report):
    names = ["writer_busy", "another", "whole_requests-h100", "whole_requests"]
    page = report.render({name: {**ENVIRONMENT, "figures": []} for name in names}, "")
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Whole requests",
        "## Whole requests (h100)",
        "## Decoding while the SSD tier writes",
        "## another",
    ]


def test_what_people_wrote_is_kept_and_the_rest_is_not(report):
    prose = f"{report.PROSE_HEADING}\n\nLarger reads: no difference.\n\n## More\n\nText.\n"
    page = report.render({"growth": {**ENVIRONMENT, "figures": [figure()]}}, prose)
    assert page.endswith(prose)
    assert report.prose_of(page) == prose
    again = report.render({"growth": {**ENVIRONMENT, "figures": [figure(value=99.0)]}}, report.prose_of(page))
    assert "12.3 ms" not in again
    assert again.endswith(prose)
    assert report.prose_of("# Performance\n") == ""


def request(tokens: int) -> dict[str, Any]:
    medians = {"cold": 1.0, "SSD-warm, page cache dropped": 0.5, "reused, cold": 0, "read bytes/s": 7e9}
    return {"shape": "small", "tokens": tokens, "medians": medians}


def test_times_are_drawn_by_shape_and_growth_by_axis_and_unit(report):
    series = [
        {"name": name, "axis": "tokens", "unit": unit, "exponent": 1.0, "points": [[1, 2.0], [2, 4.0]]}
        for name, unit in (("cold", "s"), ("warm", "s"), ("RAM", "bytes"))
    ]
    plots = dict(report.plots_of("all", {"requests": [request(1024), request(2048)], "series": series}))
    assert list(plots) == ["all-small", "all-tokens-s", "all-tokens-bytes"]
    times = {"cold": 1.0, "SSD-warm, page cache dropped": 0.5}
    assert plots["all-small"].keywords["groups"] == {"1,024 tokens": times, "2,048 tokens": times}
    assert list(plots["all-tokens-s"].keywords["lines"]) == ["cold: 1.00", "warm: 1.00"]


def test_the_page_is_written_from_the_results_with_its_plots(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra bench brings matplotlib")
    page, results = tmp_path / "docs" / "performance.md", tmp_path / "results"
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    results.mkdir()
    page.parent.mkdir()
    content = {**ENVIRONMENT, "figures": [figure()], "requests": [request(1024)]}
    (results / "whole_requests.json").write_text(json.dumps(content))
    report.main()
    text = page.read_text()
    assert "(performance/whole_requests-small.svg)" in text
    assert {path.name for path in page.with_suffix("").iterdir()} == {"whole_requests.json", "whole_requests-small.svg"}
    (results / "whole_requests.json").unlink()  # as in a checkout, which has the results beside the plots only
    report.main()
    assert page.read_text() == text
