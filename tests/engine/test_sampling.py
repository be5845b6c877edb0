"""Samplers and logits processors on rows of a few logits; that a batch changes nothing is tested with the engine."""

from omlx_core.mlx_backend import mx

import pytest

from omlx_core.engine.params import MAX_LOGIT_BIAS, GenerationParams
from omlx_core.engine.results import TokenLogprob
from omlx_core.engine.sampling import make_logits_processors, make_sampler, top_logprobs

LOGPROBS = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))


def draws(count, special_token_ids=(), logprobs=LOGPROBS, **options):
    sampler = make_sampler(GenerationParams(**{"temperature": 1.0, "seed": 5, **options}), special_token_ids)
    return [sampler(logprobs).item() for _ in range(count)]


def processed(logits, token_ids, **options):
    row, context = mx.array([logits]), mx.array(token_ids, dtype=mx.int32)
    for processor in make_logits_processors(GenerationParams(**options)):
        row = processor(context, row)
    return row.tolist()[0]


# Samplers


def test_greedy_requests_share_one_sampler():
    assert make_sampler(GenerationParams(seed=1)) is make_sampler(GenerationParams(seed=2))


def test_seed_repeats_the_draws_and_another_changes_them():
    assert draws(30) == draws(30)
    assert draws(30) != draws(30, seed=6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-300, 5e-324])
def test_tiny_temperature_draws_the_likeliest_token(dtype, temperature):
    sure = mx.array([[0.0, -10.0, -12.0]], dtype=dtype)  # 0 * inf would be no number
    assert draws(3, logprobs=sure, temperature=temperature) == [0, 0, 0]


def test_xtc_leaves_out_all_likely_tokens_but_the_least_of_them():
    assert set(draws(60, xtc_probability=1.0, xtc_threshold=0.1)) == {2, 3}
    assert set(draws(60, xtc_probability=1.0, xtc_threshold=0.2)) == {1, 2, 3}


def test_xtc_spares_special_tokens():
    assert set(draws(60, special_token_ids=[0], xtc_probability=1.0)) == {0, 2, 3}


def test_xtc_applies_as_often_as_it_should():
    sure = mx.log(mx.array([[0.6, 0.4 - 1e-6, 1e-6]]))  # XTC leaves only the second
    without = draws(400, logprobs=sure).count(1)
    with_xtc = draws(400, logprobs=sure, xtc_probability=0.5).count(1)
    assert 120 < without < 200  # 160 ± 4 standard deviations
    assert 240 < with_xtc < 320  # 280: half of them all, and 40 % of the rest


def test_xtc_is_drawn_from_the_requests_own_key():
    mx.random.seed(1)
    first = draws(40, xtc_probability=0.5)
    mx.random.seed(2)
    assert draws(40, xtc_probability=0.5) == first


@pytest.mark.parametrize(
    ("options", "token_id"),
    [
        ({"top_p": 0.5}, 0),  # first: one token is left, which XTC spares
        ({"min_p": 0.5}, 1),  # first: 0.5 and 0.3 are left
        ({"top_k": 1}, 2),  # last: 0.15 and 0.05 are left
    ],
)
def test_xtc_stands_between_min_p_and_top_k(options, token_id):
    assert set(draws(20, xtc_probability=1.0, xtc_threshold=0.1, **options)) == {token_id}


# Logits processors


def test_request_without_bias_and_penalties_has_no_processors():
    assert make_logits_processors(GenerationParams(penalty_context_tokens=5)) == []


def test_logit_bias_is_added_to_its_tokens():
    assert processed([0.0, 1.0, 2.0], [0], logit_bias={1: 5.0, 2: -100.0}) == [0.0, 6.0, -98.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repetition_penalty": 2.0}, [-2.0, 1.0, 1.0, 3.0]),
        ({"presence_penalty": 0.5}, [-1.5, 0.5, 1.0, 3.0]),
        ({"frequency_penalty": 0.5}, [-1.5, 0.0, 1.0, 3.0]),
        ({"frequency_penalty": -0.5}, [-0.5, 2.0, 1.0, 3.0]),
        # The repetition penalty first: it goes by the sign of what the model said.
        ({"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.5}, [-3.0, -0.5, 1.0, 3.0]),
    ],
)
def test_penalties_count_the_last_tokens(options, expected):
    logits = [-1.0, 2.0 if "repetition_penalty" in options else 1.0, 1.0, 3.0]
    assert processed(logits, [3, 1, 0, 1], penalty_context_tokens=3, **options) == expected


@pytest.mark.parametrize("repetition_penalty", [0.01, 100])
def test_largest_bias_and_penalty_leave_float16_in_its_range(repetition_penalty):
    params = GenerationParams(
        logit_bias={0: MAX_LOGIT_BIAS, 1: -MAX_LOGIT_BIAS},
        repetition_penalty=repetition_penalty,
        presence_penalty=-2,
        frequency_penalty=-2,
    )
    logits = mx.array([[300, -300, 0]], dtype=mx.float16)
    for processor in make_logits_processors(params):
        logits = processor(mx.array([0, 1, 2]), logits)
    assert logits.dtype == mx.float16
    assert mx.isfinite(logits).all().item()


# The likeliest tokens


def test_top_logprobs_come_likeliest_first_and_alike_by_token_id():
    row = mx.array([-3.0, -1.0, -2.0, -1.0, -2.0, -2.0])
    ids = [top.token_id for top in top_logprobs(row, 4)]
    assert ids == [1, 3, 2, 4]
    assert top_logprobs(row, 1) == [TokenLogprob(1, -1.0)]


def test_top_logprobs_go_by_token_id_among_the_many_that_are_alike_in_bfloat16():
    is_likelier = mx.arange(50_000) % 10_000 == 9_999
    row = mx.where(is_likelier, -2.0, -10.75).astype(mx.bfloat16)
    likelier = [TokenLogprob(token_id, -2.0) for token_id in range(9_999, 50_000, 10_000)]
    assert top_logprobs(row, 8) == [*likelier, *(TokenLogprob(token_id, -10.75) for token_id in range(3))]


def test_top_logprobs_leave_out_what_cannot_come():
    row = mx.array([-float("inf"), -0.5, -float("inf"), -1.5])
    assert top_logprobs(row, 20) == [TokenLogprob(1, -0.5), TokenLogprob(3, -1.5)]
