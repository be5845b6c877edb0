"""A pool's list of models: what each is made from, by which ids it is known, and in what order they were used.

Nothing here locks or waits; the pool does.
"""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omlx_core.engine.pool_memory import Occupant
from omlx_core.errors import InvalidSettingError, UnknownModelError
from omlx_core.settings import CacheSettings, EngineSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What an engine is made from; equal ones share an engine.

    Attributes:
        model: an absolute path, or a repository id.
        adapter_path: a folder with LoRA weights.
        draft_model: the smaller model that proposes tokens to it, as `model`.
        cache: how prefixes are cached.
        settings: how requests are run.
    """

    model: str
    adapter_path: str | None
    draft_model: str | None
    cache: CacheSettings
    settings: EngineSettings


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model of a pool at one moment.

    Attributes:
        model_id: its id.
        spec: what its engine is made from.
        is_loaded: whether its engine takes requests.
        is_pinned: whether it stays loaded until someone unloads it by name.
        size_bytes: its weights and what its cache holds in RAM; 0 while it isn't loaded.
        num_active_requests: requests that wait in line or are answered.
        num_leases: how many use it or wait for it to be loaded.
        idle_s: seconds since it was last asked for or given back; None while it isn't loaded.
    """

    model_id: str
    spec: ModelSpec
    is_loaded: bool
    is_pinned: bool
    size_bytes: int
    num_active_requests: int
    num_leases: int
    idle_s: float | None


@dataclass(eq=False, slots=True)
class PooledModel:
    """The record of one model.

    Attributes:
        model_id: the first id that it was given.
        spec: what its engine is made from.
        is_pinned: whether it stays loaded until someone unloads it by name.
        engine: its engine, from when it is loaded until it is being closed.
        pending: done when what is under way is, loading or closing.
        is_closing: which of them.
        num_leases: how many use it or wait for it.
        size_bytes: bytes of memory that it took at the last look; while it is loaded, what it is expected to take.
        last_used_s: when it was last asked for or given back, by the pool's clock.
    """

    model_id: str
    spec: ModelSpec
    is_pinned: bool = False
    engine: Engine | None = None
    pending: Future[None] | None = None
    is_closing: bool = False
    num_leases: int = 0
    size_bytes: int = 0
    last_used_s: float = 0.0

    @property
    def open_engine(self) -> Engine | None:
        """The engine, if it takes requests: whoever it was given to may have closed it."""
        engine = self.engine
        return None if engine is None or self.pending is not None or engine.is_closed else engine

    @property
    def is_in_use(self) -> bool:
        """Whether someone leases it, waits for it, or has requests under way."""
        engine = self.open_engine
        return self.num_leases > 0 or (engine is not None and engine.num_active_requests > 0)

    def begin_loading(self) -> Future[None]:
        """Say that it is being loaded."""
        self.engine = None  # one that was closed from outside
        return self._begin(is_closing=False)

    def begin_closing(self) -> Future[None]:
        """Say that its engine is being closed."""
        return self._begin(is_closing=True)

    def end(self, engine: Engine | None) -> None:
        """Say how it ended: with an engine or without one."""
        self.engine, self.pending, self.is_closing = engine, None, False

    def occupant(self) -> Occupant | None:
        """What it takes of the pool's memory, if anything."""
        obstacle = None
        if self.pending is None:
            if self.open_engine is None:
                return None
            obstacle = "pinned" if self.is_pinned else "in use" if self.is_in_use else None
        elif not self.is_closing:
            obstacle = "being loaded"
        return Occupant(self.model_id, self.size_bytes, obstacle)

    def status(self, model_id: str, now_s: float) -> ModelStatus:
        """What its users are told, under one of its ids."""
        engine = self.open_engine
        return ModelStatus(
            model_id=model_id,
            spec=self.spec,
            is_loaded=engine is not None,
            is_pinned=self.is_pinned,
            size_bytes=0 if engine is None else self.size_bytes,
            num_active_requests=0 if engine is None else engine.num_active_requests,
            num_leases=self.num_leases,
            idle_s=None if engine is None else now_s - self.last_used_s,
        )

    def _begin(self, *, is_closing: bool) -> Future[None]:
        self.is_closing = is_closing
        self.pending = Future()
        self.pending.set_running_or_notify_cancel()  # from now on no coroutine that waits for it can cancel it
        return self.pending


class ModelList:
    """Models by id and by what they are made from.

    Args:
        cache: of models that come without; None reads the environment each time.
        settings: likewise.
    """

    def __init__(self, cache: CacheSettings | None, settings: EngineSettings | None) -> None:
        self._cache = cache
        self._settings = settings
        self._by_use: OrderedDict[ModelSpec, PooledModel] = OrderedDict()
        self._by_id: dict[str, PooledModel] = {}
        self._added_ids: set[str] = set()

    def describe(
        self,
        path_or_repo: str | os.PathLike[str],
        adapter_path: str | os.PathLike[str] | None,
        draft_model: str | os.PathLike[str] | None,
        cache: CacheSettings | None,
        settings: EngineSettings | None,
    ) -> ModelSpec:
        """What an engine is made from; a relative path and a link are the same model as what they lead to."""
        return ModelSpec(
            model=_resolved(path_or_repo),
            adapter_path=None if adapter_path is None else _resolved(adapter_path),
            draft_model=None if draft_model is None else _resolved(draft_model),
            cache=cache or self._cache or CacheSettings(),
            settings=settings or self._settings or EngineSettings(),
        )

    def add(self, model_id: str, spec: ModelSpec) -> PooledModel:
        """Give a model an id of its user's.

        Raises:
            InvalidSettingError: the id stands for something else already.
        """
        known = self._by_id.get(model_id)
        if known is not None and known.spec != spec:
            raise InvalidSettingError(
                f"model_id={model_id!r} stands for {known.spec.model!r} already, with an adapter, a draft model or "
                "settings of its own: choose another id"
            )
        self._added_ids.add(model_id)
        return self._record(model_id, spec)

    def added_spec(self, model_id: str) -> ModelSpec | None:
        """What a user's id stands for; None if it isn't one."""
        return self._by_id[model_id].spec if model_id in self._added_ids else None

    def find_or_name(self, spec: ModelSpec) -> PooledModel:
        """A model by what it is made from; a new one is named by its path or repository, with a number if need be."""
        if (known := self._by_use.get(spec)) is not None:
            return known
        number, model_id = 1, spec.model
        while model_id in self._by_id:
            number += 1
            model_id = f"{spec.model}#{number}"
        return self._record(model_id, spec)

    def find(self, model_id: str) -> PooledModel:
        """A model by its id.

        Raises:
            UnknownModelError: there is no such id.
        """
        if (known := self._by_id.get(model_id)) is not None:
            return known
        close = difflib.get_close_matches(model_id, self._by_id, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        ids = ", ".join(self._by_id) or "none yet"
        raise UnknownModelError(f"there is no model {model_id!r} in this pool: {hint}its models are {ids}")

    def items(self) -> list[tuple[str, PooledModel]]:
        """Every id and its model, in the order in which the ids were given."""
        return list(self._by_id.items())

    def least_recently_used_first(self) -> list[PooledModel]:
        """Every model."""
        return list(self._by_use.values())

    def used(self, model: PooledModel, now_s: float) -> None:
        """Say that a model is used now."""
        model.last_used_s = now_s
        self._by_use.move_to_end(model.spec)

    def _record(self, model_id: str, spec: ModelSpec) -> PooledModel:
        model = self._by_use.setdefault(spec, PooledModel(model_id, spec))
        self._by_id.setdefault(model_id, model)
        return model


def _resolved(path_or_repo: str | os.PathLike[str]) -> str:
    """The absolute path of what exists; anything else is a repository id or an error of the loader's."""
    path = Path(path_or_repo).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(path_or_repo)
