"""Tools, as LangChain's users write them, in the engine's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from omlx_core.errors import InvalidToolError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
"""What LangChain takes for a tool: a dictionary in one of several forms, a class, a function or a tool."""


def convert_tools(tools: Sequence[AnyTool], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form.

    Args:
        tools: LangChain's, pydantic classes, functions, typed dictionaries, or dictionaries in the form of OpenAI,
            Anthropic or JSON schema.
        strict: enforce all of each schema in forced calls, and refuse one that can't be.

    Raises:
        InvalidToolError: one of them is none.
    """
    converted = []
    for position, tool in enumerate(tools):
        try:
            converted.append(convert_to_openai_tool(tool, strict=strict))
        except (TypeError, ValueError) as exc:
            raise InvalidToolError(
                f"tools[{position}]={tool!r} is no tool ({exc}): give a tool, a function with a docstring, a pydantic "
                "class or a dictionary in OpenAI's form"
            ) from exc
    return converted


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of tools in OpenAI's form; what isn't in it has none."""
    return [tool["function"]["name"] for tool in tools if "function" in tool]
