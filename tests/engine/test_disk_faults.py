"""No request fails because of the disk, and none is answered differently."""

from __future__ import annotations

import errno
import random
import shutil

import pytest
from cache.faulty_io import KINDS, FaultyIO
from tiny_models import tiny_llama

from omlx_core import CacheSettings, Engine

BLOCK_SIZE = 16
SHARED = random.Random(1).choices(range(512), k=4 * BLOCK_SIZE)
PROMPTS = [[*SHARED, *random.Random(seed).choices(range(512), k=2 * BLOCK_SIZE + 3)] for seed in (2, 3)]
WAIT_S = 30.0


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def expected(model):
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        return [answer(engine, prompt) for prompt in PROMPTS]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
def open_engine(model, directory):
    """Opens engines that keep nothing in RAM beyond a request, so that every hit comes from the disk."""
    engines = []

    def make():
        settings = CacheSettings(
            block_size=BLOCK_SIZE, paged_ssd_cache_dir=directory, hot_cache_max_size=1, ssd_min_free=0
        )
        engines.append(Engine(model, name="tiny", cache=settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def answer(engine, prompt):
    result = engine.generate(prompt, max_tokens=5, logprobs=True)
    return result.token_ids, result.logprobs


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
def test_requests_are_answered_alike_while_the_disk_fails_and_cached_afterwards(
    open_engine, directory, monkeypatch, expected, kinds
):
    faulty = FaultyIO(directory, monkeypatch)
    engine = open_engine()
    assert answer(engine, PROMPTS[0]) == expected[0]
    assert engine.cache.flush(WAIT_S)
    engine.close()
    engine = open_engine()
    with faulty.failing(*kinds, code=errno.EIO):
        assert [answer(engine, prompt) for prompt in PROMPTS] == expected
        assert engine.cache.flush(WAIT_S)
    assert [answer(engine, prompt) for prompt in PROMPTS] == expected
    assert engine.cache.flush(WAIT_S)
    engine.cache.check()
    engine.close()
    engine = open_engine()
    results = [engine.generate(prompt, max_tokens=5, logprobs=True) for prompt in PROMPTS]
    assert [(result.token_ids, result.logprobs) for result in results] == expected
    assert [result.usage.cached_tokens for result in results] == [6 * BLOCK_SIZE] * 2
    assert results[0].usage.cached_tokens_cold == 6 * BLOCK_SIZE


def test_requests_are_answered_while_the_folder_is_gone(open_engine, directory, expected):
    engine = open_engine()
    assert answer(engine, PROMPTS[0]) == expected[0]
    assert engine.cache.flush(WAIT_S)
    engine.close()
    engine = open_engine()
    shutil.rmtree(directory)
    assert [answer(engine, prompt) for prompt in PROMPTS] == expected
    assert engine.cache.flush(WAIT_S)


def test_damaged_files_are_computed_again(open_engine, directory, expected):
    engine = open_engine()
    assert [answer(engine, prompt) for prompt in PROMPTS] == expected
    assert engine.cache.flush(WAIT_S)
    engine.close()
    for number, path in enumerate(sorted(directory.rglob("*.safetensors"))):
        content = bytearray(path.read_bytes())
        content[(number * 7919) % len(content)] ^= 1
        path.write_bytes(content)
    engine = open_engine()
    for _ in range(2):
        assert [answer(engine, prompt) for prompt in PROMPTS] == expected
        assert engine.cache.flush(WAIT_S)
    assert engine.cache.stats().cold.corrupt_blocks > 0
