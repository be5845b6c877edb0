"""Quantized and bounded keys and values: one engine setting, another namespace, the same answers from the cache."""

import random
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.generate import generate_step
from tiny_models import tiny_gemma3, tiny_llama, tiny_mamba, tiny_qwen3

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
    if settings.max_kv_size is not None:
        return tiny_qwen3()
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
        alone = [generate(engine, prompt) for prompt in prompts]
        streams = [engine.stream(prompt, max_tokens=32, logprobs=True) for prompt in prompts]
        firsts = [next(stream) for stream in streams]
        together = [list(stream)[-1].result for stream in streams]
    assert len(firsts) == 4
    for result, expected in zip(together, alone, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("length", [66, 82])
def test_single_token_behind_a_boundary_is_computed_as_in_the_cold_run(model, settings, length):
    # Of 82 tokens, 81 are prefilled: five blocks, where quantization may begin, and one token more.
    prompt = tokens(length)
    with open_engine(model, settings, no_cache=True) as engine:
        cold = generate(engine, prompt)
    with open_engine(model, settings) as engine:
        results = [generate(engine, prompt) for _ in range(2)]
    assert results[1].usage.cached_tokens > 0
    assert [result.logprobs for result in results] == [cold.logprobs] * 2


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


def test_bounded_model_answers_as_mlx_lm_does():
    model, prompt = tiny_qwen3(), tokens(150)
    steps = generate_step(mx.array(prompt), model, max_tokens=40, max_kv_size=48, prefill_step_size=BLOCK_SIZE)
    expected = [(token, logprobs[token].item()) for token, logprobs in steps]
    with open_engine(model, EngineSettings(max_kv_size=48)) as engine:
        for _ in range(2):
            result = generate(engine, prompt, 40)
            assert result.token_ids == [token for token, _ in expected]
            assert result.logprobs == pytest.approx([logprob for _, logprob in expected], abs=1e-5)


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


def test_a_prompt_gets_its_room_with_the_first_step_and_never_moves_again(monkeypatch):
    capacities = []
    with Engine(tiny_qwen3(), settings=EngineSettings(prefill_step_size=64)) as engine:
        compute = engine._scheduler._compute

        def compute_and_look(request, token_ids):
            compute(request, token_ids)
            capacities.append({leaf.keys.shape[2] for leaf in request.prompt_cache})

        monkeypatch.setattr(engine._scheduler, "_compute", compute_and_look)
        engine.generate(list(range(1, 501)), max_tokens=1)
    assert capacities == [{501}] * 8
