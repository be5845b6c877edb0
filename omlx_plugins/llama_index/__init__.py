"""LlamaIndex's adapter: `OMLX`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omlx_plugins.extras import import_with_extra

if TYPE_CHECKING:
    from omlx_plugins.llama_index.llm import OMLX

__all__ = ["OMLX"]


def __getattr__(name: str) -> Any:
    # Plugin discovery imports this package; LlamaIndex comes in with the first use of the class.
    if name == "OMLX":
        return import_with_extra("omlx_plugins.llama_index.llm", name, extra="llama-index", package="llama_index")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
