"""Every architecture of mlx-lm, restored from RAM and from SSD, answers as if it had read the whole prompt."""

import os

# Before anything imports MLX: on the reference BLAS equal work gives equal bits.
os.environ["OMLX_OPENBLAS"] = "0"

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omlx_core.mlx_backend import backend_name

import pytest

from integration_tests.architectures import (
    ARCHITECTURES,
    CUT_DEPENDENT,
    CUT_TOLERANCE,
    NOT_TRIED,
    UNLIKE_ALONE_IN_BATCH,
    build_tiny,
)
from omlx_core import CacheSettings, Engine
from omlx_core.model.loading import LoadedModel

BLOCK_SIZE = 16
# The token after an answer is computed in a step of its own in one run and among others in the other: windows and
# latent attention then sum in another order (see CUT_TOLERANCE).
NEXT_TURN_TOLERANCE = 3e-5
# Its cache class is its own, and no handler knows it.
UNKNOWN = {"deepseek_v41"}


def tokens(count, seed):
    return random.Random(seed).choices(range(512), k=count)


def open_engine(name, **cache):
    """The model is made on the engine's own thread, as a loaded one is: some keep arrays that can't leave it."""
    engine = Engine.__new__(Engine)
    engine._start(name, lambda: LoadedModel(build_tiny(name), None, name, {}, None), CacheSettings(**cache), None)
    return engine


def answer(engine, prompt):
    return engine.generate(prompt, max_tokens=8, logprobs=True)


def assert_same(result, cold, tolerance):
    assert result.token_ids == cold.token_ids
    if tolerance:
        assert result.logprobs == pytest.approx(cold.logprobs, abs=tolerance)
    else:
        assert result.logprobs == cold.logprobs


def test_every_architecture_is_tried_or_has_a_reason_not_to_be():
    import mlx_lm.models

    modules = {path.stem for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
    tried = ARCHITECTURES.keys() | NOT_TRIED.keys()
    assert tried <= modules
    models = {name for name in modules if "class ModelArgs" in source_of(name) and "class Model(" in source_of(name)}
    assert models <= tried


def source_of(name):
    import mlx_lm.models

    return (Path(mlx_lm.models.__path__[0]) / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - CUT_DEPENDENT.keys() - UNKNOWN))
def test_architecture_is_restored_from_both_tiers(name, tmp_path: Path):
    assert backend_name() == "cpu", "this test compares bits and needs a process that has not loaded OpenBLAS"
    trunk = tokens(150, seed=1)
    with open_engine(name, no_cache=True) as engine:
        first = answer(engine, trunk)
        prompts = {
            "exact repeat": trunk,
            "next turn": trunk + first.token_ids + tokens(20, seed=2),
            "branch inside a block": trunk[:100] + tokens(30, seed=3),
            "branch at a boundary": trunk[:96] + tokens(30, seed=4),
            "branch at the same boundary": trunk[:96] + tokens(30, seed=5),
        }
        cold = {case: answer(engine, prompt) for case, prompt in prompts.items()}
    exact = CUT_TOLERANCE.get(name, 0)
    tolerance = {case: max(exact, NEXT_TURN_TOLERANCE) if case == "next turn" else exact for case in prompts}

    with open_engine(name, block_size=BLOCK_SIZE) as engine:
        assert_same(answer(engine, trunk), first, exact)
        from_ram = {case: answer(engine, prompt) for case, prompt in prompts.items()}
        engine.cache.check()

    settings = {"block_size": BLOCK_SIZE, "paged_ssd_cache_dir": tmp_path}
    with open_engine(name, **settings) as engine:
        assert_same(answer(engine, trunk), first, exact)
    from_ssd = {}
    for case, prompt in prompts.items():
        with open_engine(name, **settings) as engine:
            from_ssd[case] = answer(engine, prompt)

    for case in prompts:
        assert_same(from_ram[case], cold[case], tolerance[case])
        assert_same(from_ssd[case], cold[case], tolerance[case])
        assert from_ram[case].usage.cached_tokens == from_ssd[case].usage.cached_tokens_cold
    reused = {case: result.usage.cached_tokens for case, result in from_ram.items()}
    assert reused["exact repeat"] == 144
    assert reused["next turn"] >= 144
    # Recurrent layers can be restored only where their state was kept: the first branch keeps it for the next.
    assert reused["branch inside a block"] in (0, 96)
    assert reused["branch at the same boundary"] == 96


@pytest.mark.parametrize("name", sorted(CUT_DEPENDENT.keys() | UNKNOWN))
def test_model_that_cannot_be_restored_exactly_runs_uncached_and_says_so(name, caplog):
    with open_engine(name, block_size=BLOCK_SIZE) as engine:
        results = [answer(engine, tokens(60, seed=1)) for _ in range(2)]
    assert [result.usage.cached_tokens for result in results] == [0, 0]
    assert results[0].token_ids == results[1].token_ids
    assert "runs without a prefix cache" in caplog.text


@pytest.mark.parametrize("name", sorted({"gpt_oss", "lfm2", "llama", *UNLIKE_ALONE_IN_BATCH}))
def test_neighbours_of_other_lengths_change_no_answer(name):
    prompts = [tokens(length, seed=length) for length in (12, 37, 90)]
    with open_engine(name, no_cache=True) as engine:
        alone = [answer(engine, prompt) for prompt in prompts]
        streams = [engine.stream(prompt, max_tokens=8, logprobs=True) for prompt in prompts]
        with ThreadPoolExecutor(len(streams)) as callers:
            together = [chunks[-1].result for chunks in callers.map(list, streams)]
    for result, expected in zip(together, alone, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
