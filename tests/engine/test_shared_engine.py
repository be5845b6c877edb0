from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_engine import FakeEngine

from omlx_core import CacheSettings, EngineSettings
from omlx_core.engine import shared
from omlx_core.engine.shared import aget_shared_engine, close_shared_engines, get_shared_engine
from omlx_core.errors import ModelLoadError

TIMEOUT_S = 30


class Loader:
    """Stands in for loading a model; a model whose name has a gate waits for it."""

    def __init__(self) -> None:
        self.keys: list[shared._Key] = []
        self.gates: dict[str, threading.Event] = {}
        self.started: dict[str, threading.Event] = {}
        self.failures: list[Exception] = []

    def hold(self, model: str) -> tuple[threading.Event, threading.Event]:
        self.started[model], self.gates[model] = threading.Event(), threading.Event()
        return self.started[model], self.gates[model]

    def __call__(self, key: shared._Key) -> FakeEngine:
        self.keys.append(key)
        if key.model in self.gates:
            self.started[key.model].set()
            assert self.gates[key.model].wait(TIMEOUT_S)
        if self.failures:
            raise self.failures.pop()
        return FakeEngine()


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr(shared, "_slots", {})
    monkeypatch.setattr(shared, "_load", loader)
    return loader


def test_the_same_model_is_loaded_once(loader):
    assert get_shared_engine("org/model") is get_shared_engine("org/model")
    assert len(loader.keys) == 1


def test_no_settings_are_the_default_settings(loader):
    assert get_shared_engine("org/model") is get_shared_engine("org/model", None, CacheSettings(), EngineSettings())


def test_another_model_adapter_or_setting_is_another_engine(loader):
    engines = [
        get_shared_engine("org/model"),
        get_shared_engine("org/other"),
        get_shared_engine("org/model", adapter_path="adapter"),
        get_shared_engine("org/model", cache=CacheSettings(block_size=16)),
        get_shared_engine("org/model", settings=EngineSettings(max_batch_size=1)),
    ]
    assert len(set(map(id, engines))) == len(engines)


def test_a_relative_path_and_a_link_are_the_same_model(loader, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    engines = {id(get_shared_engine(name)) for name in ("model", "./model", tmp_path / "model", "link")}
    assert len(engines) == 1
    assert loader.keys[0].model == str((tmp_path / "model").resolve())


def test_settings_from_the_environment_are_part_of_the_identity(loader, monkeypatch):
    before = get_shared_engine("org/model")
    monkeypatch.setenv("OMLX_BLOCK_SIZE", "16")
    assert get_shared_engine("org/model") is not before
    assert loader.keys[1].cache.block_size == 16


def test_a_closed_engine_is_replaced(loader):
    first = get_shared_engine("org/model")
    first.close()
    second = get_shared_engine("org/model")
    assert second is not first
    assert not second.is_closed


def test_a_failed_load_is_not_remembered(loader):
    loader.failures.append(ModelLoadError("no memory"))
    with pytest.raises(ModelLoadError, match="no memory"):
        get_shared_engine("org/model")
    assert get_shared_engine("org/model") is get_shared_engine("org/model")
    assert len(loader.keys) == 2


def test_threads_that_ask_at_once_wait_for_one_load(loader):
    started, gate = loader.hold("org/model")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(get_shared_engine, "org/model") for _ in range(4)]
        assert started.wait(TIMEOUT_S)
        gate.set()
        engines = {id(future.result(TIMEOUT_S)) for future in futures}
    assert len(engines) == 1
    assert len(loader.keys) == 1


def test_a_model_does_not_wait_for_another_ones_load(loader):
    started, gate = loader.hold("org/slow")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(get_shared_engine, "org/slow")
        assert started.wait(TIMEOUT_S)
        pool.submit(get_shared_engine, "org/fast").result(TIMEOUT_S)
        assert not slow.done()
        gate.set()
        slow.result(TIMEOUT_S)


async def test_a_load_leaves_the_event_loop_free(loader):
    started, gate = loader.hold("org/model")
    task = asyncio.create_task(aget_shared_engine("org/model"))
    # Only a loop that runs gets here while the load waits, and only then is the gate opened.
    assert await asyncio.to_thread(started.wait, TIMEOUT_S)
    gate.set()
    assert await task is get_shared_engine("org/model")


async def test_a_loaded_engine_comes_without_a_thread(loader, monkeypatch):
    engine = get_shared_engine("org/model")
    monkeypatch.setattr(asyncio, "to_thread", None)
    assert await aget_shared_engine("org/model") is engine


def test_close_shared_engines_closes_all_and_later_requests_load_again(loader):
    engines = [get_shared_engine("org/model"), get_shared_engine("org/other")]
    close_shared_engines()
    assert all(engine.is_closed for engine in engines)
    assert get_shared_engine("org/model") is not engines[0]


def test_an_engine_that_fails_to_close_does_not_keep_the_others_open(loader):
    broken, other = get_shared_engine("org/model"), get_shared_engine("org/other")

    def fail() -> None:
        raise OSError("disk gone")

    broken.close = fail
    with pytest.raises(OSError, match="disk gone"):
        close_shared_engines()
    assert other.is_closed
