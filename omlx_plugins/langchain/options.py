"""A call's keywords, as LangChain's users and agents pass them, to the engine's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omlx_plugins.langchain.response_format import convert_response_format
from omlx_plugins.langchain.tools import convert_tools, tool_names
from omlx_plugins.tool_choice import convert_tool_choice

# LangChain's own switch for streaming reaches the model.
_NOT_FOR_THE_ENGINE = ("stream",)


def convert_options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's options for a call's keywords; a name that it doesn't know is left for it to refuse.

    Args:
        keywords: the engine's options, and ``tools``, ``tool_choice`` and ``response_format`` in any form that
            LangChain's users write.

    Raises:
        InvalidToolError: what should be a tool, or a choice, isn't one.
        InvalidConstraintError: the ``response_format`` is none.
    """
    options = {name: value for name, value in keywords.items() if name not in _NOT_FOR_THE_ENGINE}
    if options.get("tools") is not None:
        options["tools"] = convert_tools(options["tools"])
    if "tool_choice" in options:
        options["tool_choice"] = convert_tool_choice(options["tool_choice"], tool_names(options.get("tools") or ()))
    if options.get("parallel_tool_calls", 0) is None:
        del options["parallel_tool_calls"]
    response_format = options.pop("response_format", None)
    if response_format is not None:
        constraint = convert_response_format(response_format)
        if constraint is not None:
            options["constraint"] = constraint
    return options
