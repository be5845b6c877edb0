"""The name ``omlx`` in LangChain's table of providers, for those who ask for it."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from omlx_core.errors import MissingDependencyError
from omlx_plugins.langchain.metadata import PROVIDER

_TABLE = "_BUILTIN_PROVIDERS"
_REMEDY = "make the model with omlx_plugins.langchain.ChatOMLX(model=…), which goes wherever its name would"


def register_provider() -> None:
    """Let ``init_chat_model("omlx:<model>")`` and ``create_agent("omlx:<model>", …)`` find `ChatOMLX`. Idempotent.

    LangChain has a fixed table of providers and no hook for others: this writes into that table, and so it happens only
    where it is called for.

    Raises:
        MissingDependencyError: ``langchain`` isn't installed, or has no such table any more.
    """
    try:
        base = importlib.import_module("langchain.chat_models.base")
    except ImportError as exc:
        raise MissingDependencyError(
            f"register_provider needs the package 'langchain', which can't be imported ({exc}): pip install langchain, "
            f"or {_REMEDY}"
        ) from exc
    table = getattr(base, _TABLE, None)
    if not isinstance(table, dict) or not table or not all(map(_is_entry, table.values())):
        raise MissingDependencyError(
            f"langchain {version('langchain')} has no table of providers that this version of omlx-plugins knows "
            f"(langchain.chat_models.base.{_TABLE}): {_REMEDY}"
        )
    table[PROVIDER] = ("omlx_plugins.langchain", "ChatOMLX", _make)


def _make(cls: Any, **options: Any) -> Any:
    return cls(**options)


def _is_entry(entry: Any) -> bool:
    match entry:
        case (str(), str(), create):
            return callable(create)
    return False
