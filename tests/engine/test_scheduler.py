"""Who is served when: lines, reads from SSD, samples, time-outs, and what happens when the thread dies."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlx_gate import MlxThreadGate
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.engine import decoding, scheduler
from omlx_core.errors import (
    EngineBusyError,
    EngineError,
    EngineForkedError,
    InvalidParameterError,
    RequestCancelledError,
    RequestTimeoutError,
)

CACHE = CacheSettings(block_size=BLOCK_SIZE)


@pytest.fixture
def engine(model):
    with Engine(model, name="tiny", cache=CACHE) as engine:
        yield engine
        assert_nothing_is_held(engine)


def assert_nothing_is_held(engine):
    for _ in range(2):  # the step between the two lets go of what was cancelled
        engine._scheduler.thread.call(lambda: None)
    assert engine.cache.flush(30)  # what is being brought to RAM is held until it is there
    engine.cache.check()
    assert engine.num_active_requests == engine._scheduler.occupancy.num_waiting == 0
    assert engine.cache.stats().hot.blocks_in_use == 0


def solo(model, prompt, **options):
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        return engine.generate(prompt, **options)


class HeldReads:
    """Holds the SSD tier's reads until they are let go."""

    def __init__(self, engine, monkeypatch):
        self.begun, self.let_go = threading.Event(), threading.Event()
        load_block_into = engine.cache.ssd.load_block_into

        def held(*args):
            self.begun.set()
            assert self.let_go.wait(30)
            return load_block_into(*args)

        monkeypatch.setattr(engine.cache.ssd, "load_block_into", held)


@pytest.fixture
def cold_engine(model, tmp_path: Path):
    """An engine that finds the first 96 of `tokens(100)` on SSD and nothing in RAM."""
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)
    with Engine(model, cache=settings) as engine:
        engine.generate(tokens(100), max_tokens=1)
    with Engine(model, cache=settings) as engine:
        yield engine
        assert_nothing_is_held(engine)


# Samples.


@pytest.mark.parametrize("is_sequential", [False, True])
@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gemma3, tiny_lfm2])
def test_samples_are_the_answers_to_their_seeds(make_model, is_sequential, monkeypatch):
    model, prompt = make_model(), tokens(70)
    options = {"max_tokens": 20, "temperature": 1.0}
    expected = [solo(model, prompt, seed=seed, **options).token_ids for seed in (7, 8, 9)]
    monkeypatch.setattr(decoding, "needs_sequential_decoding", lambda *_: is_sequential)
    with Engine(model, cache=CACHE) as engine:
        assert [result.token_ids for result in engine.sample(prompt, 3, seed=7, **options)] == expected
        again = engine.sample(prompt, 3, seed=7, **options)
        assert [result.token_ids for result in again] == expected
        assert {result.usage.cached_tokens for result in again} == {64}
        assert_nothing_is_held(engine)


def test_samples_prefill_once_and_share_all_blocks_but_the_last(model):
    computed = []
    with Engine(model, cache=CACHE) as engine:
        compute = engine._scheduler._compute
        engine._scheduler._compute = lambda request, ids: (computed.extend(ids), compute(request, ids))
        prompt = tokens(10 * BLOCK_SIZE + 5)
        in_use = []
        generated = engine._scheduler._prefixes.generated

        def count(request, *args):
            generated(request, *args)
            in_use.append(engine.cache.stats().hot.blocks_in_use)

        engine._scheduler._prefixes.generated = count
        engine.sample(prompt, 8, max_tokens=3, temperature=1.0)
        copies = engine.cache.stats().hot.cow_copies
        assert_nothing_is_held(engine)
    assert computed == prompt[:-1]
    # Ten shared blocks, and the last of each; all but one of those are copies.
    assert max(in_use) == 10 + 8
    assert copies == 7


async def test_samples_on_an_event_loop(engine):
    threaded = engine.sample(tokens(40), 2, max_tokens=5, temperature=1.0, seed=1)
    looped = await engine.asample(tokens(40), 2, max_tokens=5, temperature=1.0, seed=1)
    assert [result.token_ids for result in looped] == [result.token_ids for result in threaded]


@pytest.mark.parametrize("n", [0, 33, True, 1.5])
def test_impossible_number_of_samples_is_refused(engine, n):
    with pytest.raises(InvalidParameterError, match="max_batch_size=32"):
        engine.sample(tokens(5), n)


def test_samples_wait_until_the_batch_has_room_for_all(model):
    with Engine(model, cache=CACHE, settings=EngineSettings(max_batch_size=3)) as engine:
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda _: engine.sample(tokens(20), 2, max_tokens=30), range(4)))
        assert len({tuple(result.token_ids) for pair in results for result in pair}) == 1
        assert_nothing_is_held(engine)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "seed": 3, "xtc_probability": 0.5, "xtc_threshold": 0.001},
        {"temperature": 0.7, "seed": 3, "top_k": 20, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.5, "logit_bias": {7: 3.0}},
    ],
)
def test_answer_is_the_same_alone_and_in_any_batch(engine, model, options):
    expected = solo(model, tokens(40), max_tokens=20, **options).token_ids
    neighbours = [engine.stream(tokens(n, seed=n), max_tokens=60, temperature=1.0) for n in (5, 90, 33)]
    for neighbour in neighbours:
        next(neighbour)
    assert engine.generate(tokens(40), max_tokens=20, **options).token_ids == expected
    for neighbour in neighbours:
        neighbour.close()


def test_likeliest_tokens_are_given_in_each_place(engine):
    chunks = list(engine.stream(tokens(40), max_tokens=5, top_logprobs=3))
    result = chunks[-1].result
    assert [len(place) for place in result.top_logprobs] == [3] * 5
    assert [place[0].token_id for place in result.top_logprobs] == result.token_ids
    assert [place[0].logprob for place in result.top_logprobs] == result.logprobs
    assert [chunk.top_logprobs for chunk in chunks[:5]] == [[place] for place in result.top_logprobs]


def test_bias_of_a_token_beyond_the_vocabulary_is_refused(engine):
    with pytest.raises(InvalidParameterError, match=r"\[600\] are not in the vocabulary of 512"):
        engine.generate(tokens(5), logit_bias={600: 1.0})


# The line.


def test_full_line_refuses_the_next_request_and_serves_the_others(model):
    with Engine(model, cache=CACHE, settings=EngineSettings(max_waiting_requests=2)) as engine:
        with ThreadPoolExecutor(2) as callers, MlxThreadGate(engine):
            running = [callers.submit(engine.generate, tokens(20), max_tokens=3) for _ in range(2)]
            while engine.num_active_requests < 2:
                pass
            with pytest.raises(EngineBusyError, match="max_waiting_requests=2"):
                engine.generate(tokens(20))
        assert [len(future.result().token_ids) for future in running] == [3, 3]
        assert_nothing_is_held(engine)


def test_requests_are_served_in_the_order_they_came(engine):
    order = []
    with ThreadPoolExecutor(6) as callers:
        with MlxThreadGate(engine):
            futures = []
            for i in range(6):
                options = {"max_tokens": 1, "on_prefill": lambda *_, i=i: order.append(i)}
                futures.append(callers.submit(engine.generate, tokens(40, seed=i), **options))
                while engine.num_active_requests < i + 1:
                    pass
        for future in futures:
            future.result(30)
    assert order == list(range(6))


class Steps:
    """The answers that are being decoded at each step."""

    def __init__(self, engine, monkeypatch):
        self.sizes = []
        answers, step = engine._scheduler._answers, engine._scheduler._answers.step
        monkeypatch.setattr(answers, "step", lambda: self.sizes.append(len(answers._places)) or step())


def generate_together(engine, prompts, max_tokens):
    """Answer prompts that are all in line before the first is looked at."""
    with ThreadPoolExecutor(len(prompts)) as callers:
        with MlxThreadGate(engine):
            futures = [callers.submit(engine.generate, prompt, max_tokens=max_tokens) for prompt in prompts]
            while engine.num_active_requests < len(prompts):
                pass
        return [future.result(30) for future in futures]


@pytest.mark.parametrize(
    ("step_size", "expected"),
    [(500, [4, 4, 4, 4]), (80, [2, 4, 4, 4, 2]), (50, [1, 2, 3, 3, 3, 2, 1])],  # the batch's first step gives no token
)
def test_short_prompts_share_a_prefill_step_and_join_together(model, monkeypatch, step_size, expected):
    prompts = [tokens(41, seed=i) for i in range(4)]
    with Engine(model, cache=CACHE, settings=EngineSettings(prefill_step_size=step_size)) as engine:
        steps = Steps(engine, monkeypatch)
        results = generate_together(engine, prompts, max_tokens=3)
        assert_nothing_is_held(engine)
    assert steps.sizes == expected
    assert [result.token_ids for result in results] == [solo(model, p, max_tokens=3).token_ids for p in prompts]


def test_streams_wait_for_no_more_than_one_restore(engine, monkeypatch):
    prompts = [tokens(41, seed=i) for i in range(3)]
    for prompt in prompts:
        engine.generate(prompt, max_tokens=1)
    stream = engine.stream(tokens(41, seed=9), max_tokens=3000)
    next(stream)
    steps = Steps(engine, monkeypatch)
    generate_together(engine, prompts, max_tokens=8)
    stream.close()
    assert_nothing_is_held(engine)
    while steps.sizes[0] == 1:
        del steps.sizes[0]
    assert steps.sizes[:3] == [2, 3, 4]


# Reads.


def test_request_whose_blocks_are_being_read_lets_others_go_ahead(cold_engine, monkeypatch):
    reads = HeldReads(cold_engine, monkeypatch)
    with ThreadPoolExecutor(1) as caller:
        held = caller.submit(cold_engine.generate, tokens(100), max_tokens=3)
        assert reads.begun.wait(30)
        assert len(cold_engine.generate(tokens(50, seed=2), max_tokens=3).token_ids) == 3
        assert not held.done()
        reads.let_go.set()
        assert held.result(30).usage.cached_tokens_cold == 96


def test_blocks_are_read_while_another_request_prefills(cold_engine, monkeypatch):
    reads = HeldReads(cold_engine, monkeypatch)
    compute = cold_engine._scheduler._compute

    def compute_beside_a_read(request, token_ids):
        if request.num_computed:  # its second step
            assert reads.begun.wait(30)
            reads.let_go.set()
        compute(request, token_ids)

    monkeypatch.setattr(cold_engine._scheduler, "_compute", compute_beside_a_read)
    with ThreadPoolExecutor(2) as callers:
        with MlxThreadGate(cold_engine):
            long = callers.submit(cold_engine.generate, tokens(1200, seed=3), max_tokens=1)
            while cold_engine.num_active_requests < 1:
                pass
            held = callers.submit(cold_engine.generate, tokens(100), max_tokens=1)
            while cold_engine.num_active_requests < 2:
                pass
        assert long.result(60).usage.cached_tokens == 0
        assert held.result(30).usage.cached_tokens_cold == 96


def test_request_matched_early_finds_what_was_stored_since(engine):
    prompts = [[*tokens(1200), i, i, i] for i in range(3)]
    with ThreadPoolExecutor(3) as callers:
        with MlxThreadGate(engine):
            futures = []
            for i, prompt in enumerate(prompts):
                futures.append(callers.submit(engine.generate, prompt, max_tokens=1))
                while engine.num_active_requests < i + 1:
                    pass
        reused = [future.result(60).usage.cached_tokens for future in futures]
    assert reused == [0, 1200, 1200]


# Time-outs and cancellation.


def test_request_times_out_while_it_waits(engine):
    with ThreadPoolExecutor(1) as caller:
        with MlxThreadGate(engine):
            future = caller.submit(engine.generate, tokens(50), timeout_s=0.001)
            while not engine.num_active_requests:
                pass
            threading.Event().wait(0.002)
        with pytest.raises(RequestTimeoutError, match=r"timeout_s=0\.001"):
            future.result(30)


def test_request_times_out_during_its_prefill_and_keeps_what_is_computed(model, monkeypatch):
    with Engine(model, cache=CACHE, settings=EngineSettings(prefill_step_size=64)) as engine:
        compute = engine._scheduler._compute

        def compute_and_time_out(request, token_ids):
            compute(request, token_ids)
            if request.num_computed >= 128 and request.deadline_s is not None:
                request.deadline_s = 0.0

        monkeypatch.setattr(engine._scheduler, "_compute", compute_and_time_out)
        with pytest.raises(RequestTimeoutError, match="during its prefill"):
            engine.generate(tokens(500), timeout_s=1000)
        assert engine.generate(tokens(500), max_tokens=1).usage.cached_tokens == 128
        assert_nothing_is_held(engine)


def test_request_times_out_while_it_is_answered_and_harms_no_neighbour(engine, model):
    neighbour = engine.stream(tokens(40, seed=2), max_tokens=200)
    next(neighbour)
    stream = engine.stream(tokens(50), max_tokens=3000, timeout_s=0.5)
    with pytest.raises(RequestTimeoutError, match="while it was answered"):
        list(stream)
    result = list(neighbour)[-1].result
    assert result.token_ids == solo(model, tokens(40, seed=2), max_tokens=200).token_ids


def test_request_that_is_being_read_times_out_without_a_wake_up_call(cold_engine, monkeypatch):
    reads = HeldReads(cold_engine, monkeypatch)
    try:
        with pytest.raises(RequestTimeoutError, match="while its blocks were read"):
            cold_engine.generate(tokens(100), timeout_s=0.2)
    finally:
        reads.let_go.set()


def test_request_cancelled_while_it_is_read_lets_go(cold_engine, monkeypatch):
    reads = HeldReads(cold_engine, monkeypatch)
    with ThreadPoolExecutor(1) as caller:
        submitted = []
        submit = cold_engine._scheduler.submit
        monkeypatch.setattr(cold_engine._scheduler, "submit", lambda r: (submitted.append(r), submit(r)))
        future = caller.submit(cold_engine.generate, tokens(100))
        assert reads.begun.wait(30)
        submitted[0].cancel()
        cold_engine._scheduler.wake()
        with pytest.raises(RequestCancelledError, match="while its blocks were read"):
            future.result(30)
        reads.let_go.set()


@pytest.fixture
def full_engine(model):
    """One stream decodes, and four requests wait: three have been matched, the last is in line."""
    with Engine(model, cache=CACHE, settings=EngineSettings(max_batch_size=1)) as engine:
        stream = engine.stream(tokens(40, seed=9), max_tokens=3000)
        next(stream)
        with ThreadPoolExecutor(4) as callers:
            waiting = [callers.submit(engine.generate, tokens(40, seed=n), max_tokens=1) for n in range(4)]
            while len(engine._scheduler._waiting) < 1:
                next(stream)
            yield engine, stream
            stream.close()
            assert all(len(future.result(30).token_ids) == 1 for future in waiting)
        assert_nothing_is_held(engine)


def test_request_times_out_while_it_waits_in_line(full_engine):
    engine, _ = full_engine
    with pytest.raises(RequestTimeoutError, match="while it waited in line"):
        engine.generate(tokens(50), timeout_s=0.2)


def test_request_cancelled_in_line_lets_go_at_once(full_engine):
    engine, stream = full_engine
    submitted = []
    submit = engine._scheduler.submit
    engine._scheduler.submit = lambda request: (submitted.append(request), submit(request))
    with ThreadPoolExecutor(1) as caller:
        future = caller.submit(engine.generate, tokens(50))
        while len(engine._scheduler._waiting) < 2:
            next(stream)
        submitted[0].cancel()
        engine._scheduler.wake()
        with pytest.raises(RequestCancelledError, match="while it waited in line"):
            future.result(30)


def test_a_step_does_not_search_a_line_in_which_nothing_has_changed(full_engine, monkeypatch):
    engine, stream = full_engine
    engine._scheduler.thread.call(lambda: None)
    [in_line] = engine._scheduler._waiting
    searched = []
    with monkeypatch.context() as patched:
        patched.setattr(type(in_line), "is_overdue", lambda request, _: searched.append(request))
        for _ in range(20):
            next(stream)
    assert searched, "no step was made"
    assert in_line not in searched


# Progress.


def test_prefill_is_reported_step_by_step(model):
    calls = []
    with Engine(model, cache=CACHE, settings=EngineSettings(prefill_step_size=64)) as engine:
        engine.generate(tokens(150), max_tokens=1, on_prefill=lambda *progress: calls.append(progress))
        assert calls == [(64, 149), (128, 149), (149, 149)]
        calls.clear()
        engine.generate(tokens(150), max_tokens=1, on_prefill=lambda *progress: calls.append(progress))
        assert calls == [(149, 149)]


def test_failing_progress_callback_harms_nobody(engine, caplog):
    def fail(*_):
        raise ValueError("mine")

    assert len(engine.generate(tokens(50), max_tokens=3, on_prefill=fail).token_ids) == 3
    assert "on_prefill failed" in caplog.text


def test_progress_bar_is_drawn_when_asked_for(engine, capsys):
    engine.generate(tokens(50), max_tokens=1, progress=True)
    assert "49/49" in capsys.readouterr().err


# The thread's life.


def kill_thread(engine):
    def die():
        raise SystemExit("killed")

    engine._scheduler.thread.send(die)


def test_death_of_the_thread_is_told_to_all_who_wait_and_the_next_call_starts_another(engine, model, caplog):
    streams = [engine.stream(tokens(40, seed=i), max_tokens=3000) for i in range(2)]
    for stream in streams:
        next(stream)
    kill_thread(engine)
    for stream in streams:
        with pytest.raises(EngineError, match="has died"):
            list(stream)
    assert "has died" in caplog.text
    result = engine.generate(tokens(50), max_tokens=5)
    assert result.token_ids == solo(model, tokens(50), max_tokens=5).token_ids


def test_message_that_came_as_the_thread_died_is_served_by_the_next(engine):
    with ThreadPoolExecutor(1) as caller:
        with MlxThreadGate(engine):
            kill_thread(engine)
            future = caller.submit(engine.generate, tokens(50), max_tokens=3)
            while not engine.num_active_requests:
                pass
        assert len(future.result(30).token_ids) == 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_engine_in_a_forked_process_says_so(engine):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            engine.generate([1, 2, 3])
        except EngineForkedError:
            engine.close()
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"refused"
    assert len(engine.generate([1, 2, 3], max_tokens=2).token_ids) == 2


def test_failing_batch_leaves_those_in_line_alone(engine, monkeypatch):
    batch = engine._scheduler.thread.call(engine._scheduler._answers._sequential)
    stream = engine.stream(tokens(40), max_tokens=3000)
    next(stream)
    with ThreadPoolExecutor(1) as caller:
        with MlxThreadGate(engine):
            future = caller.submit(engine.generate, tokens(20), max_tokens=3)
            while engine.num_active_requests < 2:
                pass

            def fail():
                raise RuntimeError("out of memory")

            monkeypatch.setattr(batch, "next", fail)
            engine._scheduler._settings = EngineSettings(max_batch_size=1)  # so that it waits
        with pytest.raises(EngineError, match="out of memory"):
            list(stream)
        assert len(future.result(30).token_ids) == 3


def test_steps_that_are_launched_ahead_change_nothing(model, monkeypatch):
    """As on a GPU with memory of its own: no more than one step is under way when the next is launched."""
    monkeypatch.setattr(scheduler, "has_device_memory", lambda: True)
    settings = EngineSettings(prefill_step_size=20)
    under_way = []
    with Engine(model, cache=CACHE, settings=settings) as engine:
        compute = engine._scheduler._compute

        def compute_and_look(request, token_ids):
            compute(request, token_ids)
            under_way.append(len(request.steps_under_way))

        monkeypatch.setattr(engine._scheduler, "_compute", compute_and_look)
        first = engine.generate(tokens(110), max_tokens=5, logprobs=True)
        again = engine.generate(tokens(110), max_tokens=5, logprobs=True)
        assert_nothing_is_held(engine)
    assert under_way[:6] == [1, 2, 2, 2, 2, 2]
    expected = solo(model, tokens(110), max_tokens=5, logprobs=True)
    for result in (first, again):
        assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)
    assert again.usage.cached_tokens == 96
