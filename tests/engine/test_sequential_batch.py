"""Requests that mlx-lm can't batch are decoded one after the other, and nothing else is different for them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine
from omlx_core.engine import decoding
from omlx_core.errors import EngineClosedError


@pytest.fixture
def is_sequential(monkeypatch):
    """Decides for each request; by the length of its prompt, say."""

    def choose(condition):
        monkeypatch.setattr(decoding, "needs_sequential_decoding", lambda _m, _c, length, **_: condition(length))

    choose(lambda _: True)
    return choose


@pytest.fixture
def engine(model, is_sequential):
    with Engine(model, tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine
        engine.cache.check()


def batched_result(model, prompt, **options):
    with Engine(model, tiny_tokenizer(512), cache=CacheSettings(no_cache=True)) as engine:
        return engine.generate(prompt, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"max_tokens": 30, "logprobs": True},
        {"max_tokens": 30, "temperature": 0.9, "top_p": 0.9, "seed": 3},
    ],
)
def test_answer_is_the_batchs(model, engine, is_sequential, options):
    sequential = engine.generate(tokens(50), **options)
    is_sequential(lambda _: False)
    batched = batched_result(model, tokens(50), **options)
    assert (sequential.token_ids, sequential.logprobs) == (batched.token_ids, batched.logprobs)
    assert sequential.finish_reason == batched.finish_reason == "length"


def test_answer_is_stored_and_reused(engine):
    first = engine.generate(tokens(50), max_tokens=30)
    again = engine.generate(tokens(50) + first.token_ids + [1, 2, 3], max_tokens=1)
    assert again.usage.cached_tokens == 80


def test_end_token_and_stop_text_end_it(model, engine):
    whole = engine.generate(tokens(50), max_tokens=30)
    engine._scheduler.thread.call(lambda: engine._scheduler._answers._end_token_ids.append(whole.token_ids[5]))
    engine._scheduler._answers.close()
    ended = engine.generate(tokens(50), max_tokens=30)
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[5]) + 1]
    assert ended.finish_reason == "stop"
    engine._scheduler._answers._end_token_ids.clear()
    engine._scheduler._answers.close()
    stop = whole.text[3:5]
    stopped = engine.generate(tokens(50), max_tokens=30, stop=stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]


def test_both_kinds_run_side_by_side(engine, is_sequential):
    prompts = [tokens(40 + i, seed=i) for i in range(6)]
    alone = [engine.generate(prompt, max_tokens=20).token_ids for prompt in prompts]
    is_sequential(lambda length: length % 2 == 0)
    with ThreadPoolExecutor(6) as callers:
        together = list(callers.map(lambda prompt: engine.generate(prompt, max_tokens=20).token_ids, prompts))
    assert together == alone


def test_cancelled_and_closed_requests_let_go(engine):
    stream = engine.stream(tokens(50), max_tokens=3000)
    next(stream)
    stream.close()
    engine.generate(tokens(5), max_tokens=1)
    assert not engine._scheduler._decoding
    assert engine.cache.stats().hot.blocks_in_use == 0
    stream = engine.stream(tokens(50), max_tokens=3000)
    next(stream)
    engine.close()
    with pytest.raises(EngineClosedError):
        list(stream)
