"""One engine per model and settings in a process, whoever asks for it.

A LangChain chain and a LlamaIndex query over the same model share its weights, its cached prefixes and its batch.
"""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omlx_core.settings import CacheSettings, EngineSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class _Key:
    model: str
    adapter_path: str | None
    cache: CacheSettings
    settings: EngineSettings


@dataclass(slots=True)
class _Slot:
    """An engine's place. Its lock is held while the engine loads, so that other models don't wait for this one."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    engine: Engine | None = None

    def open_engine(self) -> Engine | None:
        engine = self.engine  # read once: another thread may take it away
        return None if engine is None or engine.is_closed else engine


_slots: dict[_Key, _Slot] = {}
_slots_lock = threading.Lock()


def get_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> Engine:
    """The process's engine for a model, loaded by the first caller.

    Blocks while the engine loads; threads that ask for the same engine wait for that one load. An engine that was
    closed is replaced, and a load that failed is tried again by the next call.

    Args:
        model: a folder or a repository id; a relative path and a link are the same model as what they lead to.
        adapter_path: a folder with LoRA weights.
        cache: None reads the settings from the environment.
        settings: None reads the settings from the environment.

    Raises:
        ModelNotFoundError, ModelLoadError, MissingDependencyError, CacheDirectoryError: as `Engine.from_pretrained`.
    """
    key = _key(model, adapter_path, cache, settings)
    slot = _slot(key)
    if (engine := slot.open_engine()) is not None:
        return engine
    with slot.lock:
        engine = slot.open_engine()
        if engine is None:
            engine = slot.engine = _load(key)
        return engine


async def aget_shared_engine(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None = None,
    cache: CacheSettings | None = None,
    settings: EngineSettings | None = None,
) -> Engine:
    """`get_shared_engine` for coroutines: a load runs on a thread, an engine that is there comes at once."""
    engine = _slot(_key(model, adapter_path, cache, settings)).open_engine()
    if engine is not None:
        return engine
    return await asyncio.to_thread(get_shared_engine, model, adapter_path, cache, settings)


def close_shared_engines() -> None:
    """Close every shared engine, flushing its cache; a later request loads its model again.

    Waits for loads in progress. An engine whose closing raises doesn't keep the others open; the first such error
    is raised at the end.
    """
    with _slots_lock:
        slots = list(_slots.values())
    errors: list[Exception] = []
    for slot in slots:
        with slot.lock:
            engine, slot.engine = slot.engine, None
            if engine is None:
                continue
            try:
                engine.close()
            except Exception as exc:
                errors.append(exc)
    if errors:
        raise errors[0]


def _key(
    model: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str] | None,
    cache: CacheSettings | None,
    settings: EngineSettings | None,
) -> _Key:
    return _Key(
        model=_resolved(model),
        adapter_path=None if adapter_path is None else _resolved(adapter_path),
        cache=cache or CacheSettings(),
        settings=settings or EngineSettings(),
    )


def _resolved(model: str | os.PathLike[str]) -> str:
    """The absolute path of an existing folder; anything else is a repository id or an error of the loader's."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(model)


def _slot(key: _Key) -> _Slot:
    with _slots_lock:
        return _slots.setdefault(key, _Slot())


def _load(key: _Key) -> Engine:
    from omlx_core.engine.engine import Engine

    return Engine.from_pretrained(key.model, adapter_path=key.adapter_path, cache=key.cache, settings=key.settings)
