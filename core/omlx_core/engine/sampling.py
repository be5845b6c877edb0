"""From logits to a token: mlx-lm's processors and filters, with a random stream for each request.

A step computes ``logits -> logits processors -> log-probabilities -> sampler``. The log-probabilities in the middle are
the reported ones: after penalties, biases and constraints, before temperature and truncation, in the model's precision.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from omlx_core.mlx_backend import mx

import numpy as np
from mlx_lm import sample_utils

from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import TokenLogprob

Sampler = Callable[[mx.array], mx.array]
"""Takes log-probabilities of shape ``[batch, vocab]`` and returns token ids of shape ``[batch]``."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""Takes a sequence's tokens so far, of shape ``[tokens]``, and the logits after them, of shape ``[1, vocab]``.

Returns logits of the same shape and type, and may write to those that it was given.
"""


def make_sampler(params: GenerationParams, special_token_ids: Sequence[int] = ()) -> Sampler:
    """The sampler of one request. Called on the MLX thread.

    mlx-lm's own samplers draw from one global random state, so a request's tokens would depend on its neighbours.
    This one splits a key of its own; the filters and their order are mlx-lm's (`mlx_lm.sample_utils.make_sampler`).

    Args:
        params: the request's options.
        special_token_ids: tokens that XTC never leaves out; mlx-lm's server names end-of-sequence and newline.
    """
    if params.temperature == 0:
        # One shared object: mlx-lm samples a batch in one call if all its samplers are the same.
        sampler: Sampler = sample_utils.greedy_sampler
        return sampler
    key = mx.random.key(secrets.randbits(64) if params.seed is None else params.seed)
    special_ids = list(special_token_ids)
    # The least temperatures have no reciprocal.
    scale = min(1 / params.temperature, 1e30)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, subkey = mx.random.split(key)
        if params.top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = sample_utils.apply_min_p(logprobs, params.min_p)
        if params.xtc_probability > 0:
            # Whether XTC applies is drawn here: `apply_xtc` would draw it from the global state.
            subkey, xtc_key = mx.random.split(subkey)
            is_applied = mx.random.uniform(shape=(len(logprobs), 1), key=xtc_key) < params.xtc_probability
            without_top_choices = sample_utils.apply_xtc(logprobs, 1.0, params.xtc_threshold, special_ids)
            logprobs = mx.where(is_applied, without_top_choices, logprobs)
        if 0 < params.top_k < logprobs.shape[-1]:
            logprobs = sample_utils.apply_top_k(logprobs, params.top_k)
        # float16 has no room for the reciprocal of a small temperature: 0 * inf would be NaN.
        return mx.random.categorical(logprobs.astype(mx.float32) * scale, key=subkey)

    return sample


def make_logits_processors(params: GenerationParams) -> list[LogitsProcessor]:
    """Bias and penalties of one request, in mlx-lm's order; empty if it has none. Called on the MLX thread.

    Penalties look at the last `GenerationParams.penalty_context_tokens` tokens that they are given. The repetition
    penalty is that of CTRL (https://arxiv.org/abs/1909.05858), the other two are OpenAI's.
    """
    num_tokens = params.penalty_context_tokens
    processors: list[LogitsProcessor] = sample_utils.make_logits_processors(
        logit_bias=dict(params.logit_bias),
        repetition_penalty=None if params.repetition_penalty == 1 else params.repetition_penalty,
        repetition_context_size=num_tokens,
        presence_penalty=params.presence_penalty,
        presence_context_size=num_tokens,
        frequency_penalty=params.frequency_penalty,
        frequency_context_size=num_tokens,
    )
    return processors


def top_logprobs(logprobs: mx.array, count: int) -> list[TokenLogprob]:
    """The likeliest tokens, likeliest first and those alike by token id. Called on the MLX thread.

    Args:
        logprobs: evaluated log-probabilities of shape ``[vocab]``.
        count: how many, at least 1; there are fewer if fewer are possible.
    """
    values = np.array(logprobs.astype(mx.float32))
    count = min(count, len(values))
    # A partition alone would choose among tokens that are alike as it likes, and in bfloat16 many are.
    threshold = np.partition(values, -count)[-count]
    candidates = np.flatnonzero((values >= threshold) & (values > -np.inf))
    likeliest = candidates[np.argsort(-values[candidates], kind="stable")][:count]
    return [TokenLogprob(int(token_id), float(values[token_id])) for token_id in likeliest]
