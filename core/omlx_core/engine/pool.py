"""Several models in one process: loaded on first use, unloaded when room is needed or nobody used them for long.

A model that was unloaded and is loaded again finds its cached prefixes on SSD.

When may an engine go? An unloaded engine is closed, and a closed engine takes no requests. So whoever uses one says for
how long: between the ends of a `lease` it is neither chosen to make room nor found idle. `get` promises nothing beyond
the moment: the engine may be unloaded by whatever the pool does next, and a request then raises `EngineClosedError`
before anything of it has run. A request that was taken is always finished: engines with requests under way aren't
chosen, and one that is chosen finishes what it took just before.

Two other ways were rejected. A lease that lasts as long as someone refers to the engine ends at no definite time. An
engine that opens again by itself would load a model, and unload others for it, inside a request that names neither.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from omlx_core.engine.pool_engines import PoolEngines
from omlx_core.engine.pool_models import ModelList, ModelSpec, ModelStatus, PooledModel
from omlx_core.model.load_progress import OnLoadProgress, report_load
from omlx_core.settings import CacheSettings, EngineSettings, PoolSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine

LoadEngine = Callable[[ModelSpec, OnLoadProgress], "Engine"]
"""Makes the engine of a model."""


class ModelPool:
    """Models by id. Any thread and any event loop may use it.

    ::

        with ModelPool(max_memory="60%", idle_timeout_s=600) as pool:
            pool.add("chat", "mlx-community/Qwen3-8B-4bit", pin=True)
            pool.add("code", "mlx-community/Qwen2.5-Coder-14B-Instruct-4bit")
            with pool.lease("code") as engine:
                print(engine.generate("def fibonacci(n):").text)

    Args:
        max_memory: most bytes that the models take together, each with what its cache holds in RAM: bytes, ``"20GB"``
            or ``"60%"``; `PoolSettings` says of what. None reads the environment.
        idle_timeout_s: seconds without use after which a model is unloaded. None reads the environment.
        cache: how prefixes are cached, of models that are added without. None reads the environment then.
        settings: how requests are run, likewise.
        on_load: is told how far each load has come.
        progress: show a bar on stderr, if that is a terminal, while a model is loaded.
        load_engine: makes engines; None is `Engine.from_pretrained`.
        clock: seconds that only rise.

    Raises:
        InvalidSettingError: a size or a time that isn't one.
    """

    def __init__(
        self,
        *,
        max_memory: int | str | None = None,
        idle_timeout_s: float | None = None,
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
        on_load: OnLoadProgress | None = None,
        progress: bool = False,
        load_engine: LoadEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        given: dict[str, Any] = {"max_model_memory": max_memory, "model_idle_timeout_s": idle_timeout_s}
        limits = PoolSettings(**{name: value for name, value in given.items() if value is not None})
        make = load_engine or _load_engine

        def load(model: PooledModel) -> Engine:
            with report_load(model.model_id, on_load, has_bar=progress) as report:
                return make(model.spec, report)

        self._models = ModelList(cache, settings)
        self._engines = PoolEngines(self._models, limits, load, clock)
        self._changed = self._engines.changed
        self._clock = clock
        self._idle_timeout_s = limits.model_idle_timeout_s or None
        self._idle_timer: threading.Thread | None = None
        self._stop_idle_timer = threading.Event()

    def add(
        self,
        model_id: str,
        path_or_repo: str | os.PathLike[str],
        *,
        adapter_path: str | os.PathLike[str] | None = None,
        draft_model: str | os.PathLike[str] | None = None,
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
        pin: bool = False,
    ) -> None:
        """Give a model an id; nothing is loaded. Two ids of one model with the same settings share an engine.

        Args:
            model_id: any text.
            path_or_repo: a folder in mlx-lm's format, or a repository id.
            adapter_path: a folder with a LoRA adapter.
            draft_model: a folder or repository of a smaller model for speculative decoding.
            cache: None is the pool's.
            settings: None is the pool's.
            pin: as `pin`.

        Raises:
            InvalidSettingError: the id stands for something else already.
        """
        spec = self._models.describe(path_or_repo, adapter_path, draft_model, cache, settings)
        with self._changed:
            model = self._models.add(model_id, spec)
            model.is_pinned = model.is_pinned or pin

    def resolve(
        self,
        model: str | os.PathLike[str],
        *,
        adapter_path: str | os.PathLike[str] | None = None,
        draft_model: str | os.PathLike[str] | None = None,
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
    ) -> str:
        """The id of a model by what it is loaded from, which is added under a name like that if it isn't there.

        Args:
            model: a folder, a repository id, or an id given to `add`: this stands for everything that was given
                with it, of which the arguments beside it replace their part.
            adapter_path: a folder with a LoRA adapter.
            draft_model: a folder or repository of a smaller model for speculative decoding.
            cache: None is the pool's.
            settings: None is the pool's.
        """
        name = os.fspath(model)
        with self._changed:
            added = self._models.added_spec(name)
        if added is not None:
            name, adapter_path = added.model, adapter_path or added.adapter_path
            draft_model = draft_model or added.draft_model
            cache, settings = cache or added.cache, settings or added.settings
        spec = self._models.describe(name, adapter_path, draft_model, cache, settings)
        with self._changed:
            return self._models.find_or_name(spec).model_id

    def pin(self, model_id: str) -> None:
        """Keep a model loaded, from its next use on, until it is unpinned or `unload` is called for it.

        Raises:
            UnknownModelError: there is no such id.
        """
        with self._changed:
            self._models.find(model_id).is_pinned = True

    def unpin(self, model_id: str) -> None:
        """Undo `pin`.

        Raises:
            UnknownModelError: there is no such id.
        """
        with self._changed:
            self._models.find(model_id).is_pinned = False

    def models(self) -> list[ModelStatus]:
        """All models, in the order in which their ids were given."""
        self._engines.measure()
        with self._changed:
            now_s = self._clock()
            return [model.status(model_id, now_s) for model_id, model in self._models.items()]

    def get(self, model_id: str) -> Engine:
        """A model's engine, which the first caller loads; who asks meanwhile waits for that one load.

        It may be unloaded by whatever the pool does next; `lease` keeps it.

        Raises:
            UnknownModelError: there is no such id.
            ModelMemoryError: it doesn't fit beside what can't be unloaded. Nothing has changed, unless it turned out
                larger than its files, for whose sake others may have been unloaded.
            ModelNotFoundError, ModelLoadError, MissingDependencyError, CacheDirectoryError: as
                `Engine.from_pretrained`; the next call tries again.
            EngineClosedError: the pool was closed.
            EngineForkedError: the pool has loaded models in the process that this one is a fork of.
        """
        with self.lease(model_id) as engine:
            return engine

    async def aget(self, model_id: str) -> Engine:
        """`get` for coroutines: a load runs on a thread, an engine that is there comes at once."""
        async with self.alease(model_id) as engine:
            return engine

    @contextmanager
    def lease(self, model_id: str) -> Iterator[Engine]:
        """As `get`, and the engine isn't unloaded before the block ends."""
        model = self._engines.begin_lease(model_id)
        try:
            engine = self._engines.open(model)
            self._start_idle_timer()
            yield engine
        finally:
            self._engines.end_lease(model)

    @asynccontextmanager
    async def alease(self, model_id: str) -> AsyncIterator[Engine]:
        """`lease` for coroutines: a load runs on a thread, an engine that is there comes at once."""
        model = self._engines.begin_lease(model_id)
        try:
            engine = await self._engines.aopen(model)
            self._start_idle_timer()
            yield engine
        finally:
            self._engines.end_lease(model)

    def unload(self, model_id: str, timeout_s: float | None = None) -> bool:
        """Unload a model, even a pinned one, once nobody leases it. What it has cached stays on SSD.

        Its requests under way are finished first. The next call for it loads it again.

        Args:
            model_id: its id.
            timeout_s: how long to wait for leases to end, the caller's own included; None is as long as it takes.

        Returns:
            False if `timeout_s` ran out first, and nothing has changed.

        Raises:
            UnknownModelError: there is no such id.
        """
        with self._changed:
            model = self._models.find(model_id)
            if not self._changed.wait_for(lambda: model.pending is None and not model.num_leases, timeout_s):
                return False
            if model.open_engine is None:
                return True
            closing = model.begin_closing()
        if (error := self._engines.close(model, closing, drain=True)) is not None:
            raise error
        return True

    def unload_idle(self, now_s: float | None = None) -> list[str]:
        """Unload what nobody has used for `idle_timeout_s`; a thread of the pool calls this in time.

        Args:
            now_s: the time by the pool's clock; None reads it.

        Returns:
            The ids of what was unloaded.
        """
        if self._idle_timeout_s is None:
            return []
        closings: dict[PooledModel, Future[None]] = {}
        with self._changed:
            now_s = self._clock() if now_s is None else now_s
            for model in self._models.least_recently_used_first():
                if model.open_engine is None or model.is_pinned:
                    continue
                if model.is_in_use:
                    model.last_used_s = now_s
                elif now_s - model.last_used_s >= self._idle_timeout_s:
                    closings[model] = model.begin_closing()
        for model, closing in closings.items():
            self._engines.unload(model, closing)
        return [model.model_id for model in closings]

    def close_engines(self) -> None:
        """Unload all models at once, failing what still runs. The next call for one loads it again.

        Waits for loads in progress. An engine whose closing raises doesn't keep the others open; the first such error
        is raised at the end. In a fork of the process that has loaded them, nothing happens: they aren't the fork's.
        """
        if self._engines.are_foreign:
            return
        errors = []
        with self._changed:
            models = self._models.least_recently_used_first()
        for model in models:
            if (closing := self._begin_closing_when_settled(model)) is not None:
                errors.append(self._engines.close(model, closing, drain=False))
        if (error := next(filter(None, errors), None)) is not None:
            raise error

    def close(self) -> None:
        """Unload all models as `close_engines`, and load none any more. Idempotent."""
        self._stop_idle_timer.set()
        self._engines.refuse_leases()
        self.close_engines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin_closing_when_settled(self, model: PooledModel) -> Future[None] | None:
        """Take a model for closing once no other thread loads or closes it; None if it isn't loaded then."""
        with self._changed:
            self._changed.wait_for(lambda: model.pending is None)
            return None if model.open_engine is None else model.begin_closing()

    def _start_idle_timer(self) -> None:
        """Have a thread unload what is idle, unless there is one; a model is loaded."""
        if self._idle_timeout_s is None:
            return
        with self._changed:
            if self._idle_timer is None:
                stop = self._stop_idle_timer
                pool = weakref.ref(self, lambda _: stop.set())
                self._idle_timer = threading.Thread(
                    target=_unload_in_time, args=(pool, stop), name="omlx-idle-models", daemon=True
                )
                self._idle_timer.start()

    def _seconds_to_next_check(self) -> float | None:
        """When to call `unload_idle` again; None, and the timer counts as gone, if nothing is loaded."""
        with self._changed:
            loaded = [model for model in self._models.least_recently_used_first() if model.open_engine is not None]
            if not loaded or self._idle_timeout_s is None:
                self._idle_timer = None
                return None
            now_s = self._clock()
            oldest_s = min((model.last_used_s for model in loaded if not model.is_pinned), default=now_s)
            return max(0.0, oldest_s + self._idle_timeout_s - now_s)


def _unload_in_time(pool: weakref.ref[ModelPool], stop: threading.Event) -> None:
    """Wait and unload, until nothing is loaded or the pool is gone."""
    wait_s: float | None = 0.0
    while wait_s is not None and not stop.wait(wait_s):
        owner = pool()
        if owner is None:
            return
        owner.unload_idle()
        wait_s = owner._seconds_to_next_check()
        del owner


def _load_engine(spec: ModelSpec, on_progress: OnLoadProgress) -> Engine:
    from omlx_core.engine.engine import Engine

    return Engine.from_pretrained(
        spec.model,
        adapter_path=spec.adapter_path,
        draft_model=spec.draft_model,
        cache=spec.cache,
        settings=spec.settings,
        on_progress=on_progress,
    )
