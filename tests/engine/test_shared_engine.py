from __future__ import annotations

import asyncio
import threading

import pytest
from pooled_engine import TIMEOUT_S, Loader, PooledEngine

from omlx_core import CacheSettings, EngineSettings, ModelPool
from omlx_core.engine import shared
from omlx_core.engine.pool_models import ModelSpec
from omlx_core.engine.shared import (
    aget_shared_engine,
    alease_shared_engine,
    close_shared_engines,
    default_pool,
    get_shared_engine,
    lease_shared_engine,
)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelSpec]:
    """What the default pool has loaded."""
    loader = Loader()
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=loader))
    return loader.specs


def test_the_same_model_is_loaded_once(loads):
    assert get_shared_engine("org/model") is get_shared_engine("org/model")
    assert len(loads) == 1


def test_no_settings_are_the_default_settings(loads):
    assert get_shared_engine("org/model") is get_shared_engine("org/model", None, CacheSettings(), EngineSettings())


def test_another_model_adapter_or_setting_is_another_engine(loads):
    engines = [
        get_shared_engine("org/model"),
        get_shared_engine("org/other"),
        get_shared_engine("org/model", adapter_path="adapter"),
        get_shared_engine("org/model", cache=CacheSettings(block_size=16)),
        get_shared_engine("org/model", settings=EngineSettings(max_batch_size=1)),
    ]
    assert len(set(map(id, engines))) == len(engines)


def test_a_relative_path_and_a_link_are_the_same_model(loads, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    engines = {id(get_shared_engine(name)) for name in ("model", "./model", tmp_path / "model", "link")}
    assert len(engines) == 1
    assert loads[0].model == str((tmp_path / "model").resolve())


def test_settings_from_the_environment_are_part_of_the_identity(loads, monkeypatch):
    before = get_shared_engine("org/model")
    monkeypatch.setenv("OMLX_BLOCK_SIZE", "16")
    assert get_shared_engine("org/model") is not before
    assert loads[1].cache.block_size == 16


def test_every_form_gives_the_same_engine(loads):
    async def ask() -> list[PooledEngine]:
        async with alease_shared_engine("org/model") as leased:
            return [leased, await aget_shared_engine("org/model")]

    with lease_shared_engine("org/model") as leased:
        engines = [leased, get_shared_engine("org/model"), *asyncio.run(ask())]
    assert len(set(map(id, engines))) == 1


async def test_the_forms_with_leases_keep_the_model_loaded(loads):
    with lease_shared_engine("org/model"):
        assert not default_pool().unload("org/model", timeout_s=0)
    async with alease_shared_engine("org/model"):
        assert not default_pool().unload("org/model", timeout_s=0)
    assert default_pool().unload("org/model", timeout_s=0)


def test_a_model_added_to_the_default_pool_is_named_by_its_id(loads):
    default_pool().add("chat", "org/model", cache=CacheSettings(block_size=16))
    assert get_shared_engine("chat") is get_shared_engine("org/model", cache=CacheSettings(block_size=16))
    assert get_shared_engine("chat") is not get_shared_engine("org/model")


def test_the_default_pools_limits_come_from_the_environment_at_its_first_use(monkeypatch):
    monkeypatch.setattr(shared, "_pool", None)
    monkeypatch.setenv("OMLX_MODEL_IDLE_TIMEOUT_S", "never")
    with pytest.raises(ValueError, match="model_idle_timeout_s='never'"):
        default_pool()
    monkeypatch.setenv("OMLX_MODEL_IDLE_TIMEOUT_S", "60")
    assert default_pool() is default_pool()


def test_close_shared_engines_closes_all_and_later_requests_load_again(loads):
    engines = [get_shared_engine("org/model"), get_shared_engine("org/other")]
    close_shared_engines()
    assert all(engine.is_closed for engine in engines)
    assert get_shared_engine("org/model") is not engines[0]


def test_without_a_pool_there_is_nothing_to_close(monkeypatch):
    monkeypatch.setattr(shared, "_pool", None)
    close_shared_engines()
    assert shared._pool is None


def test_threads_that_come_first_at_once_share_one_pool(monkeypatch):
    monkeypatch.setattr(shared, "_pool", None)
    barrier = threading.Barrier(4)
    pools: list[ModelPool] = []

    def ask() -> None:
        barrier.wait(TIMEOUT_S)
        pools.append(default_pool())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(pools) == 4
    assert len(set(map(id, pools))) == 1
