"""Two processes with the same model at full load in one folder, some of them killed.

A few seconds in `make test`, a minute in `make soak` (``SOAK_SECONDS``).
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from soak_child import MAX_SIZE_BYTES
from ssd_audit import audit_directory
from tqdm import tqdm

from omlx_core.cache.block_hash import hash_namespace
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

SOAK_S = float(os.environ.get("SOAK_SECONDS", "6"))
KILL_EVERY_S = 5.0
PATIENCE_S = 120


class Worker:
    """A process that answers prompts until it is told to end, or killed."""

    def __init__(self, directory: Path, seed: int, log: Path) -> None:
        self._log = log
        tests = Path(__file__).parents[2] / "tests"
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("soak_child.py")), str(directory), str(seed)],
                env={**os.environ, "OMLX_OPENBLAS": "0", "PYTHONPATH": str(tests)},
                stdin=subprocess.PIPE,
                stdout=file,
            )

    def counts(self) -> dict[str, int]:
        """What it last reported."""
        lines = [line for line in self._log.read_text().splitlines() if line.endswith("}")]
        return json.loads(lines[-1]) if lines else {}

    def has_met_the_other(self) -> bool:
        counts = self.counts()
        return counts.get("reused_of_others", 0) > 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)

    def end(self) -> int:
        self._process.communicate(timeout=120)
        return self._process.returncode


@pytest.mark.timeout(SOAK_S + PATIENCE_S + 300)
def test_two_processes_at_full_load_end_with_a_clean_folder(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    generator = random.Random()
    workers = [Worker(directory, seed, tmp_path / f"log-{seed}") for seed in range(2)]
    finished: list[dict[str, int]] = []
    largest_bytes = 0
    end_s = time.monotonic() + SOAK_S
    next_kill_s = time.monotonic() + KILL_EVERY_S
    try:
        with tqdm(total=round(SOAK_S), desc="soaking", unit="s", disable="SOAK_SECONDS" not in os.environ) as bar:
            # On a busy machine the two may need longer to meet.
            while (now_s := time.monotonic()) < end_s or (
                now_s < end_s + PATIENCE_S and not all(worker.has_met_the_other() for worker in workers)
            ):
                time.sleep(0.2)
                largest_bytes = max(largest_bytes, bytes_on_disk(directory))
                # The last seconds are for both to meet undisturbed.
                if now_s > next_kill_s and end_s - now_s > KILL_EVERY_S:
                    next_kill_s = now_s + generator.uniform(0.5, 1.5) * KILL_EVERY_S
                    index = generator.randrange(2)
                    workers[index].kill()
                    finished.append(workers[index].counts())
                    seed = len(finished) + 1
                    workers[index] = Worker(directory, seed, tmp_path / f"log-{seed}")
                bar.update(min(bar.total, round(SOAK_S - (end_s - now_s))) - bar.n)
    finally:
        statuses = [worker.end() for worker in workers]
    assert statuses == [0, 0], "see the traceback above"
    ended = [worker.counts() for worker in workers]
    for counts in ended:
        assert counts["reused_of_others"] > 0
        assert counts["evictions"] > 0
        assert counts["write_errors"] == counts["corrupt"] == 0
    assert 0 < largest_bytes <= MAX_SIZE_BYTES
    cache = PagedSSDCacheManager(
        directory, max_size_bytes=MAX_SIZE_BYTES, namespace=hash_namespace({"judge": 1}), description={}
    )
    try:
        assert cache.flush(60)
        report = cache.check()
        assert report.is_clean, report.findings
        assert report.num_blocks > 0
    finally:
        cache.close()
    assert audit_directory(directory, max_size_bytes=MAX_SIZE_BYTES, hashes_are_of_tokens=True) == []
    print(json.dumps({"kills": len(finished), "killed": finished, "ended": ended}), file=sys.stderr)


def bytes_on_disk(directory: Path) -> int:
    """What is there at one moment: under the index's write lock nothing is reserved, published or removed."""
    if not (directory / "index.sqlite3").exists():
        return 0
    with closing(sqlite3.connect(directory / "index.sqlite3", timeout=30.0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        return sum(path.stat().st_size for path in directory.glob("*/??/*"))
