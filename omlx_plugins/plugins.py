"""Finding plugins, and the adapters and state handlers that they register.

One broken plugin must not take the others down: each is imported, checked and called on its own, and what fails is
named in a `PluginWarning` and left out. (`pluggy.PluginManager.load_setuptools_entrypoints` stops at the first.)
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import threading
import warnings
import weakref
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from omlx_core.errors import MissingDependencyError, UnknownPluginError
from omlx_core.state.registry import check_state_handler, register_state_handler
from omlx_plugins import hookspecs

if TYPE_CHECKING:
    from omlx_core import Engine
    from omlx_core.cache.events import CacheEvent, Listener

ENTRY_POINT_GROUP = "omlx"

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class PluginWarning(UserWarning):
    """A plugin, or an adapter or a state handler of one, was left out."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A language model class that `get_llm` can make.

    Attributes:
        name: what `get_llm` finds it by.
        target: ``"package.module:attribute"``, imported on first use.
        description: one line for people.
        plugin: the entry point that registered it.
    """

    name: str
    target: str
    description: str
    plugin: str

    def load(self) -> Any:
        """Import the target.

        Raises:
            MissingDependencyError: a package that it imports isn't installed.
            UnknownPluginError: its module has no such attribute.
        """
        module_name, _, attribute = self.target.partition(":")
        try:
            module = importlib.import_module(module_name)
            return getattr(module, attribute)
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(
                f"the adapter {self.name!r} ({self.target}) needs the module {exc.name!r}, which isn't installed: "
                f"install what the plugin {self.plugin!r} requires"
            ) from exc
        except AttributeError as exc:
            raise UnknownPluginError(
                f"the plugin {self.plugin!r} registered {self.target!r} as {self.name!r}, which doesn't exist "
                f"({exc}): update that plugin or uninstall it"
            ) from exc


def list_adapters() -> list[Adapter]:
    """Every registered adapter, by name. The search runs once in a process and imports no framework."""
    return sorted(_discover().adapters.values(), key=lambda adapter: adapter.name)


def get_llm(adapter: str, **kwargs: Any) -> Any:
    """Make a framework's language model: ``get_llm("langchain", model="path or repo id", temperature=0.7)``.

    Args:
        adapter: a name from `list_adapters`.
        **kwargs: for the adapter's class: `model` and what else it documents.

    Raises:
        UnknownPluginError: no adapter has that name.
        MissingDependencyError: the framework isn't installed.
    """
    adapters = _discover().adapters
    if adapter not in adapters:
        close = difflib.get_close_matches(adapter, adapters, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(adapters)) or "none, because no plugin is installed"
        raise UnknownPluginError(f"there is no adapter {adapter!r}: {hint}there are {known}")
    return adapters[adapter].load()(**kwargs)


def forward_cache_events(engine: Engine) -> None:
    """Have every plugin that implements `omlx_cache_event` hear of an engine's events; once, however often called."""
    with _forwarded_lock:
        if engine in _forwarded:
            return
        _forwarded.add(engine)
    for listener in _discover().listeners:
        engine.cache.subscribe(listener)


@functools.cache
def register_state_handlers() -> None:
    """Tell the engine of every plugin's state handlers; to be called before an engine is made, once is enough."""
    for handler in _discover().state_handlers.values():
        first = register_state_handler(handler.cache_class, handler.target)
        if first != handler.target:
            _warn(_taken_message(handler, first))


@dataclass(frozen=True, slots=True)
class _StateHandler:
    cache_class: str
    target: str
    plugin: str


@dataclass(frozen=True, slots=True)
class _Discovery:
    adapters: dict[str, Adapter]
    state_handlers: dict[str, _StateHandler]
    listeners: list[Listener]


_forwarded: weakref.WeakSet[Engine] = weakref.WeakSet()
_forwarded_lock = threading.Lock()


@functools.cache
def _discover() -> _Discovery:
    """What all entry points register.

    Of two adapters of one name the first counts: this distribution's own, then in the order of the plugins' names,
    so that installing a plugin never replaces a built-in and the outcome doesn't depend on the file system. The same
    goes for state handlers of one class.
    """
    adapters: dict[str, Adapter] = {}
    state_handlers: dict[str, _StateHandler] = {}
    listeners: list[Listener] = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=_discovery_order):
        plugin = _plugin_name(entry_point)
        try:
            hooks = _load_hooks(entry_point, plugin)
            registered = _registered_adapters(hooks, plugin)
            handlers = _registered_state_handlers(hooks, plugin)
        except Exception as exc:
            reason = " ".join(f"{type(exc).__name__}: {exc}".split())
            _warn(f"the plugin {plugin!r} ({entry_point.value}) is left out: {reason}")
            continue
        if hooks.omlx_cache_event.get_hookimpls():
            listeners.append(functools.partial(_tell, hooks))
        for adapter in registered:
            first = adapters.setdefault(adapter.name, adapter)
            if first is not adapter:
                _warn(
                    f"the adapter {adapter.name!r} of the plugin {plugin!r} is left out: {first.plugin!r} "
                    "registered that name first"
                )
        for handler in handlers:
            taken_by = state_handlers.setdefault(handler.cache_class, handler)
            if taken_by.target != handler.target:
                _warn(_taken_message(handler, f"{taken_by.target} of {taken_by.plugin!r}"))
    return _Discovery(adapters, state_handlers, listeners)


def _load_hooks(entry_point: EntryPoint, plugin: str) -> pluggy.HookRelay:
    """Import one plugin and check its hooks."""
    manager = pluggy.PluginManager("omlx")  # of its own: `check_pending` and the call then concern this plugin only
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), plugin)
    manager.check_pending()  # without it, pluggy passes over a misspelled hook in silence
    return manager.hook


def _tell(hooks: pluggy.HookRelay, event: CacheEvent) -> None:
    hooks.omlx_cache_event(event=event)


def _registered_adapters(hooks: pluggy.HookRelay, plugin: str) -> list[Adapter]:
    """Call a plugin for its adapters; nothing of one that fails on the way remains."""
    adapters: list[Adapter] = []

    def register(name: str, target: str, *, description: str = "") -> None:
        if not _TARGET.fullmatch(target):
            raise ValueError(f"the target {target!r} of {name!r} is not of the form 'package.module:attribute'")
        adapters.append(Adapter(name, target, description, plugin))

    hooks.omlx_register_adapters(register=register)
    return adapters


def _registered_state_handlers(hooks: pluggy.HookRelay, plugin: str) -> list[_StateHandler]:
    """Call a plugin for its state handlers; nothing of one that fails on the way remains."""
    handlers: list[_StateHandler] = []

    def register(cache_class: str, handler: str) -> None:
        check_state_handler(cache_class, handler)
        handlers.append(_StateHandler(cache_class, handler, plugin))

    hooks.omlx_register_state_handlers(register=register)
    return handlers


def _plugin_name(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist.name if entry_point.dist else "unknown distribution"
    return f"{distribution}: {entry_point.name}"


def _discovery_order(entry_point: EntryPoint) -> tuple[bool, str]:
    return entry_point.module.partition(".")[0] != __package__, _plugin_name(entry_point)


def _taken_message(handler: _StateHandler, first: str) -> str:
    return (
        f"the state handler {handler.target} of the plugin {handler.plugin!r} is left out: {first} was registered for "
        f"{handler.cache_class} first"
    )


def _warn(message: str) -> None:
    warnings.warn(message, PluginWarning, stacklevel=4)
