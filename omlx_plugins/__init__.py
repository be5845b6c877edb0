"""Adapters of the omlx engine for LangChain, LlamaIndex and whatever a plugin adds.

``import omlx_plugins`` and the search for plugins import neither MLX nor a framework.
"""

from __future__ import annotations

from omlx_plugins.hookspecs import hookimpl
from omlx_plugins.plugins import Adapter, PluginWarning, get_llm, list_adapters

__all__ = ["Adapter", "PluginWarning", "get_llm", "hookimpl", "list_adapters"]
