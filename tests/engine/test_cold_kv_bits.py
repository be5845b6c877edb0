"""Eight bits on SSD: smaller, near the exact answer, and never in an exact request's way."""

import pytest
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import InvalidSettingError

PROMPT = tokens(10 * BLOCK_SIZE + 5)


def ask(model, folder, **settings):
    """The answer of an engine that has just started, and what its folder then takes."""
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=folder, **settings)) as engine:
        result = engine.generate(PROMPT, max_tokens=1, logprobs=True)
        assert engine.cache.flush(60)
        return result, engine.cache.stats().cold.size_bytes


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_lfm2])
def test_a_new_engine_restores_what_takes_less_and_answers_almost_alike(make, tmp_path):
    model = make()
    exact, exact_bytes = ask(model, tmp_path / "exact")
    _, small_bytes = ask(model, tmp_path / "small", cold_kv_bits=8)
    near, _ = ask(model, tmp_path / "small", cold_kv_bits=8)
    assert small_bytes < 0.9 * exact_bytes  # headers and checkpoints stay as they are
    assert near.usage.cached_tokens_cold == 10 * BLOCK_SIZE
    assert near.token_ids == exact.token_ids
    assert near.logprobs[0] != exact.logprobs[0]
    assert near.logprobs[0] == pytest.approx(exact.logprobs[0], abs=0.2)


def test_exact_and_inexact_blocks_are_never_shared(tmp_path):
    model = tiny_llama()
    exact, _ = ask(model, tmp_path, cold_kv_bits=None)
    assert ask(model, tmp_path, cold_kv_bits=8)[0].usage.cached_tokens == 0
    again, _ = ask(model, tmp_path)
    assert again.usage.cached_tokens_cold == 10 * BLOCK_SIZE
    assert (again.token_ids, again.logprobs) == (exact.token_ids, exact.logprobs)


def test_what_is_still_in_ram_is_exact(tmp_path):
    cache = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path, cold_kv_bits=8)
    with Engine(tiny_llama(), cache=cache) as engine:
        cold, warm = (engine.generate(PROMPT, max_tokens=5, logprobs=True) for _ in range(2))
    assert warm.usage.cached_tokens_hot == 10 * BLOCK_SIZE
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_keys_that_are_quantized_already_are_refused(tmp_path):
    cache = CacheSettings(paged_ssd_cache_dir=tmp_path, cold_kv_bits=8)
    with pytest.raises(InvalidSettingError, match="cold_kv_bits=8 with kv_bits=8"):
        Engine(tiny_llama(head_dim=32), cache=cache, settings=EngineSettings(kv_bits=8, kv_group_size=32))
