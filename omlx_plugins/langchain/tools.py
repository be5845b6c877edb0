"""Tools, and the choice of one, as LangChain's users write them, to the engine's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from omlx_core.errors import InvalidToolError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
"""What LangChain takes for a tool: a dictionary in one of several forms, a class, a function or a tool."""

_CHOICES = {"auto": "auto", "none": "none", "any": "required", "required": "required"}


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


def convert_tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str:
    """The engine's ``tool_choice``.

    Args:
        choice: None and False leave it to the model, True demands the only tool that there is; ``"auto"``, ``"none"``,
            ``"any"``, ``"required"``, a tool's name, or a dictionary in the form of OpenAI or Anthropic.
        tools: the tools, in OpenAI's form.

    Raises:
        InvalidToolError: it is none of these, or there is no such tool.
    """
    if choice is None or choice is False:
        return "auto"
    if choice is True:
        if len(tools) != 1:
            raise InvalidToolError(f"tool_choice=True with {len(tools)} tools: give the name of one, or 'any'")
        name: str = tools[0]["function"]["name"]
        return name
    named: Any = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = choice.get("name") or (function.get("name") if isinstance(function, Mapping) else choice.get("type"))
    if not isinstance(named, str) or not named:
        raise InvalidToolError(
            f"tool_choice={choice!r}: give 'auto', 'none', 'any', 'required', True, a tool's name, or "
            '{"type": "function", "function": {"name": …}}'
        )
    converted = _CHOICES.get(named, named)
    names = [tool["function"]["name"] for tool in tools if "function" in tool]
    if converted not in ("auto", "none", *names) and not (converted == "required" and names):
        raise InvalidToolError(
            f"tool_choice={choice!r} with the tools {names}: give the name of one of them, 'auto', 'none' or 'any'"
        )
    return converted
