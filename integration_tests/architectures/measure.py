"""What a tiny model does: its caches, its tokens, and how much its results depend on where a prompt is cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.models.cache import make_prompt_cache

from integration_tests.architectures.build import build_tiny

PROMPT = tuple((37 * i * i + 11 * i) % 499 for i in range(150))
STEPS = (50, 64)
NUM_TOKENS = 20


@dataclass(frozen=True)
class Generation:
    """Greedy tokens after ``PROMPT``, and the log-probabilities of the whole vocabulary that each was picked from."""

    token_ids: tuple[int, ...]
    logprobs: mx.array
    caches: list[Any]


@dataclass(frozen=True)
class Measurement:
    """One architecture.

    Attributes:
        caches: what ``describe`` says of its prompt cache.
        unmergeable: classes in it that have no ``merge``, so that mlx-lm can't batch them.
        never_filled: indices of the caches that are still empty after the generation.
        is_finite: whether every log-probability is, but for tokens that the model always rules out.
        num_distinct: of the ``NUM_TOKENS`` tokens.
        has_equal_tokens: whether prefill in each of ``STEPS`` gives the tokens of one step.
        differences: for each of ``STEPS`` the largest difference of a log-probability to that of one step.
        wall_s: seconds to build it and to generate once.
    """

    caches: str
    unmergeable: tuple[str, ...]
    never_filled: tuple[int, ...]
    is_finite: bool
    num_distinct: int
    has_equal_tokens: bool
    differences: tuple[float, ...]
    wall_s: float


def leaves(cache: Any) -> list[Any]:
    """The caches of a ``CacheList``, nested ones too; any other cache itself."""
    nested = getattr(cache, "caches", None)
    return [cache] if nested is None else [leaf for child in nested for leaf in leaves(child)]


def describe(caches: Sequence[Any]) -> str:
    """The caches of all layers in their order, equal neighbours counted: ``2 RotatingKVCache(48), KVCache``."""
    runs = [(name, len(list(run))) for name, run in groupby(_describe_one(cache) for cache in caches)]
    return ", ".join(name if length == 1 else f"{length} {name}" for name, length in runs)


def _describe_one(cache: Any) -> str:
    name = type(cache).__name__
    match name:
        case "CacheList":
            return f"{name}({describe(cache.caches)})"
        case "RotatingKVCache":
            return f"{name}({cache.max_size}{f', keep={cache.keep}' if cache.keep else ''})"
        case "ArraysCache":
            return f"{name}({len(cache.cache)})"
        case "ChunkedKVCache":
            return f"{name}({cache.chunk_size})"
        case _:
            return name


def generate(model: Any, step: int) -> Generation:
    """Prefill ``PROMPT`` in pieces of ``step`` tokens, then decode greedily."""
    caches = make_prompt_cache(model)
    for start in range(0, len(PROMPT), step):
        logits = model(mx.array([PROMPT[start : start + step]]), cache=caches)[0, -1]
        mx.eval(logits, [leaf.state for cache in caches for leaf in leaves(cache) if not leaf.empty()])
    token_ids, logprobs = [], []
    for _ in range(NUM_TOKENS):
        logprobs.append(logits - mx.logsumexp(logits))
        token_ids.append(int(mx.argmax(logits).item()))
        logits = model(mx.array([token_ids[-1:]]), cache=caches)[0, -1]
    return Generation(tuple(token_ids), mx.stack(logprobs).astype(mx.float32), caches)


def measure(model_type: str) -> Measurement:
    """Build it, generate with the prompt in one step, and again with it in steps of ``STEPS``."""
    start_s = time.perf_counter()
    model = build_tiny(model_type)
    whole = generate(model, len(PROMPT))
    mx.eval(whole.logprobs)
    wall_s = time.perf_counter() - start_s
    pieces = [generate(model, step) for step in STEPS]
    all_leaves = [leaf for cache in whole.caches for leaf in leaves(cache)]
    is_ruled_out = mx.all(whole.logprobs == -mx.inf, axis=0)
    return Measurement(
        caches=describe(whole.caches),
        unmergeable=tuple(sorted({type(leaf).__name__ for leaf in all_leaves if not hasattr(leaf, "merge")})),
        never_filled=tuple(index for index, cache in enumerate(whole.caches) if cache.empty()),
        is_finite=bool(mx.all(mx.isfinite(whole.logprobs) | is_ruled_out).item()),
        num_distinct=len(set(whole.token_ids)),
        has_equal_tokens=all(piece.token_ids == whole.token_ids for piece in pieces),
        differences=tuple(_difference(piece.logprobs, whole.logprobs) for piece in pieces),
        wall_s=wall_s,
    )


def _difference(a: mx.array, b: mx.array) -> float:
    """The largest absolute difference; between equal infinities there is none."""
    return float(mx.max(mx.where(a == b, 0.0, mx.abs(a - b))).item())
