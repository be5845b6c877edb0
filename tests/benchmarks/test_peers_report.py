"""The tables of the comparison with peers: medians, ratios to the first row, and who was skipped and why."""

from __future__ import annotations

from benchmarks.peers.report import Samples, Table


def samples(label: str, *runs: dict[str, float], skipped: str | None = None) -> Samples:
    made = Samples(label, skipped=skipped)
    for run in runs:
        made.add(run)
    return made


OURS = samples("ours", {"store_s": 0.010, "hit_s": 0.004}, {"store_s": 0.030, "hit_s": 0.004}, {"store_s": 0.020})


def table(*others: Samples) -> Table:
    return Table("Operations", {"store_s": "store", "hit_s": "RAM"}, [OURS, *others])


def test_only_times_of_an_answer_are_samples() -> None:
    assert samples("peer", {"cold_s": 1, "cold": [1, 2]}).seconds == {"cold_s": [1.0]}  # type: ignore[dict-item]


def test_a_cell_is_the_median_in_ms_with_its_ratio_to_the_first_row() -> None:
    lines = table(samples("peer", {"store_s": 0.005}, {"store_s": 0.007}, {"store_s": 9.0})).lines()
    assert [cell.strip() for cell in lines[4].split("|")][1:-1] == ["ours", "20 (1x)", "4 (1x)"]
    assert [cell.strip() for cell in lines[5].split("|")][1:-1] == ["peer", "7 (0.35x)", "-"]


def test_a_skipped_peer_is_named_with_the_reason_instead_of_a_row() -> None:
    lines = table(samples("peer", skipped="no compiler")).lines()
    assert not any(line.startswith("| peer") for line in lines)
    assert lines[-1] == "peer: skipped, no compiler"


def test_a_peer_that_fails_later_keeps_its_figures_and_the_reason() -> None:
    lines = table(samples("peer", {"store_s": 0.040}, skipped="it ended with status -9")).lines()
    assert any(line.startswith("| peer") and "40 (2x)" in line for line in lines)
    assert lines[-1] == "peer: skipped, it ended with status -9"


def test_the_report_has_every_sample_and_no_ratio_to_what_was_not_measured() -> None:
    row = table(samples("peer", {"store_s": 0.040, "open_s": 0.001})).as_dict()["peer"]
    assert row["ratio"] == {"store_s": 2.0}
    assert row["samples_ms"] == {"store_s": [40.0], "open_s": [1.0]}


def test_columns_without_a_first_figure_have_no_ratio() -> None:
    only_peer = Table("Operations", {"open_s": "open"}, [OURS, samples("peer", {"open_s": 1.5})])
    assert [cell.strip() for cell in only_peer.lines()[5].split("|")][1:-1] == ["peer", "1,500"]
