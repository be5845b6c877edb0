"""Every architecture of mlx-lm, restored from RAM and from SSD, answers as if it had read the whole prompt."""

import os

# Before anything imports MLX: on the reference BLAS equal work gives equal bits.
os.environ["OMLX_OPENBLAS"] = "0"

import itertools
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from omlx_core.mlx_backend import backend_name, mx

import pytest
from mlx_lm.models.cache import make_prompt_cache

from integration_tests.architectures import (
    ARCHITECTURES,
    CUT_DEPENDENT,
    FAMILIES,
    NOT_TRIED,
    UNKNOWN_CACHE,
    UNLIKE_ALONE_IN_BATCH,
    build_tiny,
)
from integration_tests.architectures.page import PROPERTY, PageWriter, Row
from integration_tests.architectures.situations import BLOCK_SIZE, SHARED_TOKENS, open_tiny_engine, tokens
from integration_tests.architectures.trial import compare, run_trial
from omlx_core.engine import prefix_cache, sequential_batch

# A new process takes longer to start than to restore an architecture, so that each serves several.
MAX_GROUP_SIZE = 11


def in_groups(names):
    """Neighbours together, in groups of about the same size."""
    count = -(-len(names) // MAX_GROUP_SIZE)
    bounds = [len(names) * index // count for index in range(count + 1)]
    return [names[start:stop] for start, stop in itertools.pairwise(bounds)]


GROUPS = {
    f"{family}-{group[0]}-to-{group[-1]}": group
    for family, configs in FAMILIES.items()
    for group in in_groups(sorted(configs, key=str.lower))
}


def test_every_architecture_is_tried_or_has_a_reason_not_to_be():
    import mlx_lm.models

    folder = Path(mlx_lm.models.__path__[0])
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    tried = ARCHITECTURES.keys() | NOT_TRIED.keys()
    assert tried <= sources.keys()
    models = {name for name, source in sources.items() if "class ModelArgs" in source and "class Model(" in source}
    assert models <= tried


@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_restored_prefixes_change_no_answer(names, tmp_path: Path, run_python, record_property):
    assert backend_name() == "cpu", "this test compares bits and needs a process that has not loaded OpenBLAS"
    trials, problems = {}, []
    for name in names:
        try:
            trials[name] = run_trial(name, tmp_path / name)
        except Exception:  # the others of the group are tried all the same
            problems.append(f"{name}: {traceback.format_exc()}")
    jobs = json.dumps({name: trial.job() for name, trial in trials.items()})
    done = run_python("-m", "integration_tests.architectures.restore", stdin=jobs, OMLX_OPENBLAS="0")
    if done.returncode:
        problems.append(f"the new process ended with {done.returncode}: {done.stderr}")
    else:
        restored = json.loads(done.stdout)
        found = {name: compare(trial, restored[name]) for name, trial in trials.items()}
        problems += itertools.chain.from_iterable(found.values())
        record_property(PROPERTY, {name: trial.row() for name, trial in trials.items() if not found[name]})
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_page_is_written_once_every_architecture_has_a_row_whatever_their_order(tmp_path: Path):
    reused = dict.fromkeys(SHARED_TOKENS, 0)
    rows = {name: Row(caches="KVCache", parts=["rows"], is_batched=True, reused=reused) for name in ARCHITECTURES}
    [first, *_, last] = rows
    pages = [tmp_path / "forwards.md", tmp_path / "backwards.md"]
    for page, missing in zip(pages, (last, first), strict=True):
        writer = PageWriter(page)
        for recorded in ({name: row for name, row in rows.items() if name != missing}, {missing: rows[missing]}):
            writer.pytest_sessionfinish()
            assert not page.exists()
            writer.pytest_runtest_logreport(SimpleNamespace(when="call", user_properties=[(PROPERTY, recorded)]))
        writer.pytest_sessionfinish()
    [text, again] = [page.read_text(encoding="utf-8") for page in pages]
    assert all(f"\n| {name} | " in text for name in ARCHITECTURES.keys() | NOT_TRIED.keys())
    assert text == again


@pytest.mark.parametrize("name", sorted(CUT_DEPENDENT.keys() | UNKNOWN_CACHE))
def test_model_that_cannot_be_restored_exactly_says_that_it_runs_uncached(name, caplog):
    open_tiny_engine(name, block_size=BLOCK_SIZE).close()
    assert f"{name} runs without a prefix cache" in caplog.text


def test_engine_runs_those_uncached_whose_answers_depend_on_where_a_prompt_is_cut():
    assert prefix_cache._CUT_DEPENDENT.keys() == CUT_DEPENDENT.keys()


def test_engine_decodes_those_one_after_the_other_that_a_batch_answers_otherwise():
    named = sequential_batch.UNLIKE_ALONE_IN_BATCH.keys()
    assert named <= UNLIKE_ALONE_IN_BATCH.keys()
    # The engine need not name those whose caches show it.
    for name in UNLIKE_ALONE_IN_BATCH.keys() - named:
        model = build_tiny(name)
        prompt_cache = make_prompt_cache(model)
        mx.eval(model(mx.array([tokens(4, seed=1)]), cache=prompt_cache))
        assert any(not hasattr(layer, "merge") or layer.empty() for layer in prompt_cache), name


@pytest.mark.parametrize("name", sorted({"gpt_oss", "lfm2", "llama", *UNLIKE_ALONE_IN_BATCH}))
def test_neighbours_of_other_lengths_change_no_answer(name):
    prompts = [tokens(length, seed=length) for length in (12, 37, 90)]
    options = {"max_tokens": 8, "logprobs": True}
    with open_tiny_engine(name, no_cache=True) as engine:
        alone = [engine.generate(prompt, **options) for prompt in prompts]
        streams = [engine.stream(prompt, **options) for prompt in prompts]
        with ThreadPoolExecutor(len(streams)) as callers:
            together = [chunks[-1].result for chunks in callers.map(list, streams)]
    for result, expected in zip(together, alone, strict=True):
        assert result.token_ids == expected.token_ids
        assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
