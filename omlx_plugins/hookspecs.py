"""The hooks that a plugin may implement.

A plugin is a module (or an object) that an entry point of the group ``omlx`` names. Hooks may gain arguments;
an implementation takes those that it wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from omlx_core.cache.events import CacheEvent

hookspec = pluggy.HookspecMarker("omlx")
hookimpl = pluggy.HookimplMarker("omlx")


class RegisterAdapter(Protocol):
    """What `omlx_register_adapters` calls, once for each adapter."""

    def __call__(self, name: str, target: str, *, description: str = "") -> None:
        """Register ``"package.module:attribute"`` under a name; it is imported on first use."""


@hookspec
def omlx_register_adapters(register: RegisterAdapter) -> None:
    """Register the language model classes of a framework.

    The target is what `omlx_plugins.get_llm` calls with the user's keyword arguments. Keep the framework's import
    out of the plugin's own module: every process that lists the adapters imports that one.
    """


class RegisterStateHandler(Protocol):
    """What `omlx_register_state_handlers` calls, once for each cache class."""

    def __call__(self, cache_class: str, handler: str) -> None:
        """Register ``"package.module:attribute"`` for ``"package.module:Class"``; see `register_state_handler`."""


@hookspec
def omlx_register_state_handlers(register: RegisterStateHandler) -> None:
    """Teach the prefix cache classes of layer caches that mlx-lm doesn't have.

    The handler, a `RowHandler` or a `CheckpointHandler` of `omlx_core.state.protocols` or what makes one, is imported
    when an adapter opens a model with such a cache. A class that is built in can't be registered; of two plugins that
    register one class, the first by name counts.
    """


@hookspec
def omlx_cache_event(event: CacheEvent) -> None:
    """Hear of a hit, a miss, or blocks stored, written, read, evicted or found corrupt, of every adapter's engine.

    Called on a thread of its own, in order. What it raises is logged.
    """
