"""One pool for the whole process: whoever names the same model and settings gets the same engine.

A LangChain chain and a LlamaIndex query over the same model share its weights, its cached prefixes and its batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from omlx_core.engine.pool import ModelPool
from omlx_core.settings import CacheSettings, EngineSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine

_pool: ModelPool | None = None
_pool_lock = threading.Lock()


def default_pool() -> ModelPool:
    """The pool that the functions here use; its limits come from the environment, at the first use.

    A model that is added to it can be named by its id wherever these functions take a folder or a repository.
    """
    global _pool  # noqa: PLW0603 - it is the one of the process
    with _pool_lock:
        if _pool is None:
            _pool = ModelPool()
        return _pool


@contextmanager
def lease_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> Iterator[Engine]:
    """The process's engine for a model, loaded by the first caller; it isn't unloaded before the block ends.

    Blocks while the engine loads; threads that ask for the same engine wait for that one load. An engine that was
    closed is replaced, and a load that failed is tried again by the next call.

    Args:
        model: a folder or a repository id, of which a relative path and a link are the same model as what they lead
            to; or an id in `default_pool`, see `ModelPool.resolve`.
        adapter_path: a folder with LoRA weights.
        cache: None reads the settings from the environment.
        settings: None reads the settings from the environment.

    Raises:
        ModelNotFoundError, ModelLoadError, MissingDependencyError, CacheDirectoryError, ModelMemoryError,
            EngineForkedError: as `ModelPool.get`.
    """
    pool = default_pool()
    with pool.lease(pool.resolve(model, adapter_path=adapter_path, cache=cache, settings=settings)) as engine:
        yield engine


@asynccontextmanager
async def alease_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> AsyncIterator[Engine]:
    """`lease_shared_engine` for coroutines: a load runs on a thread, an engine that is there comes at once."""
    pool = default_pool()
    model_id = pool.resolve(model, adapter_path=adapter_path, cache=cache, settings=settings)
    async with pool.alease(model_id) as engine:
        yield engine


def get_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> Engine:
    """As `lease_shared_engine`, but where memory or time is limited, it may be unloaded by the next load."""
    with lease_shared_engine(model, adapter_path, cache, settings) as engine:
        return engine


async def aget_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> Engine:
    """`get_shared_engine` for coroutines: a load runs on a thread, an engine that is there comes at once."""
    async with alease_shared_engine(model, adapter_path, cache, settings) as engine:
        return engine


def close_shared_engines() -> None:
    """Close every shared engine, flushing its cache; a later request loads its model again.

    Waits for loads in progress. An engine whose closing raises doesn't keep the others open; the first such error
    is raised at the end.
    """
    if _pool is not None:
        _pool.close_engines()
