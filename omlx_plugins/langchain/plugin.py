"""Registers LangChain's adapter."""

from __future__ import annotations

from omlx_plugins.hookspecs import RegisterAdapter, hookimpl


@hookimpl
def omlx_register_adapters(register: RegisterAdapter) -> None:
    """Register `ChatOMLX`."""
    register("langchain", "omlx_plugins.langchain:ChatOMLX", description="LangChain chat model")
