"""An engine that was killed answers as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_child import MAX_SIZE_BYTES
from ssd_audit import audit_directory
from tqdm import tqdm

IS_FULL = os.environ.get("CRASH_TEST") == "full"
NUM_KILLS = 40 if IS_FULL else 3


def answer(directory: Path | None, kill_at: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The lines that an engine in a process of its own prints, and its exit status."""
    request = {"directory": str(directory) if directory else None, "kill_at": kill_at}
    tests = Path(__file__).parents[2] / "tests"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_child.py")), json.dumps(request)],
        # With the reference BLAS, equal runs are equal to the last bit.
        env={**os.environ, "OMLX_OPENBLAS": "0", "PYTHONPATH": str(tests)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def answers(lines: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(line["token_ids"], line["logprobs"]) for line in lines if "token_ids" in line]


@pytest.mark.timeout(3600 if IS_FULL else 300)
def test_outputs_are_identical_after_a_kill_at_any_step(tmp_path: Path) -> None:
    uncached = answers(answer(None)[0])
    whole, status = answer(tmp_path / "whole")
    assert status == 0
    assert answers(whole) == uncached
    assert whole[-1]["evictions"] > 0
    steps = range(1, whole[-1]["num_steps"] + 1)
    # The first steps only create the folder.
    chosen = sorted(random.Random(1).sample(steps[len(steps) // 5 :], NUM_KILLS))
    reused = 0
    for step in tqdm(chosen, desc="killing an engine", unit="kill", disable=not IS_FULL):
        directory = tmp_path / f"step-{step}"
        before, status = answer(directory, step)
        assert status == -9
        assert answers(before) == uncached[: len(before)]
        after, status = answer(directory)
        assert status == 0
        assert answers(after) == uncached
        assert audit_directory(directory, max_size_bytes=MAX_SIZE_BYTES, hashes_are_of_tokens=True) == []
        reused += after[0]["cached_tokens_cold"]
    assert reused > 0
