"""Samplers: mlx-lm's filters, with a random stream per request so that a batch changes nobody's answer."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from omlx_core.mlx_backend import mx

from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler

from omlx_core.engine.params import GenerationParams

Sampler = Callable[[mx.array], mx.array]
"""Takes log-probabilities of shape ``[batch, vocab]`` and returns token ids of shape ``[batch]``."""


def make_sampler(params: GenerationParams) -> Sampler:
    """The sampler of one request. Called on the MLX thread.

    mlx-lm's own samplers draw from one global random state, so a request's tokens would depend on its neighbours.
    This one splits a key of its own; the filters and their order are mlx-lm's (`mlx_lm.sample_utils.make_sampler`).
    """
    if params.temperature == 0:
        # One shared object: mlx-lm samples a batch in one call if all its samplers are the same.
        sampler: Sampler = greedy_sampler
        return sampler
    key = mx.random.key(secrets.randbits(64) if params.seed is None else params.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if 0 < params.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, params.top_k)
        key, subkey = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / params.temperature), key=subkey)

    return sample
