"""The settings of the SSD tier reach it."""

import json

import pytest
from tiny_models import tiny_llama

from omlx_core import CacheSettings, Engine
from omlx_core.cache import ssd_budget

PROMPT = list(range(1, 101))
BLOCK_SIZE = 16


def run(directory, **settings):
    cache = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=directory, **settings)
    with Engine(tiny_llama(), cache=cache) as engine:
        result = engine.generate(PROMPT, max_tokens=8)
        assert engine.cache.flush(30)
        stats = engine.cache.stats()
    return result.token_ids, stats


def test_a_read_only_engine_answers_alike_from_the_folder_and_leaves_it_as_it_is(tmp_path):
    def content():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}

    token_ids, _ = run(tmp_path, ssd_min_free=0)
    before = content()
    served_ids, stats = run(tmp_path, ssd_read_only=True)
    assert served_ids == token_ids
    assert stats.matched_tokens_cold == 96
    assert content() == before


def test_a_read_only_engine_runs_without_a_folder(tmp_path):
    _, stats = run(tmp_path / "kv", ssd_read_only=True)
    assert stats.cold.num_blocks == 0
    assert not (tmp_path / "kv").exists()


def test_the_write_budget_pauses_writing_and_not_the_engine(tmp_path):
    token_ids, unlimited = run(tmp_path / "unlimited", ssd_min_free=0)
    limited_ids, stats = run(tmp_path / "limited", ssd_min_free=0, ssd_write_budget=20_000)
    assert limited_ids == token_ids
    assert unlimited.cold.blocks_written == 6
    assert 0 < stats.cold.blocks_written < 6
    assert stats.cold.refused_by_write_budget > 0
    assert stats.cold.bytes_written_last_day <= 20_000


@pytest.mark.parametrize(("settings", "blocks_written"), [({}, 0), ({"ssd_min_free": 0}, 6)])
def test_nothing_is_written_to_a_volume_that_is_nearly_full(tmp_path, monkeypatch, settings, blocks_written):
    monkeypatch.setattr(ssd_budget, "free_space_bytes", lambda directory: 0)
    _, stats = run(tmp_path, **settings)
    assert stats.cold.blocks_written == blocks_written
    assert (stats.cold.refused_by_free_space > 0) == (blocks_written == 0)


def test_the_folder_says_what_a_token_of_the_model_costs(tmp_path):
    run(tmp_path, ssd_min_free=0)
    [path] = tmp_path.glob("*/namespace.json")
    # Keys and values of two layers, two heads of 16, float32.
    assert json.loads(path.read_text())["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
