"""Tools, the choice of one, and calls: LlamaIndex's to the engine's and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from omlx_core.errors import InvalidToolError
from omlx_plugins.tool_choice import convert_tool_choice

AnyTool = BaseTool | Mapping[str, Any]
"""A tool of LlamaIndex's, or a dictionary in OpenAI's form."""


def convert_tools(tools: Sequence[AnyTool]) -> list[dict[str, Any]]:
    """Tools in OpenAI's form.

    Raises:
        InvalidToolError: one of them is none.
    """
    return [_convert_tool(tool, position) for position, tool in enumerate(tools)]


def convert_options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's options for a call's keywords; a name that it doesn't know is left for it to refuse.

    Args:
        keywords: the engine's options, with ``tools`` and ``tool_choice`` in any form that LlamaIndex's users write.

    Raises:
        InvalidToolError: what should be a tool, or a choice, isn't one.
    """
    options = dict(keywords)
    if options.get("tools") is not None:
        options["tools"] = convert_tools(options["tools"])
    if "tool_choice" in options:
        options["tool_choice"] = convert_tool_choice(options["tool_choice"], _names(options.get("tools") or ()))
    return options


def tool_selections(message: ChatMessage) -> list[ToolSelection]:
    """The calls in a message's blocks; arguments that aren't a JSON object are none."""
    return [
        ToolSelection(
            tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block.tool_kwargs)
        )
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]


def _convert_tool(tool: Any, position: int) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if isinstance(tool, BaseTool):
        return tool.metadata.to_openai_tool(skip_length_check=True)
    raise InvalidToolError(
        f"tools[{position}]={tool!r} is no tool: give FunctionTool.from_defaults(…) or another of LlamaIndex's tools, "
        "or a dictionary in OpenAI's form"
    )


def _names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    functions = [tool.get("function", tool) for tool in tools]
    return [function["name"] for function in functions if isinstance(function, Mapping) and "name" in function]


def _arguments(arguments: dict[str, Any] | str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return {}
