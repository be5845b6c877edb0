"""A draft makes answers come sooner, and changes none."""

import pytest
from tiny_models import tiny_gemma3, tiny_llama, tiny_mamba
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import InvalidSettingError

CACHE = CacheSettings(block_size=BLOCK_SIZE)


@pytest.fixture(scope="module", params=["poor", "perfect"])
def draft(request):
    return tiny_llama(seed=1) if request.param == "poor" else tiny_llama()


def alone(model, prompt, **options):
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        return engine.generate(prompt, **options)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"max_tokens": 40, "logprobs": True},
        {"max_tokens": 40, "temperature": 0.9, "top_p": 0.9, "seed": 3},
        {"max_tokens": 40, "repetition_penalty": 1.3, "logit_bias": {5: 1.5}},
    ],
)
def test_answer_is_the_models_own(model, draft, options, num_draft_tokens):
    settings = EngineSettings(num_draft_tokens=num_draft_tokens)
    with Engine(model, cache=CACHE, draft_model=draft, settings=settings) as engine:
        drafted = engine.generate(tokens(50), **options)
    expected = alone(model, tokens(50), **options)
    assert (drafted.token_ids, drafted.logprobs) == (expected.token_ids, expected.logprobs)
    assert drafted.finish_reason == expected.finish_reason


def test_perfect_draft_saves_steps_of_the_model(model, monkeypatch):
    calls = []
    with Engine(model, cache=CACHE, draft_model=tiny_llama(), settings=EngineSettings(num_draft_tokens=3)) as engine:
        pair = engine._scheduler._model
        monkeypatch.setattr(type(model), "__call__", counted(type(model).__call__, pair.target, calls))
        engine.generate(tokens(50), max_tokens=40)
    # One step of the prompt, one for its last token and three of the answer, and one for each further four tokens.
    assert len(calls) <= 2 + 10


def counted(call, counted_model, calls):
    def counting(self, *args, **kwargs):
        if self is counted_model:
            calls.append(args[0].shape)
        return call(self, *args, **kwargs)

    return counting


def test_blocks_hold_the_rows_of_both_and_are_reused(model, draft, tmp_path):
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)
    with Engine(model, cache=settings, draft_model=draft) as engine:
        first = engine.generate(tokens(50), max_tokens=30)
    turn = tokens(50) + first.token_ids + tokens(20, seed=2)
    expected = alone(model, turn, max_tokens=20, logprobs=True)
    with Engine(model, cache=settings, draft_model=draft) as engine:
        again = engine.generate(turn, max_tokens=20, logprobs=True)
        assert again.usage.cached_tokens_cold == 80
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
        engine.cache.check()
    with Engine(model, cache=settings) as engine:
        assert engine.generate(turn, max_tokens=1).usage.cached_tokens == 0


def test_requests_side_by_side_and_samples_are_answered_as_alone(model, draft):
    prompts = [tokens(length, seed=length) for length in (20, 37, 61)]
    expected = [alone(model, prompt, max_tokens=25).token_ids for prompt in prompts]
    with Engine(model, cache=CACHE, draft_model=draft) as engine:
        streams = [engine.stream(prompt, max_tokens=25) for prompt in prompts]
        firsts = [next(stream) for stream in streams]
        assert [list(stream)[-1].result.token_ids for stream in streams] == expected
        assert len(firsts) == 3
        samples = engine.sample(prompts[0], 2, max_tokens=10, temperature=1.0, seed=4)
        for seed, sample in enumerate(samples, start=4):
            assert sample.token_ids == alone(model, prompts[0], max_tokens=10, temperature=1.0, seed=seed).token_ids
        assert not engine._scheduler._answers._sequential()._num_read


def test_quantized_keys_go_with_a_draft(draft):
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=2)
    settings = EngineSettings(kv_bits=8, kv_group_size=32)
    with Engine(model, cache=CACHE, settings=settings) as engine:
        expected = engine.generate(tokens(50), max_tokens=20)
    wide_draft = tiny_llama(num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    with Engine(model, cache=CACHE, settings=settings, draft_model=wide_draft) as engine:
        assert engine.generate(tokens(50), max_tokens=20).token_ids == expected.token_ids


@pytest.mark.parametrize("make_model", [tiny_gemma3, tiny_mamba])
def test_layers_that_cannot_take_back_are_refused(make_model):
    with pytest.raises(InvalidSettingError, match="can't: use two models of full attention"):
        Engine(make_model(), draft_model=tiny_llama())


def test_draft_of_another_vocabulary_is_refused(model):
    with pytest.raises(InvalidSettingError, match="vocabulary has 300 tokens and the model's 512"):
        Engine(model, draft_model=tiny_llama(vocab_size=300))
