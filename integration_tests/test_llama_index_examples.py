"""The examples for LlamaIndex print what they say they do."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "llama_index"

pytestmark = [
    pytest.mark.usefixtures("shared_engines"),
    # LlamaIndex leaves event loops open, and its agents look at all their attributes, pydantic's old ones among them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
]


@pytest.fixture
def printed(sample_model, monkeypatch, capsys, llama_index_leaves_nothing):
    """Runs an example in this process, where LlamaIndex is imported already, and returns what it prints."""

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, "--model", sample_model])
        monkeypatch.syspath_prepend(FOLDER)
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def costs(text):
    """The rows of an example's table: tokens of each prompt, reused and read."""
    return [tuple(map(int, row)) for row in re.findall(r"^ +\d+ +(\d+) +(\d+) +(\d+) +\S+ s$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", ["query_engine.py", "chat_engine.py", "structured_output.py"])
def test_later_requests_read_a_part_of_their_prompts(printed, name):
    text = printed(name)
    first, *others = costs(text)
    assert first[1] == 0
    assert len(others) == 2
    assert all(prompt == reused + read for prompt, reused, read in others)
    if name == "query_engine.py":  # what is found for a question is the documentation's own affair
        assert sum(reused for _, reused, _ in others) > sum(prompt for prompt, *_ in others) / 5
    else:
        assert all(reused > prompt / 2 for prompt, reused, _ in others)
    if name == "structured_output.py":
        assert text.count("Review(mood=") > 3


def test_agent_calls_its_tools_and_reads_only_what_is_new(printed):
    text = printed("function_agent.py")
    assert text.count("add({") >= 2
    first, *others = costs(text)
    assert first[1] == 0
    assert len(others) >= 3
    assert all(reused > prompt / 2 for prompt, reused, _ in others)


def test_ingestion_prefills_the_instruction_once(printed):
    rows = dict(re.findall(r"^ +(off|on) +(\d+ +\d+ +\d+)", printed("ingestion.py"), re.MULTILINE))
    (prompts, tokens, prefilled), cached = ([*map(int, row.split())] for row in (rows["off"], rows["on"]))
    assert prefilled == tokens
    assert cached[:2] == [prompts, tokens]
    assert cached[2] < tokens / 2
