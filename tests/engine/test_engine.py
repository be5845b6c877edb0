"""What callers of the engine rely on: sharing, streaming, cancelling, closing, and clear errors."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest
from mlx_gate import MlxThreadGate
from mlx_lm.models.cache import ArraysCache
from tiny_models import tiny_llama, tiny_mamba
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import (
    CacheDirectoryError,
    EngineClosedError,
    EngineError,
    InvalidParameterError,
    InvalidPromptError,
    InvalidSettingError,
    ModelNotFoundError,
    RequestCancelledError,
)
from omlx_core.state import handlers


@pytest.fixture
def engine(model):
    with Engine(model, name="tiny", cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine
        engine.cache.check()


@pytest.fixture
def chat_engine(model):
    with Engine(model, tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine


def blocks_in_use(engine):
    return engine.cache.stats().hot.blocks_in_use


def test_eight_diverging_requests_hold_the_shared_blocks_once(model):
    settings = CacheSettings(block_size=64)
    prefix = tokens(32 * 64)
    with Engine(model, cache=settings) as engine:
        streams = [engine.stream([*prefix, i, i + 1], max_tokens=60) for i in range(8)]
        with ThreadPoolExecutor(8) as callers:
            first = list(callers.map(next, streams))
        with MlxThreadGate(engine):
            assert blocks_in_use(engine) == 32 + 8
        results = [list(stream)[-1].result for stream in streams]
        assert len(first) == len(results) == 8
        # The first computes the prefix, and the seven that wait for their turn reuse it.
        assert sorted(result.usage.cached_tokens for result in results) == [0] + [32 * 64] * 7
        assert blocks_in_use(engine) == 0
        engine.cache.check()


def test_result_counts_its_tokens(engine):
    result = engine.generate(tokens(50), max_tokens=7)
    assert len(result.token_ids) == result.usage.completion_tokens == 7
    assert result.usage.prompt_tokens == 50
    assert result.usage.total_tokens == 57
    assert result.finish_reason == "length"
    assert result.logprobs is None
    assert result.ttft_s > 0


def test_request_that_is_not_to_be_stored_leaves_nothing_and_reuses_what_is_there(engine):
    assert engine.generate(tokens(100), max_tokens=30, store=False).usage.cached_tokens == 0
    assert engine.cache.stats().hot.blocks_cached == 0
    assert engine.generate(tokens(100), max_tokens=1).usage.cached_tokens == 0
    longer = tokens(100) + tokens(50, seed=2)
    assert engine.generate(longer, max_tokens=1, store=False).usage.cached_tokens == 96
    assert engine.generate(longer, max_tokens=1, store=False).usage.cached_tokens == 96


def test_single_token_prompt_is_answered(engine):
    assert len(engine.generate([5], max_tokens=3).token_ids) == 3


def test_stream_joins_to_the_result(chat_engine):
    chunks = list(chat_engine.stream("the quick brown fox", max_tokens=12, logprobs=True))
    result = chunks[-1].result
    assert all(chunk.result is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    assert [value for chunk in chunks for value in chunk.logprobs] == result.logprobs


def test_stop_text_ends_the_answer_and_is_not_in_it(chat_engine):
    whole = chat_engine.generate("the quick brown fox", max_tokens=20).text
    stop = whole[len(whole) // 3 : len(whole) // 3 + 3]
    stopped = chat_engine.generate("the quick brown fox", max_tokens=20, stop=[stop])
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = [c.text for c in chat_engine.stream("the quick brown fox", max_tokens=20, stop=stop)]
    assert "".join(streamed) == stopped.text


def test_end_token_ends_the_answer(model):
    tokenizer = tiny_tokenizer(512)
    with Engine(model, tokenizer) as engine:
        first = engine.generate(tokens(30), max_tokens=20).token_ids
    tokenizer.eos_token_ids = {first[4]}
    with Engine(model, tokenizer) as engine:
        result = engine.generate(tokens(30), max_tokens=20)
    assert result.token_ids == first[: first.index(first[4]) + 1]
    assert result.finish_reason == "stop"


def test_seed_repeats_a_sampled_answer_alone_and_in_a_batch(engine):
    options = {"max_tokens": 15, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7}
    alone = engine.generate(tokens(30), **options).token_ids
    with ThreadPoolExecutor(4) as callers:
        others = [callers.submit(engine.generate, tokens(30 + i, seed=i), max_tokens=30) for i in range(3)]
        batched = callers.submit(engine.generate, tokens(30), **options).result()
        for other in others:
            other.result()
    assert batched.token_ids == alone
    assert engine.generate(tokens(30), **{**options, "seed": 8}).token_ids != alone


def test_sampling_without_a_seed_varies(engine):
    answers = {tuple(engine.generate(tokens(30), max_tokens=15, temperature=1.0).token_ids) for _ in range(3)}
    assert len(answers) > 1


async def test_async_callers_share_the_batch(engine):
    expected = [engine.generate(tokens(40, seed=i), max_tokens=10).token_ids for i in range(4)]
    results = await asyncio.gather(*(engine.agenerate(tokens(40, seed=i), max_tokens=10) for i in range(4)))
    assert [result.token_ids for result in results] == expected
    chunks = [chunk async for chunk in engine.astream(tokens(40, seed=0), max_tokens=10)]
    assert chunks[-1].result.token_ids == expected[0]


async def test_cancelled_task_releases_its_blocks(engine):
    task = asyncio.create_task(engine.agenerate(tokens(100), max_tokens=3000))
    while not engine._scheduler._decoding:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.generate(tokens(5), max_tokens=1)  # a later request: the cancelled one is gone by the time it is served
    assert blocks_in_use(engine) == 0
    assert not engine._scheduler._decoding


def test_closed_stream_keeps_its_finished_blocks_and_releases_them(engine):
    stream = engine.stream(tokens(100), max_tokens=3000)
    produced = [next(stream).token_ids[0] for _ in range(30)]
    stream.close()
    again = engine.generate(tokens(100) + produced, max_tokens=1)
    assert blocks_in_use(engine) == 0
    assert again.usage.cached_tokens == (100 + 30 - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_prefill_that_is_cancelled_keeps_its_finished_blocks(model):
    settings = EngineSettings(prefill_step_size=BLOCK_SIZE)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE), settings=settings) as engine:
        stored = threading.Event()
        store = engine.cache.store

        def store_and_tell(*args):
            store(*args)
            stored.set()

        engine.cache.store = store_and_tell
        with ThreadPoolExecutor(1) as callers:
            waiting = callers.submit(engine.generate, tokens(4000), max_tokens=1)
            assert stored.wait(30)
            engine._scheduler._prefilling.cancel()
            with pytest.raises(RequestCancelledError, match="during its prefill"):
                waiting.result(30)
        again = engine.generate(tokens(4000), max_tokens=1)
        assert BLOCK_SIZE <= again.usage.cached_tokens < 3900


def test_failing_request_leaves_its_neighbours_alone(engine, monkeypatch):
    good = engine.stream(tokens(30), max_tokens=50)
    next(good)
    match = engine.cache.match

    def fail_once(*args, **options):
        monkeypatch.setattr(engine.cache, "match", match)
        raise RuntimeError("boom")

    monkeypatch.setattr(engine.cache, "match", fail_once)
    with pytest.raises(EngineError, match="boom"):
        engine.generate(tokens(20), max_tokens=1)
    assert len(list(good)[-1].result.token_ids) == 50
    assert engine.generate(tokens(20), max_tokens=1).finish_reason == "length"


def test_prefix_that_cannot_be_restored_is_computed(engine, monkeypatch, caplog):
    expected = engine.generate(tokens(100), max_tokens=10, logprobs=True)

    def refuse(*_, **__):
        raise ValueError("unreadable")

    monkeypatch.setattr(engine._scheduler._reuse._codec, "restore", refuse)
    result = engine.generate(tokens(100), max_tokens=10, logprobs=True)
    assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
    assert result.usage.cached_tokens == 0
    assert "could not be restored" in caplog.text
    assert blocks_in_use(engine) == 0


def test_failing_batch_fails_its_requests_and_the_engine_goes_on(engine, monkeypatch):
    batch = engine._scheduler.thread.call(engine._scheduler._answers._sequential)

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batch, "next", fail)
    with pytest.raises(EngineError, match="out of memory"):
        engine.generate(tokens(20), max_tokens=1)
    assert len(engine.generate(tokens(20), max_tokens=3).token_ids) == 3
    assert blocks_in_use(engine) == 0


def test_closed_engine_holds_neither_weights_nor_blocks(tmp_path):
    gc.collect()
    before_bytes = mx.get_active_memory()
    model = tiny_llama()
    weights = weakref.ref(model)
    engine = Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path))
    engine.generate(tokens(100), max_tokens=3)
    engine.sample(tokens(100), 2, max_tokens=3)
    assert engine.cache.stats().hot.hot_bytes > 0
    engine.close()
    del model
    gc.collect()
    assert weights() is None
    assert mx.get_active_memory() <= before_bytes
    assert engine.cache.stats().hot.hot_bytes == 0
    assert engine.memory_bytes == 0


def test_close_fails_running_requests_and_refuses_new_ones(model):
    engine = Engine(model)
    stream = engine.stream(tokens(10), max_tokens=3000)
    next(stream)
    engine.close()
    engine.close()
    assert engine.is_closed
    with pytest.raises(EngineClosedError):
        list(stream)
    with pytest.raises(EngineClosedError, match="make a new one"):
        engine.generate(tokens(10))


def test_no_cache_reuses_nothing_and_holds_nothing(model, tmp_path: Path):
    folder = tmp_path / "kv"
    with Engine(model, cache=CacheSettings(no_cache=True, paged_ssd_cache_dir=folder)) as engine:
        for _ in range(2):
            assert engine.generate(tokens(600), max_tokens=1).usage.cached_tokens == 0
        assert engine.cache.stats().hot.hot_bytes == 0
        assert engine.cache.stats().cold is None
    assert not folder.exists()


def test_model_with_unknown_layer_state_runs_uncached_and_says_so_once(caplog, monkeypatch):
    monkeypatch.delitem(handlers._HANDLERS, ArraysCache)
    with Engine(tiny_mamba(), name="tiny mamba", cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        for _ in range(2):
            result = engine.generate(tokens(50), max_tokens=5)
            assert result.usage.cached_tokens == 0
    assert caplog.text.count("runs without a prefix cache") == 1
    assert "ArraysCache" in caplog.text


def test_dropped_engine_stops_its_thread(model):
    engine = Engine(model, name="dropped")
    engine.generate(tokens(5), max_tokens=1)
    thread = engine._scheduler.thread._thread
    del engine
    thread.join(30)
    assert not thread.is_alive()


def test_process_that_forgets_to_close_ends_cleanly_and_keeps_what_it_stored(tmp_path: Path):
    script = """
import sys
sys.path.insert(0, sys.argv[2])
from tiny_models import tiny_llama
from omlx_core import CacheSettings, Engine
engine = Engine(tiny_llama(), cache=CacheSettings(block_size=16, paged_ssd_cache_dir=sys.argv[1]))
print(engine.generate(list(range(100)), max_tokens=1).usage.cached_tokens_cold)
"""
    outputs = []
    for _ in range(2):
        command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(done.stdout.strip())
    assert outputs == ["0", "96"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1, -1], r"prompt\[1\]=-1"),
        ([1, 512], r"prompt\[1\]=512 .*512 tokens"),
        ([1, "two"], r"prompt\[1\]='two'"),
        ([1, 2.5], r"prompt\[1\]=2.5"),
        ([{"role": "user", "content": "hi"}, 3], "mixes"),
        ("text", "no tokenizer"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
        ({"role": "user"}, "dict"),
        (None, "NoneType"),
        ([1] * 4096, "4096 tokens.*context of 4096.*shorten"),
    ],
)
def test_bad_prompt_is_named_and_changes_nothing(engine, prompt, message):
    before = engine.cache.stats()
    with pytest.raises(InvalidPromptError, match=message):
        engine.generate(prompt)
    with pytest.raises(InvalidPromptError, match=message):
        engine.stream(prompt)  # at once, not with the first chunk
    assert engine.cache.stats() == before


@pytest.mark.parametrize("prompt", ["", [{"content": "hi"}], [{"role": "user", "content": object()}]])
def test_bad_chat_prompt_is_named(chat_engine, prompt):
    with pytest.raises(InvalidPromptError):
        chat_engine.generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0.*at least 1"),
        ({"stop": ["x"]}, "no tokenizer"),
    ],
)
def test_bad_parameter_is_named(engine, options, message):
    with pytest.raises(InvalidParameterError, match=message):
        engine.generate([1, 2, 3], **options)
    with pytest.raises(InvalidParameterError, match=message):
        engine.stream([1, 2, 3], **options)  # at once, not with the first chunk


def test_answer_ends_where_the_context_does(engine):
    result = engine.generate(tokens(4090), max_tokens=100)
    assert len(result.token_ids) == 6
    assert result.finish_reason == "length"


def test_missing_model_is_named(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Engine.from_pretrained(tmp_path / "nowhere")


def test_cache_directory_that_cannot_be_made_is_named(model, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheDirectoryError, match=r"file/kv.*name a folder"):
        Engine(model, cache=CacheSettings(paged_ssd_cache_dir=tmp_path / "file" / "kv"))


def test_settings_of_the_wrong_kind_are_refused(model):
    with pytest.raises(InvalidSettingError, match="CacheSettings"):
        Engine(model, cache={"block_size": 16})
