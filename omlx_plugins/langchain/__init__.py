"""LangChain's adapter: `ChatOMLX`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omlx_plugins.extras import import_with_extra

if TYPE_CHECKING:
    from omlx_plugins.langchain.chat_model import ChatOMLX

__all__ = ["ChatOMLX"]


def __getattr__(name: str) -> Any:
    # Plugin discovery imports this package; LangChain comes in with the first use of the class.
    if name == "ChatOMLX":
        return import_with_extra("omlx_plugins.langchain.chat_model", name, extra="langchain", package="langchain_core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
