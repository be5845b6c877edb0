"""For LangChain: `CacheAwareReorder`, a document transformer, and a compressor for retrievers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omlx_plugins.extras import import_with_extra

if TYPE_CHECKING:
    from omlx_plugins.rag.langchain_reorder import CacheAwareReorder

__all__ = ["CacheAwareReorder"]


def __getattr__(name: str) -> Any:
    if name == "CacheAwareReorder":
        module = "omlx_plugins.rag.langchain_reorder"
        return import_with_extra(module, name, extra="langchain", package="langchain_core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
