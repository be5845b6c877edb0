"""Opens and closes the engines of a pool, within its memory.

One lock guards the records. No engine is loaded, closed or asked for its size under it: whoever is about to load or
close one puts a future into the model's record, and all who want that model wait for it, and nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omlx_core.engine.pool_memory import choose_leaving, device_memory_bytes
from omlx_core.engine.pool_models import ModelList, ModelSpec, PooledModel
from omlx_core.errors import EngineClosedError, EngineForkedError
from omlx_core.settings import PoolSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine

logger = logging.getLogger(__name__)


class PoolEngines:
    """The engines of a pool's models.

    Args:
        models: the models.
        limits: what they may take together.
        load: makes a model's engine.
        clock: seconds that only rise.

    Attributes:
        changed: a condition on the lock that guards all records, notified when a load, a closing or a lease ends.
    """

    def __init__(
        self,
        models: ModelList,
        limits: PoolSettings,
        load: Callable[[PooledModel], Engine],
        clock: Callable[[], float],
    ) -> None:
        self.changed = threading.Condition(threading.Lock())
        self._models = models
        self._limits = limits
        self._load_engine = load
        self._clock = clock
        self._takes_leases = True
        self._process_id: int | None = None  # the process that has loaded a model

    @property
    def are_foreign(self) -> bool:
        """Whether they belong to another process, of which this one is a fork."""
        return self._process_id not in (None, os.getpid())

    # Leases. Those who wait for an engine have one too: it isn't unloaded before they got it.

    def begin_lease(self, model_id: str) -> PooledModel:
        """Have a model's engine, as soon as it is open, stay so until `end_lease`.

        Raises:
            UnknownModelError: there is no such id.
            EngineForkedError: engines were loaded in another process.
        """
        if self.are_foreign:
            raise EngineForkedError(
                f"this pool has loaded models in process {self._process_id} and is used in its fork {os.getpid()}: "
                "threads and device memory don't survive a fork; make the pool after it, or start processes with the "
                "method 'spawn'"
            )
        with self.changed:
            model = self._models.find(model_id)
            model.num_leases += 1
            return model

    def end_lease(self, model: PooledModel) -> None:
        """The counterpart of `begin_lease`."""
        with self.changed:
            model.num_leases -= 1
            self._models.used(model, self._clock())
            self.changed.notify_all()

    def open(self, model: PooledModel) -> Engine:
        """A leased model's engine, loaded if it isn't there; see `ModelPool.get` for what it raises."""
        while isinstance(found := self._look(model), _NotOpen):
            if found.is_up_to_caller:
                self._load(model, found.pending)
            found.pending.result()
        return found

    async def aopen(self, model: PooledModel) -> Engine:
        """`open` for coroutines: a load runs on a thread, an engine that is there comes at once."""
        while isinstance(found := self._look(model), _NotOpen):
            if found.is_up_to_caller:
                self._load_on_thread(model, found.pending)
            await asyncio.wrap_future(found.pending)
        return found

    def refuse_leases(self) -> None:
        """Have `open` raise from now on."""
        with self.changed:
            self._takes_leases = False

    def _look(self, model: PooledModel) -> Engine | _NotOpen:
        with self.changed:
            if not self._takes_leases:
                raise EngineClosedError("the pool is closed: make a new one")
            if (engine := model.open_engine) is not None:
                return engine
            if model.pending is not None:
                return _NotOpen(model.pending, is_up_to_caller=False)
            self._process_id = os.getpid()
            return _NotOpen(model.begin_loading(), is_up_to_caller=True)

    # Loading.

    def _load(self, model: PooledModel, loading: Future[None]) -> None:
        """Load an engine, and say so to all who wait; an error is theirs too."""
        engine: Engine | None = None
        error: Exception | None = None
        try:
            engine = self._make_engine(model)
        except Exception as exc:
            error = exc
        finally:  # an interrupt concerns this thread alone: who waits then looks again
            self._end_loading(model, loading, engine, error)
            error = None  # it refers to this frame

    def _load_on_thread(self, model: PooledModel, loading: Future[None]) -> None:
        # Not on the event loop's executor: while that is full nothing would start, and everyone would wait for it.
        thread = threading.Thread(
            target=self._load, args=(model, loading), name=f"omlx-load-{model.model_id}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as exc:  # no more threads
            self._end_loading(model, loading, None, exc)

    def _end_loading(
        self, model: PooledModel, loading: Future[None], engine: Engine | None, error: Exception | None
    ) -> None:
        with self.changed:
            model.end(engine)
            self._models.used(model, self._clock())
            self.changed.notify_all()
        if error is None:
            loading.set_result(None)
        else:
            loading.set_exception(error)

    def _make_engine(self, model: PooledModel) -> Engine:
        max_bytes = self._max_bytes()
        if max_bytes is None:
            return self._load_engine(model)
        self._make_room(model, _estimate_bytes(model.spec), max_bytes)
        engine = self._load_engine(model)
        try:
            self._make_room(model, engine.memory_bytes, max_bytes)
        except BaseException:
            engine.close()
            raise
        return engine

    # Memory.

    def measure(self) -> None:
        """Note what each model takes now: caches grow with use."""
        with self.changed:
            engines = {model: model.open_engine for model in self._models.least_recently_used_first()}
        sizes = {model: engine.memory_bytes for model, engine in engines.items() if engine is not None}
        with self.changed:
            for model, size_bytes in sizes.items():
                if model.open_engine is engines[model]:
                    model.size_bytes = size_bytes

    def _max_bytes(self) -> int | None:
        is_limited = self._limits.max_model_memory is not None
        return self._limits.max_model_memory_bytes(device_memory_bytes()) if is_limited else None

    def _make_room(self, model: PooledModel, size_bytes: int, max_bytes: int) -> None:
        """Unload what was least recently used until a model that is being loaded fits, and keep its place free.

        Raises:
            ModelMemoryError: it can't be made to fit; nothing has changed.
        """
        self.measure()
        with self.changed:
            others = {other.model_id: other for other in self._models.least_recently_used_first() if other != model}
            occupants = [occupant for other in others.values() if (occupant := other.occupant()) is not None]
            occupants.sort(key=lambda occupant: not others[occupant.model_id].is_closing)  # these leave in any case
            chosen = choose_leaving(occupants, model.model_id, size_bytes, max_bytes)
            leaving = [others[occupant.model_id] for occupant in chosen]
            model.size_bytes = size_bytes
            closed_by_others = [other.pending for other in leaving if other.pending is not None]
            closings = {other: other.begin_closing() for other in leaving if other.pending is None}
        for other, closing in closings.items():
            self.unload(other, closing)
        wait(closed_by_others)

    # Closing.

    def unload(self, model: PooledModel, closing: Future[None]) -> None:
        """Close an engine of which that was said to begin, after its last request; an error is only logged."""
        if (error := self.close(model, closing, drain=True)) is not None:
            logger.warning("the model %s was unloaded with an error", model.model_id, exc_info=error)

    def close(self, model: PooledModel, closing: Future[None], *, drain: bool) -> Exception | None:
        """Close an engine of which that was said to begin, return its memory, and say so to all who wait.

        Args:
            model: the engine's model.
            closing: what `PooledModel.begin_closing` returned.
            drain: finish the requests under way; otherwise they fail.

        Returns:
            What the engine raised; it is gone in any case.
        """
        engine, model.engine = model.engine, None
        try:
            if engine is not None:
                if drain:
                    engine.close(drain=True)
                else:
                    engine.close()
            return None
        except Exception as exc:
            return exc
        finally:
            with self.changed:
                model.end(None)
                self.changed.notify_all()
            closing.set_result(None)


def _estimate_bytes(spec: ModelSpec) -> int:
    """What an engine will take, by the size of its files; those that aren't here yet count nothing."""
    from omlx_core.model.loading import estimate_size_bytes

    size_bytes = estimate_size_bytes(spec.model, spec.adapter_path) or 0
    return size_bytes if spec.draft_model is None else size_bytes + (estimate_size_bytes(spec.draft_model) or 0)


@dataclass(frozen=True, slots=True)
class _NotOpen:
    """What to wait for in place of an engine, and whether it is up to the caller to make it happen."""

    pending: Future[None]
    is_up_to_caller: bool
