"""Sliding windows on a real model: Gemma 3, asked beyond its windows' ends, answers as if nothing was cached."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration_tests.gemma_model import ensure_gemma_model
from omlx_core import CacheSettings, Engine
from omlx_core.engine.results import GenerationResult
from omlx_core.errors import ModelNotFoundError
from omlx_core.model.loading import load_model

ROOT = Path(__file__).parents[1]
WINDOW = 512
BLOCK_SIZE = 64
OPTIONS = {"max_tokens": 6, "logprobs": True}
# OpenBLAS sums in another order where a prompt is cut elsewhere or has neighbours.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, its answer without a cache, and how much of the prompt those before it leave in one."""

    prompt: list[int]
    cold: GenerationResult
    reusable_tokens: int


@pytest.fixture(scope="module")
def gemma_model():
    try:
        return str(ensure_gemma_model(progress=False))
    except ModelNotFoundError as exc:
        pytest.skip(str(exc))


def ask(engine, prompt):
    return engine.generate(prompt, **OPTIONS)


def ask_all_at_once(engine, prompts):
    with ThreadPoolExecutor(len(prompts)) as callers:
        return list(callers.map(lambda prompt: ask(engine, prompt), prompts))


def ask_new_process(model, prompts, **cache):
    """The results, as dictionaries."""
    requests = [{"prompt": prompt, "options": OPTIONS} for prompt in prompts]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ask_engine.py")), model, json.dumps(cache)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def make_cases(engine):
    """A conversation about this project's documentation, and branches of it, in the order in which they are asked.

    Where a next turn follows, the prompt ends three tokens before a block does, so that the answer fills the block; the
    second time that is also where the first window ends.
    """
    documentation = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = engine.tokenizer.encode(documentation)
    assert len(ids) > 2 * 15 * BLOCK_SIZE

    def capital_of(country):
        text = f"\n\nQuestion: What is the capital of {country}?\nAnswer: The capital of {country} is"
        return engine.tokenizer.encode(text, add_special_tokens=False)

    def case(prompt, *, reusable_blocks):
        return Case(prompt, ask(engine, prompt), reusable_blocks * BLOCK_SIZE)

    first = case(ids[: 15 * BLOCK_SIZE - 3], reusable_blocks=0)
    within = case(first.prompt[:300] + ids[-(WINDOW - 300 - 3) :], reusable_blocks=4)
    return {
        "first": first,
        "repeat": dataclasses.replace(first, reusable_tokens=14 * BLOCK_SIZE),
        "next turn": case(first.prompt + first.cold.token_ids + capital_of("France"), reusable_blocks=15),
        "branch beyond the window": case(first.prompt[:700] + capital_of("Italy"), reusable_blocks=10),
        "branch within the window": within,
        "next turn after that branch": case(
            within.prompt + within.cold.token_ids + capital_of("Japan"), reusable_blocks=WINDOW // BLOCK_SIZE
        ),
    }


def assert_same(token_ids, logprobs, cold, label):
    assert token_ids == cold.token_ids, label
    assert logprobs == pytest.approx(cold.logprobs, abs=TOLERANCE), label


def test_answers_beyond_the_window_are_the_same_from_both_tiers_and_in_a_batch(gemma_model, tmp_path):
    loaded = load_model(gemma_model)

    def open_engine(**cache):
        settings = CacheSettings(**cache)
        return Engine(loaded.model, loaded.tokenizer, name=loaded.name, config=loaded.config, cache=settings)

    with open_engine(no_cache=True) as engine:
        cases = make_cases(engine)
    texts = {name: case.cold.text for name, case in cases.items()}
    assert texts["next turn"].startswith(" Paris")
    assert texts["branch beyond the window"].startswith(" Rome")
    assert texts["next turn after that branch"].startswith(" Tokyo")

    settings = {"block_size": BLOCK_SIZE, "paged_ssd_cache_dir": str(tmp_path)}
    with open_engine(**settings) as engine:
        for name, case in cases.items():
            result = ask(engine, case.prompt)
            assert_same(result.token_ids, result.logprobs, case.cold, name)
            assert result.usage.cached_tokens_hot == case.reusable_tokens, name
        batch = ask_all_at_once(engine, [case.prompt for case in cases.values()])
        for (name, case), result in zip(cases.items(), batch, strict=True):
            assert_same(result.token_ids, result.logprobs, case.cold, f"{name}, in a batch")
        engine.cache.check()

    # Without room in RAM, whatever is reused comes from SSD.
    from_ssd = ask_new_process(gemma_model, [case.prompt for case in cases.values()], hot_cache_max_size=1, **settings)
    for (name, case), result in zip(cases.items(), from_ssd, strict=True):
        assert_same(result["token_ids"], result["logprobs"], case.cold, f"{name}, from SSD")
        assert result["usage"]["cached_tokens_hot"] == 0, name
        assert result["usage"]["cached_tokens_cold"] == (len(case.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE, name
