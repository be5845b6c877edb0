"""How fast prompts are decoded that no cache has seen, by any way of decoding them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from models import vocab_size

from omlx_core.request_timing import decode_tokens_per_s, draw_tokens

Prompts = Sequence[Sequence[int]]
Decode = Callable[[Prompts, int], list[list[float]]]
"""Answers prompts with so many tokens each, and gives the time at which each token came."""


class DecodeRate:
    """Draws new prompts for each measurement.

    Args:
        model: the mlx-lm model.
        prompt_tokens: length of each prompt.
        answer_tokens: length of each answer.
    """

    def __init__(self, model: Any, prompt_tokens: int, answer_tokens: int) -> None:
        self._vocab_size = vocab_size(model)
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = answer_tokens
        self._seeds = itertools.count()

    def tokens_per_s(self, decode: Decode, batch_size: int) -> float:
        """Tokens per second of all streams together, while all of them run.

        Raises:
            RuntimeError: that was never so.
        """
        seeds = itertools.islice(self._seeds, batch_size)
        prompts = [draw_tokens(seed, self._prompt_tokens, self._vocab_size) for seed in seeds]
        rate = decode_tokens_per_s(decode(prompts, self._answer_tokens))
        if rate is None:
            raise RuntimeError(
                f"answers of {self._answer_tokens} tokens ended before others began: ask for longer ones"
            )
        return rate
