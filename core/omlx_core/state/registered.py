"""Handlers from outside this project: found by name, imported on first use, and held to what a handler must do.

A block that is wrong would be a wrong answer, on SSD for good. So what such a handler returns is checked, and copied
out of the layer that it was cut from; and what it is given is never the stored array itself, which it might change.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omlx_core.mlx_backend import mx

from omlx_core.errors import EngineError
from omlx_core.state.protocols import Arrays, CheckpointHandler, FetchRows, Handler, RowHandler
from omlx_core.state.registry import class_name, registered_handler

logger = logging.getLogger(__name__)

_found: dict[tuple[type, str], Handler | None] = {}


def find_registered_handler(leaf: Any) -> Handler | None:
    """The handler that was registered for a leaf's exact class, imported if need be.

    None if there is none, or it can't be had; then the log says why, once in a process.
    """
    target = registered_handler(type(leaf))
    if target is None:
        return None
    key = type(leaf), target
    if key not in _found:
        _found[key] = _load(leaf, target)
    return _found[key]


def _load(leaf: Any, target: str) -> Handler | None:
    name = class_name(type(leaf))
    try:
        handler = pkgutil.resolve_name(target)
        if isinstance(handler, type) or (callable(handler) and not _is_handler(handler)):
            handler = handler()
        if not _is_handler(handler):
            raise TypeError(
                f"a {type(handler).__name__} must have the methods of one kind of handler: it lacks "
                f"{_missing(handler, RowHandler)} of RowHandler and {_missing(handler, CheckpointHandler)} of "
                "CheckpointHandler"
            )
        handler.describe(leaf)
        if isinstance(handler, RowHandler):
            handler.window(leaf)
    except Exception as exc:  # whatever is wrong with it, the model can run
        logger.warning("the state handler %s of %s is left out: %s: %s", target, name, type(exc).__name__, exc)
        return None
    rules = _Rules(type(leaf), target)
    return _GuardedRows(handler, rules) if isinstance(handler, RowHandler) else _GuardedCheckpoints(handler, rules)


def _is_handler(value: Any) -> bool:
    """Whether it is one kind of handler, and not both: then nothing would say what its `restore` takes."""
    return isinstance(value, RowHandler) != isinstance(value, CheckpointHandler)


def _missing(value: Any, protocol: type) -> str:
    names = [name for name in vars(protocol) if not name.startswith("_") and not hasattr(value, name)]
    return ", ".join(names) or "nothing"


class _Rules:
    """What must be true of one registered handler's arguments and results.

    Args:
        cache_class: the class that it was registered for.
        target: its name.
    """

    def __init__(self, cache_class: type, target: str) -> None:
        self._cache_class = cache_class
        self._target = target

    def label(self, description: str) -> str:
        """A layout line: two handlers, or one for two classes, never share blocks."""
        return f"{description} [{class_name(self._cache_class)} by {self._target}]"

    @contextmanager
    def applied(self, method: str) -> Iterator[None]:
        """Name the handler in whatever goes wrong.

        Raises:
            EngineError: the method failed or broke a rule.
        """
        try:
            yield
        except Exception as exc:
            raise EngineError(
                f"the state handler {self._target} failed in {method}(): {type(exc).__name__}: {exc}; update or "
                "uninstall the package that it comes from"
            ) from exc

    def check_leaf(self, leaf: Any) -> None:
        """A batch may have made another class of it, one that keeps other things."""
        if type(leaf) is not self._cache_class:
            raise TypeError(f"a {class_name(type(leaf))} came in place of a {class_name(self._cache_class)}")

    def check_restored(self, leaf: Any, *, is_empty: bool = False) -> None:
        """An empty leaf would pass for a layer that the model never fills."""
        self.check_leaf(leaf)
        if leaf.empty() != is_empty:
            raise ValueError(f"it restored a cache that is {'not ' if is_empty else ''}empty")

    def captured(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Copies of what is to be stored; a block's tensors are named ``<path>.<member>``."""
        if not arrays:
            raise ValueError("it returned no arrays for a cache that isn't empty")
        for name in arrays:
            if not name or "." in name:
                raise ValueError(f"the array name {name!r} is empty or has a dot")
        return {name: mx.contiguous(array) for name, array in arrays.items()}

    def lent(self, arrays: Arrays) -> dict[str, mx.array]:
        """What is stored, as arrays whose changes don't reach it: MLX copies a shared buffer before it writes."""
        return {name: mx.contiguous(array) for name, array in arrays.items()}


class _GuardedRows:
    """A `RowHandler` under the rules."""

    def __init__(self, handler: RowHandler, rules: _Rules) -> None:
        self._handler = handler
        self._rules = rules

    def describe(self, leaf: Any) -> str:
        with self._rules.applied("describe"):
            return self._rules.label(self._handler.describe(leaf))

    def num_tokens(self, leaf: Any) -> int:
        with self._rules.applied("num_tokens"):
            return int(self._handler.num_tokens(leaf))

    def window(self, leaf: Any) -> int | None:
        with self._rules.applied("window"):
            window = self._handler.window(leaf)
            return None if window is None else int(window)

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        with self._rules.applied("rows"):
            self._rules.check_leaf(leaf)
            rows = self._handler.rows(leaf, start, stop)
            if rows is None:
                if self._handler.window(leaf) is None:
                    raise ValueError(f"tokens {start} to {stop} are gone from a cache without a window")
                return None
            for name, array in rows.items():
                if array.ndim != 4 or array.shape[0] != 1 or array.shape[2] != stop - start:
                    raise ValueError(f"{name} has the shape {array.shape}, not [1, heads, {stop - start} tokens, size]")
            return self._rules.captured(rows)

    def needed(self, leaf: Any, num_tokens: int) -> list[tuple[int, int]]:
        with self._rules.applied("needed"):
            return list(self._handler.needed(leaf, num_tokens))

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        def lend(start: int, stop: int) -> list[Arrays]:
            return [self._rules.lent(piece) for piece in fetch(start, stop)]

        with self._rules.applied("restore"):
            restored = self._handler.restore(leaf, lend, num_tokens, capacity)
            self._rules.check_restored(restored)
            return restored


class _GuardedCheckpoints:
    """A `CheckpointHandler` under the rules."""

    def __init__(self, handler: CheckpointHandler, rules: _Rules) -> None:
        self._handler = handler
        self._rules = rules

    def describe(self, leaf: Any) -> str:
        with self._rules.applied("describe"):
            return self._rules.label(self._handler.describe(leaf))

    def checkpoint(self, leaf: Any) -> dict[str, mx.array]:
        with self._rules.applied("checkpoint"):
            self._rules.check_leaf(leaf)
            return {} if leaf.empty() else self._rules.captured(self._handler.checkpoint(leaf))

    def restore(self, leaf: Any, arrays: Arrays) -> Any:
        with self._rules.applied("restore"):
            restored = self._handler.restore(leaf, self._rules.lent(arrays))
            self._rules.check_restored(restored, is_empty=not arrays)
            return restored
