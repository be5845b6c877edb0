"""LangChain's adapter.

`ChatOMLX` is the chat model, `OMLX` the completion model; `OMLXCacheCallback` adds up what the cache did, and
`register_provider` makes ``init_chat_model("omlx:…")`` work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omlx_plugins.extras import import_with_extra

if TYPE_CHECKING:
    from omlx_plugins.langchain.callback import CacheUse, OMLXCacheCallback
    from omlx_plugins.langchain.chat_model import ChatOMLX
    from omlx_plugins.langchain.llm import OMLX
    from omlx_plugins.langchain.provider import register_provider

__all__ = ["OMLX", "CacheUse", "ChatOMLX", "OMLXCacheCallback", "register_provider"]

_MODULES = {
    "OMLX": "llm",
    "CacheUse": "callback",
    "ChatOMLX": "chat_model",
    "OMLXCacheCallback": "callback",
    "register_provider": "provider",
}


def __getattr__(name: str) -> Any:
    # Plugin discovery imports this package; LangChain comes in with the first use of what needs it.
    if name in _MODULES:
        module = f"omlx_plugins.langchain.{_MODULES[name]}"
        return import_with_extra(module, name, extra="langchain", package="langchain_core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
