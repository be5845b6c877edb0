"""A reused prefix changes nothing but the time: token ids and log-probabilities equal the cold run's, bit for bit."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import tiny_llama

from omlx_core import CacheSettings, Engine, EngineSettings

BLOCK_SIZE = 16
DTYPES = ["float32", "bfloat16", "float16"]
NO_CACHE = CacheSettings(no_cache=True)


def tokens(count, seed=1):
    return random.Random(seed).choices(range(512), k=count)


def cold_result(model, prompt, **options):
    with Engine(model, cache=NO_CACHE) as engine:
        return engine.generate(prompt, logprobs=True, **options)


def assert_same(result, cold):
    assert result.token_ids == cold.token_ids
    assert result.logprobs == cold.logprobs


@pytest.fixture(scope="module", params=DTYPES)
def model(request):
    return tiny_llama(request.param)


@pytest.mark.parametrize("prompt_length", [17, 159, 160, 161, 300])
def test_exact_repeat_from_ram_equals_the_cold_run(model, prompt_length):
    prompt = tokens(prompt_length)
    cold = cold_result(model, prompt, max_tokens=20)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        first = engine.generate(prompt, max_tokens=20, logprobs=True)
        second = engine.generate(prompt, max_tokens=20, logprobs=True)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens_hot == (prompt_length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert_same(first, cold)
    assert_same(second, cold)


def test_reopened_cold_tier_equals_the_cold_run(model, tmp_path: Path):
    prompt = tokens(200)
    cold = cold_result(model, prompt, max_tokens=20)
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)
    with Engine(model, cache=settings) as engine:
        engine.generate(prompt, max_tokens=20)
        assert engine.cache.flush(timeout_s=60)
    with Engine(model, cache=settings) as engine:
        from_ssd = engine.generate(prompt, max_tokens=20, logprobs=True)
        assert engine.cache.flush(timeout_s=60)
        from_ram = engine.generate(prompt, max_tokens=20, logprobs=True)
        assert engine.cache.stats().hot.promotions >= 192 // BLOCK_SIZE
    assert (from_ssd.usage.cached_tokens_cold, from_ssd.usage.cached_tokens_hot) == (192, 0)
    assert (from_ram.usage.cached_tokens_cold, from_ram.usage.cached_tokens_hot) == (0, 192)
    assert_same(from_ssd, cold)
    assert_same(from_ram, cold)


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_next_turn_reuses_the_answer_too_and_equals_the_cold_run(model, tmp_path: Path, tier):
    prompt = tokens(150)
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path if tier == "cold" else None)
    engine = Engine(model, cache=settings)
    answer = engine.generate(prompt, max_tokens=40).token_ids
    next_turn = prompt + answer + tokens(25, seed=2)
    if tier == "cold":
        engine.close()
        engine = Engine(model, cache=settings)
    with engine:
        warm = engine.generate(next_turn, max_tokens=20, logprobs=True)
    assert warm.usage.cached_tokens == (150 + 40) // BLOCK_SIZE * BLOCK_SIZE
    assert_same(warm, cold_result(model, next_turn, max_tokens=20))


@pytest.mark.parametrize("shared", [96, 100])
def test_branch_reuses_only_whole_shared_blocks_and_equals_the_cold_run(model, shared):
    trunk = tokens(160)
    branch = trunk[:shared] + [(token + 1) % 512 for token in trunk[shared:]]
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate(trunk, max_tokens=5)
        warm = engine.generate(branch, max_tokens=20, logprobs=True)
        again = engine.generate(trunk, max_tokens=20, logprobs=True)
    assert warm.usage.cached_tokens == 96
    assert again.usage.cached_tokens == 144
    assert_same(warm, cold_result(model, branch, max_tokens=20))
    assert_same(again, cold_result(model, trunk, max_tokens=20))


@pytest.mark.parametrize("step", [1, 7, 16, 1000])
def test_prefill_step_changes_nothing(model, step):
    prompt = tokens(120)
    cold = cold_result(model, prompt, max_tokens=10)
    settings = EngineSettings(prefill_step_size=step)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE), settings=settings) as engine:
        assert_same(engine.generate(prompt, max_tokens=10, logprobs=True), cold)
        assert_same(engine.generate(prompt, max_tokens=10, logprobs=True), cold)


def test_neighbours_in_the_batch_change_nothing(model):
    prompts = [tokens(64) + tokens(length, seed=length) for length in (3, 20, 40, 77, 90, 130)]
    cold = [cold_result(model, prompt, max_tokens=30) for prompt in prompts]
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine, ThreadPoolExecutor(6) as callers:
        for _ in range(2):
            results = callers.map(lambda p: engine.generate(p, max_tokens=30, logprobs=True), prompts)
            for result, expected in zip(results, cold, strict=True):
                assert_same(result, expected)


def test_answer_is_unharmed_by_a_hot_tier_of_a_single_block(model):
    prompt = tokens(200)
    cold = cold_result(model, prompt, max_tokens=10)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate(prompt[:17], max_tokens=1)
        block_bytes = engine.cache.stats().hot.hot_bytes
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE, hot_cache_max_size=block_bytes)) as engine:
        for _ in range(2):
            result = engine.generate(prompt, max_tokens=10, logprobs=True)
            assert_same(result, cold)
        assert engine.cache.stats().hot.hot_bytes == block_bytes
        assert result.usage.cached_tokens == BLOCK_SIZE


def test_prefix_with_another_beginning_is_a_miss(model):
    x, y, z = tokens(16, seed=1), tokens(16, seed=2), tokens(16, seed=3)
    tail = tokens(4, seed=4)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate(x + y + tail, max_tokens=1)
        other = engine.generate(z + y + tail, max_tokens=5, logprobs=True)
        same = engine.generate(x + y + tail, max_tokens=5)
    assert other.usage.cached_tokens == 0
    assert same.usage.cached_tokens == 32
    assert_same(other, cold_result(model, z + y + tail, max_tokens=5))


def test_salts_share_nothing(model):
    prompt = tokens(100)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        reused = [
            engine.generate(prompt, max_tokens=1, cache_salt=salt).usage.cached_tokens
            for salt in (None, "alice", "bob", "alice", None)
        ]
    assert reused == [0, 0, 0, 96, 96]


def with_adapter(model, seed):
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    for layer in model.layers:
        adapter = layer.self_attn.q_proj
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(seed))
    mx.eval(model.parameters())
    return model


def test_other_weights_dtype_adapter_or_block_size_share_nothing_on_ssd(tmp_path: Path):
    prompt = tokens(100)

    def cached_tokens(model, block_size=BLOCK_SIZE):
        settings = CacheSettings(block_size=block_size, paged_ssd_cache_dir=tmp_path)
        with Engine(model, name="same name", cache=settings) as engine:
            return engine.generate(prompt, max_tokens=1).usage.cached_tokens

    assert cached_tokens(tiny_llama("float32", seed=0)) == 0
    assert cached_tokens(tiny_llama("float32", seed=1)) == 0
    assert cached_tokens(tiny_llama("bfloat16", seed=0)) == 0
    assert cached_tokens(tiny_llama("float32", seed=0), block_size=32) == 0
    assert cached_tokens(with_adapter(tiny_llama("float32", seed=0), seed=1)) == 0
    assert cached_tokens(with_adapter(tiny_llama("float32", seed=0), seed=2)) == 0
    assert cached_tokens(tiny_llama("float32", seed=0)) == 96
