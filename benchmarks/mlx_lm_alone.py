"""What mlx-lm does by itself with the prompts that the engine is given: the baseline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.generate import BatchGenerator, generate_step


def generate_step_arrivals_s(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
    """mlx-lm's decoding of one prompt."""
    [prompt] = prompts
    tokens = generate_step(mx.array(prompt), model, max_tokens=num_tokens)
    return [[time.perf_counter() for _ in tokens]]


def batch_generator_arrivals_s(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
    """mlx-lm's decoding of several prompts."""
    with closing(BatchGenerator(model, prefill_batch_size=len(prompts))) as generator:
        uids = generator.insert([list(prompt) for prompt in prompts], [num_tokens] * len(prompts))
        arrivals_s: dict[int, list[float]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                arrivals_s[response.uid].append(time.perf_counter())
    return list(arrivals_s.values())
