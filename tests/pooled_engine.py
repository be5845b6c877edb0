"""An engine without a model, for tests of what opens and closes engines."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from omlx_core.engine.pool_models import ModelSpec

TIMEOUT_S = 30


class PooledEngine:
    """Has a size and can be closed.

    `closings` says for each call of `close` whether it should drain; while `may_close` is cleared, closing waits, and
    `close_error` is what it raises in the end.
    """

    def __init__(self, memory_bytes: int = 0) -> None:
        self.memory_bytes = memory_bytes
        self.num_active_requests = 0
        self.is_closed = False
        self.closings: list[bool] = []
        self.is_closing = threading.Event()
        self.may_close = threading.Event()
        self.may_close.set()
        self.close_error: Exception | None = None

    def close(self, *, drain: bool = False) -> None:
        self.closings.append(drain)
        self.is_closing.set()
        assert self.may_close.wait(TIMEOUT_S)
        self.is_closed = True
        if self.close_error is not None:
            raise self.close_error


class Loader:
    """Makes engines for a pool.

    `specs` and `engines` are what was loaded; `sizes` says how large by the model's name, and `failures` are raised
    first. A model on `hold` is loaded once its gate is set.
    """

    def __init__(self) -> None:
        self.specs: list[ModelSpec] = []
        self.engines: list[PooledEngine] = []
        self.sizes: dict[str, int] = {}
        self.failures: list[BaseException] = []
        self._held: dict[str, tuple[threading.Event, threading.Event]] = {}

    def hold(self, model: str) -> tuple[threading.Event, threading.Event]:
        """Two events: a load of that model has begun, and may end."""
        self._held[model] = threading.Event(), threading.Event()
        return self._held[model]

    def __call__(self, spec: ModelSpec, on_progress: Any) -> PooledEngine:
        name = spec.model.rpartition("/")[2]
        self.specs.append(spec)
        if name in self._held:
            has_begun, may_end = self._held[name]
            has_begun.set()
            assert may_end.wait(TIMEOUT_S)
        if self.failures:
            raise self.failures.pop(0)
        self.engines.append(PooledEngine(self.sizes.get(name, 0)))
        return self.engines[-1]

    @property
    def names(self) -> Sequence[str]:
        return [spec.model.rpartition("/")[2] for spec in self.specs]
