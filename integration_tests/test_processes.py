"""Processes that end, are killed, and begin again: what was flushed is reused, and nothing changes but the time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK_SIZE = 32


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, model: str, **cache: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ask_engine.py")), model, json.dumps(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # With the reference BLAS, equal runs are equal to the last bit.
            env={**os.environ, "OMLX_OPENBLAS": "0"},
        )

    def send(self, **request: object) -> None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def ask(self, **request: object) -> dict:
        self.send(**request)
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        self._process.stdin.close()
        self._process.stdout.close()

    def end(self) -> None:
        _, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@contextlib.contextmanager
def engine_process(model: str, **cache: object):
    process = EngineProcess(model, block_size=BLOCK_SIZE, **cache)
    try:
        yield process
        process.end()
    except BaseException:
        process.kill()
        raise


def same(result: dict, expected: dict) -> bool:
    return all(result[key] == expected[key] for key in ("token_ids", "logprobs", "text", "finish_reason"))


@pytest.fixture(scope="module")
def prompt(document: str) -> list[dict]:
    return [
        {"role": "system", "content": "Answer from this document.\n\n" + document[:420]},
        {"role": "user", "content": "What is a block?"},
    ]


def test_cold_ram_warm_and_new_process_runs_are_identical_to_the_last_bit(sample_model, prompt, tmp_path: Path):
    request = {"prompt": prompt, "options": {"max_tokens": 12, "logprobs": True}}
    with engine_process(sample_model, no_cache=True) as process:
        cold = process.ask(**request)
    reusable = (cold["usage"]["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert reusable >= 3 * BLOCK_SIZE
    with engine_process(sample_model, paged_ssd_cache_dir=str(tmp_path)) as process:
        first, from_ram = process.ask(**request), process.ask(**request)
    with engine_process(sample_model, paged_ssd_cache_dir=str(tmp_path)) as process:
        from_ssd = process.ask(**request)
    assert [r["usage"]["cached_tokens_hot"] for r in (cold, first, from_ram, from_ssd)] == [0, 0, reusable, 0]
    assert [r["usage"]["cached_tokens_cold"] for r in (cold, first, from_ram, from_ssd)] == [0, 0, 0, reusable]
    assert same(first, cold)
    assert same(from_ram, cold)
    assert same(from_ssd, cold)


def test_what_was_flushed_before_a_kill_is_reused(sample_model, prompt, tmp_path: Path):
    request = {"prompt": prompt, "options": {"max_tokens": 4, "logprobs": True}}
    process = EngineProcess(sample_model, block_size=BLOCK_SIZE, paged_ssd_cache_dir=str(tmp_path))
    before = process.ask(**request)
    assert process.ask(flush=True) == {"flushed": True}
    process.send(prompt=[{"role": "user", "content": "Another question"}], options={"max_tokens": 500})
    process.kill()
    with engine_process(sample_model, paged_ssd_cache_dir=str(tmp_path)) as process:
        after = process.ask(**request)
    assert after["usage"]["cached_tokens_cold"] == (after["usage"]["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert same(after, before)
