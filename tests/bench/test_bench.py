from __future__ import annotations

import json
import sys

import pytest
from model_folders import save_model_folder
from tiny_models import tiny_llama

from omlx_core.errors import EngineError
from omlx_core.request_timing import Conversation, Situation, Timing, decode_tokens_per_s
from omlx_plugins.bench.child import Job
from omlx_plugins.bench.run import Result, Row, _in_new_process, render, summarize
from omlx_plugins.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model_folder(tmp_path_factory.mktemp("bench") / "tiny", tiny_llama(max_position_embeddings=512))


def bench(model, *arguments: str) -> int:
    return main(["bench", "--model", str(model), "--runs", "1", "--decode-tokens", "8", *arguments])


def test_bench_measures_every_situation_and_the_decoding_speed(model, tmp_path, capsys):
    path, disk = tmp_path / "figures.json", tmp_path / "disk"
    arguments = ("--tokens", "64", "32", "--block-size", "16", "--directory", str(disk), "--json", str(path))
    assert bench(model, *arguments) == 0
    figures = json.loads(path.read_text())
    reused = {(row["context_tokens"], row["situation"]): row["reused_tokens"] for row in figures["rows"]}
    # The first answer has 8 tokens: of 64 + 32 + 8 the next turn finds what fills blocks of 16.
    assert reused == {
        (64, "cold"): 0,
        (64, "RAM-warm"): 80,
        (64, "branch"): 64,
        (64, "next turn"): 96,
        (64, "SSD-warm"): 80,
        (32, "cold"): 0,
        (32, "RAM-warm"): 48,
        (32, "branch"): 32,
        (32, "next turn"): 64,
        (32, "SSD-warm"): 48,
    }
    assert all(row["fastest_s"] <= row["ttft_s"] <= row["slowest_s"] for row in figures["rows"])
    assert figures["decode_tokens_per_s"].keys() == {"1", "8"}
    assert figures["decode_tokens_per_s"]["1"] > 0
    assert figures["model"] == "tiny"
    assert figures["versions"]["mlx"]
    assert not list(disk.iterdir()), "what was written for the benchmark is still there"
    output = capsys.readouterr()
    assert "next turn: the prompt, its answer, and another question" in output.out
    assert "32 tokens" in output.err, "no progress was shown"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tokens", "440"], "--tokens 440: give 1 to 439, since the model's context has 512 tokens and 73 of them"),
        (["--tokens", "0"], "--tokens 0: give 1 to 439"),
        (["--runs", "0"], "--runs 0: give at least 1"),
        (["--decode-tokens", "1"], "--decode-tokens 1: give at least 2"),
    ],
)
def test_bench_refuses_numbers_that_it_cannot_measure_with(model, capsys, arguments, complaint):
    assert bench(model, *arguments) == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


def test_bench_without_matplotlib_says_so_before_it_measures(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--model", "no/such/model", "--svg", str(tmp_path / "plot.svg")]) == 2
    assert "pip install 'omlx-plugins[bench]'" in capsys.readouterr().err


def test_a_new_process_that_fails_is_an_error(tmp_path, capfd):
    job = Job(str(tmp_path / "nothing"), {}, 512, [(0, 8)])
    with pytest.raises(EngineError, match="the new process ended with status 1"):
        list(_in_new_process(job))
    assert "ModelNotFoundError" in capfd.readouterr().err


def timing(situation: Situation, ttft_s: float, reused_tokens: int = 0) -> Timing:
    return Timing(situation, ttft_s, 100, reused_tokens)


def test_rows_are_medians_by_context_and_situation():
    timings = [(n, timing(Situation.COLD, n * run)) for run in (1.0, 2.0, 9.0) for n in (10, 20)]
    timings += [(10, timing(Situation.RAM, 0.5, reused)) for reused in (64, 32)]
    assert summarize(timings) == [
        Row(10, Situation.COLD, 100, 0, 20.0, 10.0, 90.0),
        Row(10, Situation.RAM, 100, 32, 0.5, 0.5, 0.5),
        Row(20, Situation.COLD, 100, 0, 40.0, 20.0, 180.0),
    ]


def test_the_table_sets_each_time_against_the_cold_one():
    rows = summarize([(1000, timing(Situation.COLD, 2.0)), (1000, timing(Situation.RAM, 0.5, 96))])
    lines = render(Result(rows, {1: 12.34, 8: None})).splitlines()
    assert lines[1].split() == ["1,000", "cold", "100", "0", "2.000", "s", "2.000", "-", "2.000", "s", "100.0%"]
    assert lines[2].split() == ["1,000", "RAM-warm", "100", "96", "0.500", "s", "0.500", "-", "0.500", "s", "25.0%"]
    assert "decode, 1 at once: 12.3 tokens/s" in lines
    assert "decode, 8 at once: ended too early to tell" in lines


def test_decoding_counts_only_while_all_streams_run():
    # Between 2 s, when the second begins, and 4 s, when the first ends.
    assert decode_tokens_per_s([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5, 4.0, 9.0]]) == (2 + 4) / 2
    assert decode_tokens_per_s([[1.0, 2.0], [2.0, 3.0]]) is None
    assert decode_tokens_per_s([[1.0]]) is None


def test_conversations_of_different_seeds_share_no_beginning():
    first, second = (Conversation.draw(seed, 64, 512) for seed in (0, 1))
    assert first.context[0] != second.context[0]
    assert first == Conversation.draw(0, 64, 512)
    assert first.question != first.other_question
    assert all(64 <= token < 256 for token in first.prompt), "special tokens stand at a vocabulary's ends"
