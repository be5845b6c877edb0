"""Quantized and bounded keys and values: one engine setting, another namespace, the same answers from the cache."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.generate import generate_step
from tiny_models import tiny_gemma3, tiny_llama, tiny_mamba

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import InvalidSettingError

BLOCK_SIZE = 16
SETTINGS = {
    "quantized from the start": {"kv_bits": 8, "kv_group_size": 32},
    "quantized within the prompt": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 70},
    "quantized within the answer": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 160},
    "quantized beside windows": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 70},
    "bounded": {"max_kv_size": 48},
    "bounded by more than the prompt": {"max_kv_size": 400},
}


def tokens(count, seed=1):
    return random.Random(seed).choices(range(512), k=count)


def wide_llama(**options):
    """Heads of 32, which a group of 32 elements divides."""
    return tiny_llama(num_attention_heads=2, num_key_value_heads=2, **options)


@pytest.fixture(scope="module")
def llama():
    return wide_llama()


@pytest.fixture(params=SETTINGS, ids=str)
def settings(request):
    return EngineSettings(**SETTINGS[request.param])


@pytest.fixture
def model(request, llama, settings):
    return tiny_gemma3(head_dim=32) if "windows" in request.node.callspec.id else llama


def generate(engine, prompt, max_tokens=32):
    return engine.generate(prompt, max_tokens=max_tokens, logprobs=True)


def open_engine(model, settings, **cache):
    return Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE, **cache), settings=settings)


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_reused_prefixes_change_no_bit(model, settings, tier, tmp_path: Path):
    trunk = tokens(150)
    with open_engine(model, settings, no_cache=True) as engine:
        first = generate(engine, trunk)
        prompts = [
            trunk,
            trunk + first.token_ids + tokens(20, seed=2),
            trunk[:100] + tokens(30, seed=3),
            trunk[:96] + tokens(90, seed=4),
        ]
        cold = [generate(engine, prompt) for prompt in prompts]
    cache = {"paged_ssd_cache_dir": tmp_path} if tier == "cold" else {}
    engine = open_engine(model, settings, **cache)
    generate(engine, trunk)
    for prompt, expected in zip(prompts, cold, strict=True):
        if tier == "cold":
            engine.close()
            engine = open_engine(model, settings, **cache)
        result = generate(engine, prompt)
        assert result.usage.cached_tokens >= 96
        assert result.token_ids == expected.token_ids
        assert result.logprobs == expected.logprobs
    engine.cache.check()
    engine.close()


def test_answer_does_not_depend_on_the_steps_of_the_prefill(model, settings):
    results = []
    for step in (512, 50, 33):
        with open_engine(model, settings.model_copy(update={"prefill_step_size": step}), no_cache=True) as engine:
            results.append(generate(engine, tokens(150)))
    assert results[0].logprobs == results[1].logprobs == results[2].logprobs


def test_requests_side_by_side_are_answered_as_alone(model, settings):
    prompts = [tokens(length, seed=length) for length in (20, 60, 130, 150)]
    with open_engine(model, settings) as engine:
        alone = [generate(engine, prompt).token_ids for prompt in prompts]
        with ThreadPoolExecutor(4) as callers:
            together = list(callers.map(lambda prompt: generate(engine, prompt).token_ids, prompts))
    assert together == alone


@pytest.mark.parametrize("other", [{}, {"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 300}])
def test_blocks_of_other_settings_are_never_found(llama, other, tmp_path: Path):
    prompt = tokens(100)
    here = EngineSettings(kv_bits=8, kv_group_size=32)
    with open_engine(llama, EngineSettings(**other), paged_ssd_cache_dir=tmp_path) as engine:
        generate(engine, prompt)
    with open_engine(llama, here, paged_ssd_cache_dir=tmp_path) as engine:
        assert generate(engine, prompt).usage.cached_tokens == 0
    with open_engine(llama, here, paged_ssd_cache_dir=tmp_path) as engine:
        assert generate(engine, prompt).usage.cached_tokens == 96


def test_quantized_blocks_take_the_bytes_of_their_bits(llama):
    sizes = []
    for bits in (None, 8, 4):
        with open_engine(llama, EngineSettings(kv_bits=bits, kv_group_size=32)) as engine:
            generate(engine, tokens(BLOCK_SIZE * 10 + 2), max_tokens=1)
            sizes.append(engine.cache.stats().hot.hot_bytes)
    # 32 bits an element, or its own and a scale and a bias of 32 bits for each 32 elements.
    assert sizes == [sizes[0], sizes[0] * 10 // 32, sizes[0] * 6 // 32]


def test_bounded_model_answers_as_mlx_lm_does(llama):
    prompt = tokens(150)
    expected = [
        token
        for token, _ in generate_step(mx.array(prompt), llama, max_tokens=20, max_kv_size=48, prefill_step_size=64)
    ]
    with open_engine(llama, EngineSettings(max_kv_size=48)) as engine:
        assert [generate(engine, prompt, 20).token_ids for _ in range(2)] == [expected, expected]


@pytest.mark.parametrize(
    ("make_model", "settings", "says"),
    [
        (tiny_llama, {"kv_bits": 4}, "kv_group_size=64"),  # heads of 16
        (tiny_mamba, {"kv_bits": 4}, "no layer with full attention"),
    ],
)
def test_model_that_cannot_be_quantized_is_refused_by_name(make_model, settings, says):
    with pytest.raises(InvalidSettingError, match=says):
        Engine(make_model(), name="tiny", settings=EngineSettings(**settings))


def test_bound_of_a_model_that_sets_its_own_is_said_to_have_no_effect(caplog):
    prompt = tokens(60)
    with open_engine(tiny_gemma3(), EngineSettings(max_kv_size=20)) as engine:
        bounded = generate(engine, prompt)
    with open_engine(tiny_gemma3(), EngineSettings()) as engine:
        assert bounded.logprobs == generate(engine, prompt).logprobs
    assert "max_kv_size=20 has no effect" in caplog.text
