"""Registers LlamaIndex's adapter."""

from __future__ import annotations

from omlx_plugins.hookspecs import RegisterAdapter, hookimpl


@hookimpl
def omlx_register_adapters(register: RegisterAdapter) -> None:
    """Register `OMLX`."""
    register("llama-index", "omlx_plugins.llama_index:OMLX", description="LlamaIndex LLM")
