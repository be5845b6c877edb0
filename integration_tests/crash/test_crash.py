"""A process that is killed loses nothing that it had flushed, and leaves nothing behind that is wrong.

`make test` kills at some steps, `make crashtest` (``CRASH_TEST=full``) at every one, and at a hundred random moments.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ssd_audit import audit_directory
from tqdm import tqdm
from workload import SCRIPTS, WAIT_S, Workload, all_blocks, payload_of

IS_FULL = os.environ.get("CRASH_TEST") == "full"
NUM_SAMPLED_STEPS = 40
NUM_RANDOM_MOMENTS = 100 if IS_FULL else 15

Block = tuple[str, str]


@dataclass
class Run:
    """What a child reported before it ended."""

    states: list[set[Block]]
    signal: int
    wall_s: float
    trace: list[tuple[str, str]]


class Children:
    """Processes that run the workload."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crash_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, directory: Path, script: str, **kill: Any) -> Run:
        self._process.stdin.write(json.dumps({"directory": str(directory), "script": script, **kill}) + "\n")
        self._process.stdin.flush()
        states, trace = [], []
        while True:
            line = json.loads(self._process.stdout.readline())
            if "done" in line:
                assert line["done"] == len(states)
                states.append({(namespace, name) for namespace, name in line["held"]})
            elif "trace" in line:
                trace = [(kind, detail) for kind, detail in line["trace"]]
            else:
                assert line["status"] in (0, None), "the child failed, see its traceback"
                return Run(states, line["signal"], line["wall_s"], trace)

    def close(self) -> None:
        self._process.communicate(timeout=WAIT_S)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    children = Children()
    yield children
    children.close()


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole_run(children: Children, script: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The workload without a kill: what is to be found after each operation, and how many steps there are."""
    directory = tmp_path_factory.mktemp("whole") / "kv"
    run = children.run(directory, script)
    assert run.signal == 0
    assert len(run.states) == len(SCRIPTS[script][1]) + 1
    assert audit_directory(directory, max_size_bytes=SCRIPTS[script][0], hashes_are_of_tokens=True) == []
    return run


def test_a_block_is_durable_before_its_row_is_committed(whole_run: Run) -> None:
    published = 0
    for position, (kind, detail) in enumerate(whole_run.trace):
        if kind != "replace" or "safetensors" in detail or not detail.endswith(".tmp") or "namespace.json" in detail:
            continue
        before, after = whole_run.trace[:position], whole_run.trace[position + 1 :]
        assert [step for step in before if step[1] == detail][-1] == ("fsync", detail)
        insertion = next(at for at, (_, text) in enumerate(after) if text.startswith("INSERT INTO blocks"))
        assert ("fsync", str(Path(detail).parent)) in after[:insertion]
        published += 1
    assert published >= len(all_blocks())


def test_the_row_of_a_removed_block_is_committed_as_gone_before_its_file_goes(whole_run: Run) -> None:
    removed = 0
    for position, (kind, detail) in enumerate(whole_run.trace):
        if kind == "unlink" and detail.endswith(".safetensors"):
            block_hash = Path(detail).stem
            before = [text for _, text in whole_run.trace[:position]]
            last_commit = max(at for at, text in enumerate(before) if text == "COMMIT")
            of_block = [text for text in before[:last_commit] if " blocks " in text and block_hash in text]
            changes = [text for text in of_block if text.startswith(("INSERT", "DELETE"))]
            assert changes[-1].startswith("DELETE")
            removed += 1
    assert removed > 0


def judge(directory: Path, script: str, run: Run, whole: Run) -> None:
    """Reopen the folder after a kill and look at everything in it."""
    max_size_bytes, operations = SCRIPTS[script]
    done = len(run.states) - 1
    assert run.states == whole.states[: done + 1]
    is_damaging = 0 <= done < len(operations) and operations[done].verb == "damage"
    must_be_there = whole.states[done] if done >= 0 else set()
    if done < len(operations):
        must_be_there = must_be_there & whole.states[done + 1]
        if script == "tight":
            # What is saved again may have been evicted for the one saved before it.
            must_be_there -= {(operations[done].namespace, name) for name in operations[done].names}
    workload = Workload(directory, max_size_bytes)
    try:
        # Before anything is read: reading drops what is wrong.
        report = workload.managers["A"].check()
        assert report.is_clean or is_damaging, report.findings
        findings = audit_directory(directory, max_size_bytes=max_size_bytes, hashes_are_of_tokens=True)
        if is_damaging:
            # The damage has been done, and not yet been found.
            findings = [finding for finding in findings if not finding.endswith("the checksum doesn't match")]
        assert findings == []
        present = set()
        for block in all_blocks():
            payload = workload.load(*block)
            if payload is not None:
                assert payload == payload_of(*block)
                present.add(block)
        assert must_be_there - present == set(), "flushed blocks are lost"
        if not is_damaging:
            assert sum(each.stats().corrupt_blocks for each in workload.managers.values()) == 0
        for manager in workload.managers.values():
            assert manager.flush(WAIT_S)
        audit_all(directory, workload, max_size_bytes)
        # Life goes on, with evictions if the budget is tight.
        for name in ("n", "nm", "nmo"):
            workload.save("A", name)
        assert workload.managers["A"].flush(WAIT_S)
        assert workload.load("A", "nmo") == payload_of("A", "nmo")
        audit_all(directory, workload, max_size_bytes)
    finally:
        workload.close()
    audit_all(directory, workload, max_size_bytes)


def audit_all(directory: Path, workload: Workload, max_size_bytes: int) -> None:
    report = workload.managers["A"].check()
    assert report.is_clean, report.findings
    assert audit_directory(directory, max_size_bytes=max_size_bytes, hashes_are_of_tokens=True) == []


def progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    yield from tqdm(items, desc=what, unit="kill", disable=not IS_FULL, mininterval=1.0)


def test_the_workload_makes_every_kind_of_step(script: str, whole_run: Run) -> None:
    kinds = {kind for kind, _ in whole_run.trace}
    assert kinds >= {"open", "write", "fsync", "replace", "unlink", "mkdir", "flock", "sql"}
    statements = [detail.split()[0].upper() for kind, detail in whole_run.trace if kind == "sql"]
    assert {"BEGIN", "COMMIT", "INSERT", "UPDATE", "DELETE", "CREATE"} <= set(statements)
    everything = set(all_blocks()) - {("A", "xyzw")}
    if script == "tight":
        assert not everything <= whole_run.states[-1], "nothing was evicted"
    else:
        assert everything <= whole_run.states[-1]


def test_a_kill_at_any_step_loses_nothing_flushed(
    children: Children, script: str, whole_run: Run, tmp_path: Path
) -> None:
    steps = range(1, len(whole_run.trace) + 1)
    chosen = list(steps) if IS_FULL else sorted(random.Random(script).sample(steps, NUM_SAMPLED_STEPS))
    for step in progress(chosen, f"killing at each step, {script} budget"):
        directory = tmp_path / f"step-{step}"
        run = children.run(directory, script, kill_at=step)
        assert run.signal == 9
        try:
            judge(directory, script, run, whole_run)
        except AssertionError as exc:
            exc.add_note(f"killed before step {step}, {whole_run.trace[step - 1]}; its folder is {directory}")
            raise
        shutil.rmtree(directory)


def test_a_kill_in_the_middle_of_a_write_loses_nothing_flushed(
    children: Children, script: str, whole_run: Run, tmp_path: Path
) -> None:
    writes = [step for step, (kind, _) in enumerate(whole_run.trace, start=1) if kind == "write"]
    chosen = writes if IS_FULL else sorted(random.Random(script).sample(writes, 6))
    for step in progress(chosen, f"killing within each write, {script} budget"):
        directory = tmp_path / f"write-{step}"
        run = children.run(directory, script, kill_at=step, tears_write=True)
        assert run.signal == 9
        try:
            judge(directory, script, run, whole_run)
        except AssertionError as exc:
            exc.add_note(f"killed within step {step}, {whole_run.trace[step - 1]}; its folder is {directory}")
            raise
        shutil.rmtree(directory)


@pytest.mark.skipif(not IS_FULL, reason="part of make crashtest")
def test_a_kill_at_any_system_call_of_the_index_loses_nothing_flushed(
    script: str, whole_run: Run, tmp_path: Path
) -> None:
    """SQLite's own steps, which no wrapper in Python sees: within a commit, too."""
    strace = [shutil.which("strace"), "-f", "-qq", "-o", os.devnull, "-e", "trace=pwrite64,fdatasync,ftruncate"]
    if strace[0] is None or subprocess.run([*strace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace is not here, or may not trace")
    child = [sys.executable, str(Path(__file__).with_name("crash_child.py"))]
    num_kills = 0
    for count in progress(itertools.count(1), f"killing at system calls, {script} budget"):
        directory = tmp_path / f"call-{count}"
        request = json.dumps({"directory": str(directory), "script": script, "kill_after_s": None})
        # Counted for each thread by itself: the first one that gets that far.
        kill = ["-e", f"inject=pwrite64,fdatasync,ftruncate:signal=SIGKILL:when={count}"]
        done = subprocess.run([*strace, *kill, *child, request], stdout=subprocess.PIPE, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        states = [{(namespace, name) for namespace, name in line["held"]} for line in lines if "done" in line]
        if done.returncode == 0:
            break
        assert done.returncode in (-9, 128 + 9)
        judge(directory, script, Run(states, 9, 0.0, []), whole_run)
        shutil.rmtree(directory)
        num_kills += 1
    assert num_kills > 50


def test_a_kill_at_a_random_moment_loses_nothing_flushed(
    children: Children, script: str, whole_run: Run, tmp_path: Path
) -> None:
    unhurried = children.run(tmp_path / "unhurried", script, kill_after_s=None)
    assert unhurried.states == whole_run.states
    generator = random.Random()
    moments = [generator.uniform(0, unhurried.wall_s) for _ in range(NUM_RANDOM_MOMENTS)]
    for number, moment_s in enumerate(progress(moments, f"killing at random moments, {script} budget")):
        directory = tmp_path / f"moment-{number}"
        run = children.run(directory, script, kill_after_s=moment_s)
        try:
            judge(directory, script, run, whole_run)
        except AssertionError as exc:
            exc.add_note(f"killed after {moment_s} s; its folder is {directory}")
            raise
        shutil.rmtree(directory)
