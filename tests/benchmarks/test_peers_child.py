"""An adapter's process: one answer per request, its failures named, and nothing of it left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers import protocol
from benchmarks.peers.child import AdapterError, Child

ADAPTER = """
import os
from protocol import serve

def add(first, second):
    print("noise of a library")
    return {"sum": first + second}

def leave():
    os._exit(3)

serve({"add": add, "leave": leave}, ())
"""


@pytest.fixture
def child(tmp_path: Path) -> Child:
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER)
    variables = {"PYTHONPATH": str(Path(protocol.__file__).parent)}
    return Child(Path(sys.executable), adapter, variables, tmp_path / "log")


def test_each_request_is_answered_whatever_the_adapter_prints(child: Child, tmp_path: Path) -> None:
    with child:
        assert child.ask("add", first=1, second=2) == {"sum": 3}
        assert child.ask("add", first=3, second=4) == {"sum": 7}
    assert "noise of a library" in (tmp_path / "log").read_text()


def test_a_failed_operation_is_named_and_the_next_one_works(child: Child) -> None:
    with child:
        with pytest.raises(AdapterError, match=r"add: TypeError.*log"):
            child.ask("add", first=1)
        assert child.ask("add", first=1, second=1) == {"sum": 2}


def test_an_adapter_that_goes_away_is_an_error(child: Child) -> None:
    with child, pytest.raises(AdapterError, match="leave: it ended with status 3"):
        child.ask("leave")
