"""The checkpoints' share, from the settings to both tiers."""

import random

from tiny_models import tiny_lfm2

from omlx_core import CacheSettings, Engine

BLOCK_SIZE = 16


def run(model, directory, **settings):
    """Both tiers after some prompts of several blocks."""
    generator = random.Random(1)
    prompts = [generator.choices(range(512), k=5 * BLOCK_SIZE) for _ in range(6)]
    cache = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=directory, ssd_min_free=0, **settings)
    with Engine(model, cache=cache) as engine:
        for prompt in prompts:
            engine.generate(prompt, max_tokens=2)
            assert engine.cache.flush(30)
        engine.cache.check()
        stats = engine.cache.stats()
    return stats.hot, stats.cold


def test_checkpoints_keep_to_their_share_of_both_tiers_and_rows_stay(tmp_path):
    model = tiny_lfm2()
    hot, cold = run(model, tmp_path / "ample")
    sizes = {"hot_cache_max_size": hot.hot_bytes, "paged_ssd_cache_max_size": cold.size_bytes}
    assert run(model, tmp_path / "enough", **sizes)[1].size_bytes == cold.size_bytes
    share = min(hot.checkpoint_bytes / hot.hot_bytes, cold.checkpoint_bytes / cold.size_bytes) / 2
    little_hot, little_cold = run(model, tmp_path / "little", **sizes, checkpoint_share=share)
    assert 0 < little_hot.checkpoint_bytes <= share * hot.hot_bytes
    assert 0 < little_cold.checkpoint_bytes <= share * cold.size_bytes
    assert little_hot.hot_bytes - little_hot.checkpoint_bytes == hot.hot_bytes - hot.checkpoint_bytes
    assert little_cold.size_bytes - little_cold.checkpoint_bytes == cold.size_bytes - cold.checkpoint_bytes
