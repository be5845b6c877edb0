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


def convert_tool_choice(choice: Any) -> str:
    """The engine's ``tool_choice``.

    Args:
        choice: None and False leave it to the model, True is ``"any"``; ``"auto"``, ``"none"``, ``"any"``,
            ``"required"``, a tool's name, or a dictionary in the form of OpenAI or Anthropic.

    Raises:
        InvalidToolError: it is none of these.
    """
    if choice is None or choice is False:
        return "auto"
    if choice is True:
        return "required"
    name = choice
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = choice.get("name") or (function.get("name") if isinstance(function, Mapping) else choice.get("type"))
    if not isinstance(name, str) or not name:
        raise InvalidToolError(
            f"tool_choice={choice!r}: give 'auto', 'none', 'any', 'required', True, a tool's name, or "
            '{"type": "function", "function": {"name": …}}'
        )
    return _CHOICES.get(name, name)
