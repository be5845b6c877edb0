from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from model_folders import save_model_folder
from pooled_engine import TIMEOUT_S, Loader, PooledEngine
from tiny_models import tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, EngineSettings, ModelPool
from omlx_core.engine import pool_engines, pool_memory
from omlx_core.engine.pool_engines import PoolEngines
from omlx_core.engine.pool_memory import Occupant, choose_leaving
from omlx_core.errors import (
    EngineClosedError,
    EngineForkedError,
    InvalidSettingError,
    ModelLoadError,
    ModelMemoryError,
    UnknownModelError,
)
from omlx_core.model.load_progress import LoadProgress

MEGABYTE = 10**6


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def make_pool(loader: Loader, tmp_path: Path) -> Iterator[Callable[..., ModelPool]]:
    """Makes pools of models by size in megabytes, whose files are as large as they are in memory."""
    pools: list[ModelPool] = []

    def make(sizes: dict[str, int], **options: Any) -> ModelPool:
        pools.append(ModelPool(**{"load_engine": loader, **options}))
        for name, size in sizes.items():
            add_model(pools[-1], loader, tmp_path, name, size)
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    for timer in idle_timers():
        timer.join(TIMEOUT_S)


def add_model(pool: ModelPool, loader: Loader, folder: Path, name: str, size: int, **options: Any) -> None:
    loader.sizes[name] = size * MEGABYTE
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").touch()
    with (folder / name / "model.safetensors").open("wb") as file:
        file.truncate(size * MEGABYTE)
    pool.add(name, folder / name, **options)


@pytest.fixture
def pool(make_pool: Callable[..., ModelPool]) -> ModelPool:
    """Two models and no limits."""
    return make_pool({"chat": 1, "code": 1})


def idle_timers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "omlx-idle-models"]


def loaded(pool: ModelPool) -> list[str]:
    return [status.model_id for status in pool.models() if status.is_loaded]


def run(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function on a thread of its own."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released by each caller once it waits for a load or a closing, or is about to load."""
    semaphore = threading.Semaphore(0)
    look = PoolEngines._look

    def watched_look(engines: PoolEngines, model: Any) -> Any:
        found = look(engines, model)
        if not isinstance(found, PooledEngine):
            semaphore.release()
        return found

    monkeypatch.setattr(PoolEngines, "_look", watched_look)
    return semaphore


@pytest.fixture
def waits_for_room(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a load waits for an engine that another thread closes."""
    is_waiting = threading.Event()

    def watched_wait(closings: list[Future[None]]) -> None:
        if closings:
            is_waiting.set()
        wait(closings)

    monkeypatch.setattr(pool_engines, "wait", watched_wait)
    return is_waiting


def wait_for(semaphore: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert semaphore.acquire(timeout=TIMEOUT_S)


# What there is


def test_adding_a_model_loads_nothing(pool, loader):
    assert [status.model_id for status in pool.models()] == ["chat", "code"]
    assert loaded(pool) == []
    assert loader.specs == []


def test_an_unknown_id_is_an_error_that_suggests_the_right_one(pool):
    with pytest.raises(UnknownModelError, match=r"no model 'chta' in this pool: did you mean 'chat'.* are chat, code$"):
        pool.get("chta")
    with pytest.raises(UnknownModelError, match="no model 'gpt' in this pool: its models are chat, code"):
        pool.unload("gpt")


def test_an_empty_pool_says_so():
    with pytest.raises(UnknownModelError, match="its models are none yet"):
        ModelPool().pin("chat")


def test_an_id_stands_for_one_model(pool, tmp_path):
    pool.add("chat", tmp_path / "chat")
    with pytest.raises(InvalidSettingError, match=r"model_id='chat' stands for '.*chat' already"):
        pool.add("chat", tmp_path / "code")
    with pytest.raises(InvalidSettingError, match="model_id='chat'"):
        pool.add("chat", tmp_path / "chat", settings=EngineSettings(max_batch_size=1))


def test_two_ids_of_one_model_share_its_engine(pool, tmp_path):
    pool.add("assistant", tmp_path / "chat")
    assert pool.get("assistant") is pool.get("chat")
    assert loaded(pool) == ["chat", "assistant"]


def test_the_pools_settings_are_those_of_models_added_without(loader):
    cache, settings = CacheSettings(block_size=16), EngineSettings(max_batch_size=1)
    other = CacheSettings(block_size=32)
    pool = ModelPool(cache=cache, settings=settings, load_engine=loader)
    pool.add("chat", "org/model")
    pool.add("code", "org/model", adapter_path="adapter", cache=other)
    pool.get("chat")
    pool.get("code")
    assert [(spec.adapter_path, spec.cache, spec.settings) for spec in loader.specs] == [
        (None, cache, settings),
        ("adapter", other, settings),
    ]


def test_a_model_that_was_not_added_is_named_by_what_it_is_loaded_from(pool):
    assert pool.resolve("org/model") == "org/model"
    assert pool.resolve("org/model", cache=CacheSettings(block_size=16)) == "org/model#2"
    assert pool.resolve("org/model", adapter_path="adapter") == "org/model#3"
    assert pool.resolve("org/model", cache=CacheSettings(block_size=16)) == "org/model#2"
    assert [status.model_id for status in pool.models()][2:] == ["org/model", "org/model#2", "org/model#3"]


def test_what_was_added_is_found_by_what_it_is_loaded_from(pool, tmp_path):
    assert pool.resolve(tmp_path / "chat") == "chat"


def test_an_id_stands_for_all_that_was_added_with_it_unless_that_is_given_anew(loader):
    pool = ModelPool(load_engine=loader)
    cache, settings = CacheSettings(block_size=16), EngineSettings(max_batch_size=1)
    pool.add("chat", "org/model", adapter_path="adapter", draft_model="org/draft", cache=cache, settings=settings)
    assert pool.resolve("chat") == "chat"
    pool.get(pool.resolve("chat", cache=CacheSettings(block_size=32)))
    pool.get(pool.resolve("chat", adapter_path="other"))
    pool.get(pool.resolve("chat", draft_model="org/other"))
    pool.get(pool.resolve("chat", settings=EngineSettings(max_batch_size=2)))
    assert [(spec.adapter_path, spec.draft_model, spec.cache.block_size) for spec in loader.specs] == [
        ("adapter", "org/draft", 32),
        ("other", "org/draft", 16),
        ("adapter", "org/other", 16),
        ("adapter", "org/draft", 16),
    ]
    assert {spec.model for spec in loader.specs} == {"org/model"}
    assert [spec.settings.max_batch_size for spec in loader.specs] == [1, 1, 1, 2]


@pytest.mark.parametrize("options", [{"max_memory": "lots"}, {"max_memory": True}, {"max_memory": "200%"}])
def test_a_limit_that_is_no_size_is_an_error_at_once(options):
    with pytest.raises(InvalidSettingError, match="max_model_memory"):
        ModelPool(**options)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_an_idle_timeout_that_is_no_time_is_an_error_at_once(seconds):
    with pytest.raises(InvalidSettingError, match="model_idle_timeout_s="):
        ModelPool(idle_timeout_s=seconds)


# Loading


def test_a_model_is_loaded_by_its_first_use_and_then_stays(pool, loader):
    engine = pool.get("chat")
    assert pool.get("chat") is engine
    assert loader.names == ["chat"]


def test_threads_that_ask_at_once_wait_for_one_load(pool, loader, waiting):
    _, may_end = loader.hold("chat")
    callers = [run(pool.get, "chat") for _ in range(4)]
    wait_for(waiting, 4)
    may_end.set()
    engines = {id(caller.result(TIMEOUT_S)) for caller in callers}
    assert len(engines) == 1
    assert loader.names == ["chat"]


def test_a_model_does_not_wait_for_another_ones_load(pool, loader):
    has_begun, may_end = loader.hold("chat")
    slow = run(pool.get, "chat")
    assert has_begun.wait(TIMEOUT_S)
    run(pool.get, "code").result(TIMEOUT_S)
    assert loaded(pool) == ["code"]
    may_end.set()
    slow.result(TIMEOUT_S)


def test_a_failure_reaches_all_who_wait_and_the_next_call_tries_again(pool, loader, waiting):
    loader.failures.append(ModelLoadError("no such layer"))
    _, may_end = loader.hold("chat")
    callers = [run(pool.get, "chat") for _ in range(3)]
    wait_for(waiting, 3)
    may_end.set()
    for caller in callers:
        with pytest.raises(ModelLoadError, match="no such layer"):
            caller.result(TIMEOUT_S)
    assert pool.get("chat") is loader.engines[0]
    assert loader.names == ["chat", "chat"]


def test_an_interrupt_of_the_thread_that_loads_is_its_own(pool, loader, waiting):
    loader.failures.append(KeyboardInterrupt())
    _, may_end = loader.hold("chat")
    interrupted = run(pool.get, "chat")
    wait_for(waiting, 1)
    other = run(pool.get, "chat")
    wait_for(waiting, 1)
    may_end.set()
    assert isinstance(interrupted.exception(TIMEOUT_S), KeyboardInterrupt)
    assert other.result(TIMEOUT_S) is pool.get("chat")


def test_an_engine_that_was_closed_from_outside_is_replaced(pool):
    first = pool.get("chat")
    first.close()
    assert loaded(pool) == []
    second = pool.get("chat")
    assert second is not first
    assert not second.is_closed


def test_an_engine_that_was_closed_from_outside_is_gone_before_another_is_loaded(make_pool, loader):
    is_gone: list[bool] = []

    def load(spec: Any, on_progress: Any) -> PooledEngine:
        is_gone.extend(engine() is None for engine in closed)
        return PooledEngine()

    pool = make_pool({"chat": 1}, load_engine=load)
    closed: list[weakref.ref[PooledEngine]] = []
    engine = pool.get("chat")
    engine.close()
    closed.append(weakref.ref(engine))
    del engine
    pool.get("chat")
    assert is_gone == [True]


async def test_a_load_leaves_the_event_loop_free(pool, loader):
    has_begun, may_end = loader.hold("chat")
    task = asyncio.create_task(pool.aget("chat"))
    # Only a loop that runs gets here while the load waits, and only then is the gate opened.
    assert await asyncio.to_thread(has_begun.wait, TIMEOUT_S)
    may_end.set()
    assert await task is pool.get("chat")


async def test_a_loaded_engine_comes_without_a_thread(pool, monkeypatch):
    engine = pool.get("chat")
    monkeypatch.setattr(threading, "Thread", None)
    assert await pool.aget("chat") is engine


async def test_a_load_needs_no_thread_of_the_event_loops_executor(pool):
    is_over = threading.Event()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:
        loop.set_default_executor(executor)
        busy = loop.run_in_executor(None, is_over.wait, TIMEOUT_S)
        engines = await asyncio.wait_for(asyncio.gather(*(pool.aget("chat") for _ in range(3))), TIMEOUT_S)
        is_over.set()
        assert await busy
    assert len(set(map(id, engines))) == 1


async def test_a_cancelled_coroutine_leaves_the_load_to_the_others(pool, loader):
    has_begun, may_end = loader.hold("chat")
    first = asyncio.create_task(pool.aget("chat"))
    assert await asyncio.to_thread(has_begun.wait, TIMEOUT_S)
    second = asyncio.create_task(pool.aget("chat"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    may_end.set()
    assert await asyncio.wait_for(second, TIMEOUT_S) is loader.engines[0]
    assert [status.num_leases for status in pool.models()] == [0, 0]


async def test_where_no_thread_can_be_started_all_who_wait_are_told(pool, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await asyncio.wait_for(pool.aget("chat"), TIMEOUT_S)
    monkeypatch.undo()
    assert not (await pool.aget("chat")).is_closed


# Memory


def test_the_least_recently_used_model_makes_room(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    first = pool.get("a")
    pool.get("b")
    pool.get("c")
    assert loaded(pool) == ["b", "c"]
    assert first.closings == [True]
    pool.get("b")
    pool.get("a")
    assert loaded(pool) == ["a", "b"]


def test_the_end_of_a_lease_is_a_use(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    with pool.lease("a"):
        pool.get("b")
    pool.get("c")
    assert loaded(pool) == ["a", "c"]


def test_no_more_is_unloaded_than_needed(make_pool):
    pool = make_pool({"a": 2, "b": 2, "c": 2, "d": 5}, max_memory="10MB")
    for model_id in "abcd":
        pool.get(model_id)
    assert loaded(pool) == ["b", "c", "d"]


def test_room_is_made_before_the_load(make_pool, loader):
    pool = make_pool({"a": 6, "b": 6}, max_memory="10MB")
    first = pool.get("a")
    has_begun, may_end = loader.hold("b")
    second = run(pool.get, "b")
    assert has_begun.wait(TIMEOUT_S)
    assert first.is_closed
    may_end.set()
    second.result(TIMEOUT_S)


def test_without_a_limit_nothing_is_unloaded(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4})
    for model_id in "abc":
        pool.get(model_id)
    assert loaded(pool) == ["a", "b", "c"]


@pytest.mark.parametrize("size", [0, "0", "0GB"])
def test_zero_is_no_limit(make_pool, size):
    pool = make_pool({"a": 4, "b": 4}, max_memory=size)
    pool.get("a")
    pool.get("b")
    assert loaded(pool) == ["a", "b"]


def test_a_percentage_is_one_of_the_memory_that_mlx_uses(make_pool, monkeypatch):
    monkeypatch.setattr(pool_engines, "device_memory_bytes", lambda: 20 * MEGABYTE)
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="50%")
    for model_id in "abc":
        pool.get(model_id)
    assert loaded(pool) == ["b", "c"]


@pytest.mark.parametrize(("info", "size_bytes"), [({"total_memory": 5}, 5), ({"memory_size": 7}, 7), ({}, 9)])
def test_that_memory_is_what_the_backend_says_or_else_the_machines(monkeypatch, info, size_bytes):
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(pool_memory, "total_memory_bytes", lambda: 9)
    assert pool_memory.device_memory_bytes() == size_bytes


def test_the_limit_may_come_from_the_environment(make_pool, monkeypatch):
    monkeypatch.setenv("OMLX_MAX_MODEL_MEMORY", "5MB")
    pool = make_pool({"a": 4, "b": 4})
    pool.get("a")
    pool.get("b")
    assert loaded(pool) == ["b"]


def test_what_a_model_has_cached_in_ram_counts(make_pool):
    pool = make_pool({"a": 4, "b": 4}, max_memory="10MB")
    pool.get("a").memory_bytes += 3 * MEGABYTE
    pool.get("b")
    assert loaded(pool) == ["b"]


def test_a_pinned_model_stays_and_another_goes(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    pool.pin("a")
    for model_id in "abc":
        pool.get(model_id)
    assert loaded(pool) == ["a", "c"]
    pool.unpin("a")
    pool.get("b")
    assert loaded(pool) == ["b", "c"]


def test_a_model_can_be_added_pinned(make_pool, loader, tmp_path):
    pool = make_pool({"a": 4, "b": 4}, max_memory="10MB")
    add_model(pool, loader, tmp_path, "c", 4, pin=True)
    pool.add("c", tmp_path / "c")
    for model_id in "cab":
        pool.get(model_id)
    assert loaded(pool) == ["b", "c"]


def test_a_leased_model_stays_and_another_goes(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    with pool.lease("a") as engine:
        pool.get("b")
        pool.get("c")
        assert loaded(pool) == ["a", "c"]
        assert not engine.is_closed


def test_a_model_with_requests_under_way_stays_and_another_goes(make_pool):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    pool.get("a").num_active_requests = 1
    pool.get("b")
    pool.get("c")
    assert loaded(pool) == ["a", "c"]


def test_what_can_not_fit_is_an_error_that_names_what_stays_and_nothing_changes(make_pool, loader):
    pool = make_pool({"idle": 2, "pinned": 4, "leased": 1, "busy": 2, "new": 8}, max_memory="10MB")
    pool.pin("pinned")
    pool.get("idle")
    pool.get("pinned")
    pool.get("busy").num_active_requests = 3
    with (
        pool.lease("leased"),
        pytest.raises(
            ModelMemoryError,
            match=r"'new' takes 7\.6 MiB, which is 4\.8 MiB more than .* of 9\.5 MiB in all, 'pinned' "
            r"\(3\.8 MiB, pinned\), 'busy' \(1\.9 MiB, in use\), 'leased' \(976\.6 KiB, in use\) can't be unloaded",
        ),
    ):
        pool.get("new")
    assert loaded(pool) == ["idle", "pinned", "leased", "busy"]
    assert loader.names == ["idle", "pinned", "busy", "leased"]


def test_a_model_larger_than_the_limit_is_an_error_before_anything_is_loaded_or_unloaded(make_pool, loader):
    pool = make_pool({"a": 4, "large": 11}, max_memory="10MB")
    pool.get("a")
    with pytest.raises(ModelMemoryError, match=r"'large' takes 10\.5 MiB .* raise max_model_memory, or use a smaller"):
        pool.get("large")
    assert loaded(pool) == ["a"]
    assert loader.names == ["a"]


def test_a_model_that_fits_exactly_fits(make_pool):
    pool = make_pool({"a": 10}, max_memory=10 * MEGABYTE)
    pool.get("a")
    assert loaded(pool) == ["a"]


def test_a_model_being_loaded_has_its_place(make_pool, loader):
    pool = make_pool({"a": 6, "b": 6}, max_memory="10MB")
    has_begun, may_end = loader.hold("a")
    first = run(pool.get, "a")
    assert has_begun.wait(TIMEOUT_S)
    with pytest.raises(ModelMemoryError, match=r"'a' \(5\.7 MiB, being loaded\)"):
        pool.get("b")
    may_end.set()
    first.result(TIMEOUT_S)
    pool.get("b")


def test_a_failed_load_leaves_its_place(make_pool, loader):
    pool = make_pool({"a": 6, "b": 6}, max_memory="10MB")
    loader.failures.append(ModelLoadError("no such layer"))
    with pytest.raises(ModelLoadError):
        pool.get("a")
    with pool.lease("b"):
        assert loaded(pool) == ["b"]


def test_a_model_that_turns_out_larger_makes_more_room(make_pool, loader):
    pool = make_pool({"a": 4, "b": 4}, max_memory="10MB")
    pool.get("a")
    loader.sizes["b"] = 8 * MEGABYTE
    pool.get("b")
    assert loaded(pool) == ["b"]
    assert [status.size_bytes for status in pool.models()] == [0, 8 * MEGABYTE]


def test_a_model_that_turns_out_too_large_is_closed_again(make_pool, loader):
    pool = make_pool({"a": 4, "b": 4}, max_memory="10MB")
    pool.get("a")
    loader.sizes["b"] = 11 * MEGABYTE
    with pytest.raises(ModelMemoryError, match="'b' takes"):
        pool.get("b")
    assert loaded(pool) == ["a"]
    assert loader.engines[1].is_closed


def test_a_repository_that_is_not_here_yet_is_measured_once_it_is(make_pool, loader, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pool = make_pool({"a": 4}, max_memory="10MB")
    pool.add("b", "org/b")
    loader.sizes["b"] = 8 * MEGABYTE
    pool.get("a")
    pool.get("b")
    assert loaded(pool) == ["b"]


def test_a_load_waits_for_room_that_another_load_makes(make_pool, loader, waits_for_room):
    are_closed: list[bool] = []

    def load(spec: Any, on_progress: Any) -> PooledEngine:
        are_closed.extend(engine.is_closed for engine in loader.engines[:1])
        return loader(spec, on_progress)

    pool = make_pool({"a": 8, "b": 4, "c": 4}, max_memory="10MB", load_engine=load)
    first = pool.get("a")
    first.may_close.clear()
    second = run(pool.get, "b")
    assert first.is_closing.wait(TIMEOUT_S)
    third = run(pool.get, "c")
    assert waits_for_room.wait(TIMEOUT_S)
    first.may_close.set()
    second.result(TIMEOUT_S)
    third.result(TIMEOUT_S)
    assert are_closed == [True, True]
    assert first.closings == [True]


def test_what_leaves_in_any_case_leaves_first(make_pool, waits_for_room):
    pool = make_pool({"a": 4, "b": 4, "c": 4}, max_memory="10MB")
    pool.get("a")
    second = pool.get("b")
    second.may_close.clear()
    unloading = run(pool.unload, "b")
    assert second.is_closing.wait(TIMEOUT_S)
    third = run(pool.get, "c")
    assert waits_for_room.wait(TIMEOUT_S)
    second.may_close.set()
    third.result(TIMEOUT_S)
    unloading.result(TIMEOUT_S)
    assert loaded(pool) == ["a", "c"]


def test_a_draft_models_files_count_too(make_pool, loader, tmp_path):
    pool = make_pool({"a": 4, "b": 4, "draft": 2}, max_memory="9MB")
    pool.get("a")
    pool.add("drafted", tmp_path / "b", draft_model=tmp_path / "draft")
    has_begun, may_end = loader.hold("b")
    caller = run(pool.get, "drafted")
    assert has_begun.wait(TIMEOUT_S)
    assert loaded(pool) == []
    may_end.set()
    caller.result(TIMEOUT_S)


def test_an_error_of_the_one_that_leaves_is_logged_and_not_the_new_ones(make_pool, caplog):
    pool = make_pool({"a": 6, "b": 6}, max_memory="10MB")
    pool.get("a").close_error = OSError("disk gone")
    with caplog.at_level(logging.WARNING):
        pool.get("b")
    assert loaded(pool) == ["b"]
    assert "the model a was unloaded with an error" in caplog.text
    assert "disk gone" in caplog.text


def test_those_that_leave_leave_in_the_order_given():
    occupants = [Occupant("a", 4), Occupant("b", 4, "pinned"), Occupant("c", 1), Occupant("d", 1)]
    assert [occupant.model_id for occupant in choose_leaving(occupants, "new", 5, 10)] == ["a", "c"]
    assert choose_leaving(occupants, "new", 0, 10) == []


# Leases and unloading


def test_a_wait_for_a_load_is_a_lease(make_pool, loader, waiting):
    pool = make_pool({"a": 6, "b": 6}, max_memory="10MB")
    has_begun, may_end = loader.hold("a")
    release = threading.Event()

    def use() -> bool:
        with pool.lease("a") as engine:
            assert release.wait(TIMEOUT_S)
            return not engine.is_closed

    users = [run(use) for _ in range(3)]
    wait_for(waiting, 3)
    assert has_begun.wait(TIMEOUT_S)
    may_end.set()
    with pytest.raises(ModelMemoryError):
        pool.get("b")
    release.set()
    assert all(user.result(TIMEOUT_S) for user in users)


def test_unloading_closes_and_the_next_use_loads_again(pool):
    first = pool.get("chat")
    assert pool.unload("chat")
    assert first.closings == [True]
    assert loaded(pool) == []
    assert pool.get("chat") is not first


def test_unloading_what_is_not_loaded_does_nothing(pool, loader):
    assert pool.unload("chat")
    engine = pool.get("chat")
    engine.close()
    assert pool.unload("chat")
    assert engine.closings == [False]


def test_unloading_by_name_takes_pinned_models_too(pool):
    pool.pin("chat")
    pool.get("chat")
    assert pool.unload("chat")
    assert loaded(pool) == []


def test_unloading_waits_for_leases(pool):
    with pool.lease("chat") as engine:
        unloading = run(pool.unload, "chat")
        assert not pool.unload("chat", timeout_s=0)
        assert not engine.is_closed
    assert unloading.result(TIMEOUT_S)
    assert engine.is_closed


async def test_unloading_waits_for_leases_of_coroutines(pool):
    async with pool.alease("chat") as engine:
        assert not pool.unload("chat", timeout_s=0)
    assert pool.unload("chat", timeout_s=0)
    assert engine.is_closed


def test_a_lease_ends_with_an_exception_too(pool):
    with pytest.raises(ZeroDivisionError), pool.lease("chat"):
        _ = 1 / 0
    assert pool.unload("chat", timeout_s=0)


def test_a_use_during_unloading_waits_and_then_loads(pool, loader, waiting):
    first = pool.get("chat")
    wait_for(waiting, 1)
    first.may_close.clear()
    unloading = run(pool.unload, "chat")
    assert first.is_closing.wait(TIMEOUT_S)
    assert loaded(pool) == []
    assert not pool.unload("chat", timeout_s=0)
    second = run(pool.get, "chat")
    wait_for(waiting, 1)
    assert loader.names == ["chat"]
    first.may_close.set()
    assert unloading.result(TIMEOUT_S)
    assert second.result(TIMEOUT_S) is loader.engines[1]


def test_an_error_of_closing_reaches_who_unloads_and_the_model_is_gone(pool):
    pool.get("chat").close_error = OSError("disk gone")
    with pytest.raises(OSError, match="disk gone"):
        pool.unload("chat")
    assert loaded(pool) == []
    assert not pool.get("chat").is_closed


def test_the_status_says_what_is_loaded_and_used(make_pool, clock):
    pool = make_pool({"a": 4, "b": 2}, clock=clock)
    pool.pin("b")
    with pool.lease("a") as engine:
        engine.num_active_requests = 2
        clock.now_s += 5
        a, b = pool.models()
    assert (a.is_loaded, a.is_pinned, a.size_bytes, a.num_active_requests, a.num_leases) == (
        True,
        False,
        4 * MEGABYTE,
        2,
        1,
    )
    assert (b.is_loaded, b.is_pinned, b.size_bytes, b.num_active_requests, b.num_leases, b.idle_s) == (
        False,
        True,
        0,
        0,
        0,
        None,
    )
    clock.now_s += 7
    assert pool.models()[0].idle_s == 7


# Idle models


@pytest.fixture
def idle_pool(make_pool: Callable[..., ModelPool], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> ModelPool:
    """Two models that leave after a minute without use, when a test asks: a pool's own thread might come before it."""
    monkeypatch.setattr(ModelPool, "_start_idle_timer", lambda _: None)
    return make_pool({"a": 1, "b": 1}, idle_timeout_s=60, clock=clock)


def test_what_nobody_uses_for_the_timeout_is_unloaded(idle_pool, clock):
    engine = idle_pool.get("a")
    clock.now_s += 30
    idle_pool.get("b")
    assert idle_pool.unload_idle(clock.now_s + 29.9) == []
    assert idle_pool.unload_idle(clock.now_s + 30) == ["a"]
    assert engine.closings == [True]
    assert loaded(idle_pool) == ["b"]


def test_a_use_starts_the_time_anew(idle_pool, clock):
    idle_pool.get("a")
    clock.now_s += 59
    idle_pool.get("a")
    clock.now_s += 59
    assert idle_pool.unload_idle() == []


def test_the_time_runs_from_the_end_of_a_lease(idle_pool, clock):
    with idle_pool.lease("a"):
        clock.now_s += 100
        assert idle_pool.unload_idle() == []
    clock.now_s += 59
    assert idle_pool.unload_idle() == []
    clock.now_s += 1
    assert idle_pool.unload_idle() == ["a"]


def test_requests_under_way_are_a_use(idle_pool, clock):
    engine = idle_pool.get("a")
    engine.num_active_requests = 1
    clock.now_s += 100
    assert idle_pool.unload_idle() == []
    engine.num_active_requests = 0
    clock.now_s += 59
    assert idle_pool.unload_idle() == []
    clock.now_s += 1
    assert idle_pool.unload_idle() == ["a"]


def test_a_pinned_model_is_never_idle(idle_pool, clock):
    idle_pool.pin("a")
    idle_pool.get("a")
    assert idle_pool.unload_idle(clock.now_s + 10**6) == []


@pytest.mark.parametrize("seconds", [None, 0])
def test_without_a_timeout_nothing_is_idle(make_pool, clock, seconds):
    pool = make_pool({"a": 1}, idle_timeout_s=seconds, clock=clock)
    pool.get("a")
    assert idle_timers() == []
    assert pool.unload_idle(clock.now_s + 10**6) == []


def test_a_thread_unloads_in_time_and_ends_when_nothing_is_loaded(make_pool):
    pool = make_pool({"a": 1}, idle_timeout_s=0.001)
    for _ in range(2):
        engine = pool.get("a")
        assert engine.is_closing.wait(TIMEOUT_S)
        for timer in idle_timers():
            timer.join(TIMEOUT_S)
        assert idle_timers() == []


def test_the_thread_starts_with_the_first_load_and_ends_with_the_pool(make_pool):
    pool = make_pool({"a": 1, "b": 1}, idle_timeout_s=3600)
    assert idle_timers() == []
    pool.get("a")
    pool.get("b")
    [timer] = idle_timers()
    assert timer.daemon
    pool.close()
    timer.join(TIMEOUT_S)
    assert not timer.is_alive()


def test_the_thread_keeps_no_pool_alive(loader):
    pool = ModelPool(idle_timeout_s=3600, load_engine=loader)
    pool.add("a", "org/a")
    pool.get("a")
    [timer] = idle_timers()
    is_gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert is_gone() is None
    timer.join(TIMEOUT_S)
    assert not timer.is_alive()


# Closing


def test_closing_the_pool_closes_all_and_loads_none_any_more(pool, loader):
    pool.pin("chat")
    engines = [pool.get("chat"), pool.get("code")]
    with pool:
        pass
    assert [engine.closings for engine in engines] == [[False], [False]]
    with pytest.raises(EngineClosedError, match="the pool is closed: make a new one"):
        pool.get("chat")
    pool.close()
    assert [engine.closings for engine in engines] == [[False], [False]]


def test_closing_the_engines_leaves_the_pool_in_use(pool):
    engine = pool.get("chat")
    pool.close_engines()
    assert engine.is_closed
    assert pool.get("chat") is not engine


def test_closing_waits_for_a_load_and_refuses_who_waited_for_it(pool, loader, waiting, monkeypatch):
    refuses = threading.Event()
    refuse_leases = PoolEngines.refuse_leases
    monkeypatch.setattr(PoolEngines, "refuse_leases", lambda engines: (refuse_leases(engines), refuses.set()))
    _, may_end = loader.hold("chat")
    caller = run(pool.get, "chat")
    wait_for(waiting, 1)
    closing = run(pool.close)
    assert refuses.wait(TIMEOUT_S)
    may_end.set()
    closing.result(TIMEOUT_S)
    assert [engine.is_closed for engine in loader.engines] == [True]
    assert isinstance(caller.exception(TIMEOUT_S), EngineClosedError)


def test_an_engine_that_fails_to_close_does_not_keep_the_others_open(pool):
    broken, other = pool.get("chat"), pool.get("code")
    broken.close_error = OSError("disk gone")
    with pytest.raises(OSError, match="disk gone"):
        pool.close_engines()
    assert other.is_closed


# Many at once


def test_threads_in_contention_stay_within_the_limit_and_never_lose_a_leased_engine(make_pool):
    """Three threads lease one of five models each, of which three fit: none ever fails, and memory never runs over."""
    in_memory: set[int] = set()
    most = 0
    lock = threading.Lock()

    class CountedEngine(PooledEngine):
        def close(self, *, drain: bool = False) -> None:
            with lock:
                in_memory.discard(id(self))
            super().close(drain=drain)

    def load(spec: Any, _: Any) -> PooledEngine:
        nonlocal most
        engine = CountedEngine(3 * MEGABYTE)
        with lock:
            in_memory.add(id(engine))
            most = max(most, len(in_memory))
        return engine

    pool = make_pool(dict.fromkeys("abcde", 3), max_memory="10MB", load_engine=load)
    barrier = threading.Barrier(3)

    def use(seed: int) -> int:
        chooser = random.Random(seed)
        barrier.wait(TIMEOUT_S)
        num_uses = 0
        for _ in range(100):
            with pool.lease(chooser.choice("abcde")) as engine:
                assert not engine.is_closed
                if chooser.random() < 0.3:
                    pool.unload(chooser.choice("abcde"), timeout_s=0)
                assert not engine.is_closed
                num_uses += 1
        return num_uses

    assert [future.result(TIMEOUT_S) for future in [run(use, seed) for seed in range(3)]] == [100, 100, 100]
    assert 1 <= most <= 3
    assert [status.num_leases for status in pool.models()] == [0] * 5


# Other processes


def test_a_fork_is_refused_the_engines_of_its_parent_and_does_not_close_them(pool, monkeypatch):
    engine = pool.get("chat")
    process_id = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process_id + 1)
    with pytest.raises(EngineForkedError, match=rf"in process {process_id} and is used in its fork {process_id + 1}"):
        pool.get("chat")
    pool.close_engines()
    monkeypatch.undo()
    assert not engine.is_closed
    assert pool.get("chat") is engine


def test_a_fork_of_a_process_that_has_loaded_nothing_may_use_the_pool(pool, monkeypatch):
    process_id = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process_id + 1)
    assert not pool.get("chat").is_closed


def test_a_pool_imports_mlx_with_its_first_model_only():
    script = (
        "import sys; from omlx_core import ModelPool; pool = ModelPool(max_memory='50%', idle_timeout_s=1); "
        "pool.add('chat', 'org/model'); pool.models(); sys.exit('mlx.core' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# Real models


@pytest.fixture
def model_folders(tmp_path: Path) -> list[Path]:
    return [save_model_folder(tmp_path / f"llama-{seed}", tiny_llama(seed=seed)) for seed in range(2)]


@pytest.fixture
def real_pool(model_folders: list[Path], tmp_path: Path) -> Iterator[ModelPool]:
    """Two models of which one fits, with an SSD tier."""
    size_bytes = (model_folders[0] / "model.safetensors").stat().st_size
    cache = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path / "ssd")
    with ModelPool(max_memory=int(1.5 * size_bytes), cache=cache) as pool:
        pool.add("a", model_folders[0])
        pool.add("b", model_folders[1])
        yield pool


def test_a_model_that_comes_back_finds_its_prefixes_on_ssd(real_pool):
    prompt = tokens(70)
    with real_pool.lease("a") as engine:
        cold = engine.generate(prompt, max_tokens=5, logprobs=True)
    real_pool.get("b")
    assert engine.is_closed
    with real_pool.lease("a") as engine:
        warm = engine.generate(prompt, max_tokens=5, logprobs=True)
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens_cold) == (0, 64)
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_unloading_gives_the_memory_back(real_pool):
    gc.collect()
    mx.clear_cache()
    before_bytes = mx.get_active_memory()
    with real_pool.lease("a") as engine:
        engine.generate(tokens(200), max_tokens=5)
        size_bytes = engine.memory_bytes - engine.cache.stats().hot.hot_bytes
    blocks = [
        weakref.ref(tensor.source)
        for block in engine.cache._paged._pool._blocks
        if block.payload is not None
        for tensor in block.payload.tensors.values()
    ]
    assert blocks
    assert all(block() is not None for block in blocks)
    assert mx.get_active_memory() >= before_bytes + size_bytes
    del engine
    real_pool.unload("a")
    assert mx.get_active_memory() <= before_bytes + size_bytes // 20
    assert mx.get_cache_memory() == 0
    assert not any(block() for block in blocks)


def test_the_size_is_that_of_the_weights_and_of_what_is_cached_in_ram(real_pool, model_folders):
    with real_pool.lease("a") as engine:
        [status, _] = real_pool.models()
        file_bytes = (model_folders[0] / "model.safetensors").stat().st_size
        assert 0 <= file_bytes - status.size_bytes < 10_000
        engine.generate(tokens(200), max_tokens=5)
        assert real_pool.models()[0].size_bytes == status.size_bytes + engine.cache.stats().hot.hot_bytes


def test_a_draft_model_is_loaded_and_counts_with_its_model(model_folders):
    with ModelPool() as pool:
        pool.add("plain", model_folders[0])
        pool.add("drafted", model_folders[0], draft_model=model_folders[1])
        pool.get("plain")
        pool.get("drafted")
        plain, drafted = pool.models()
    assert drafted.size_bytes == 2 * plain.size_bytes


def test_a_request_under_way_is_finished_before_its_model_is_unloaded(real_pool):
    engine = real_pool.get("a")
    chunks = engine.stream(tokens(20), max_tokens=200)
    next(chunks)
    assert engine.num_active_requests == 1
    assert real_pool.unload("a")
    assert list(chunks)[-1].result.finish_reason == "length"
    with pytest.raises(EngineClosedError):
        engine.generate(tokens(20), max_tokens=1)


def test_progress_is_told_by_the_models_id(model_folders):
    reports: list[LoadProgress] = []
    with ModelPool(on_load=reports.append) as pool:
        pool.add("chat", model_folders[0])
        [status] = pool.models()
        pool.get("chat")
        [status] = pool.models()
    assert {report.model for report in reports} == {"chat"}
    assert reports[0].phase == "reading"
    assert reports[-1] == LoadProgress("chat", "ready", status.size_bytes, status.size_bytes)


def test_a_listener_that_raises_gives_the_load_up(model_folders):
    def give_up(report: LoadProgress) -> None:
        raise TimeoutError("took too long")

    with ModelPool(on_load=give_up) as pool:
        pool.add("chat", model_folders[0])
        with pytest.raises(TimeoutError, match="took too long"):
            pool.get("chat")
        assert loaded(pool) == []


def test_a_bar_is_shown_when_asked_for(model_folders, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for progress in (False, True):
        with ModelPool(progress=progress) as pool:
            pool.add("chat", model_folders[0])
            pool.get("chat")
        assert ("Loading chat" in capsys.readouterr().err) == progress
