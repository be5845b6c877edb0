"""Which handler cuts which cache class into blocks, where it isn't one of mlx-lm's: names only.

Registering imports nothing, MLX included, so that it may happen wherever a program or a plugin begins. The handler is
imported when a model with such a cache is opened; see `omlx_core.state.protocols` for what it must be.
"""

from __future__ import annotations

import re

from omlx_core.errors import InvalidSettingError

BUILT_IN_CLASSES = frozenset(
    f"mlx_lm.models.cache:{name}"
    for name in ("KVCache", "RotatingKVCache", "ChunkedKVCache", "ArraysCache", "CacheList")
)
"""Classes that the engine cuts itself."""

_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_NAME = re.compile(f"{_DOTTED}:{_DOTTED}")

_handlers: dict[str, str] = {}


def register_state_handler(cache_class: str, handler: str) -> str:
    """Have a class of layer caches, which would not be cached otherwise, cut into blocks by a handler.

    Counts for models that are opened afterwards, in this process. The first registration of a class counts; further
    ones change nothing. Any thread may call it.

    Args:
        cache_class: ``"package.module:Class"``, where the class is defined. It is the exact class: a subclass of it
            may keep more, and needs a registration of its own.
        handler: ``"package.module:attribute"``: a `RowHandler` or a `CheckpointHandler`, or a class or function that
            makes one without arguments. If it can't be had, the model runs uncached, and the log says why.

    Returns:
        The handler that counts, which is another one if the class was registered before.

    Raises:
        InvalidSettingError: a name is not of that form, or the class is built in.
    """
    check_state_handler(cache_class, handler)
    return _handlers.setdefault(cache_class, handler)


def check_state_handler(cache_class: str, handler: str) -> None:
    """Refuse what `register_state_handler` would refuse.

    Raises:
        InvalidSettingError: a name is not of the form ``"package.module:attribute"``, or the class is built in.
    """
    for role, name in (("cache class", cache_class), ("state handler", handler)):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidSettingError(f"the {role} {name!r} is not of the form 'package.module:attribute'")
    if cache_class in BUILT_IN_CLASSES:
        raise InvalidSettingError(
            f"the handler of {cache_class} is built in and can't be replaced by {handler}: give the model a subclass "
            "of it, and register that"
        )


def registered_handler(cache_class: type) -> str | None:
    """The name of the handler that was registered for exactly this class."""
    return _handlers.get(class_name(cache_class))


def class_name(cache_class: type) -> str:
    """The name that a class is registered by."""
    return f"{cache_class.__module__}:{cache_class.__qualname__}"
