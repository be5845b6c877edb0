"""The choice of a tool, as the frameworks' users write it, to the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omlx_core.errors import InvalidToolError

_CHOICES = {"auto": "auto", "none": "none", "any": "required", "required": "required"}


def convert_tool_choice(choice: Any, names: Sequence[str]) -> str:
    """The engine's ``tool_choice``.

    Args:
        choice: None and False leave it to the model, True demands the only tool that there is; ``"auto"``, ``"none"``,
            ``"any"``, ``"required"``, a tool's name, or a dictionary in the form of OpenAI or Anthropic.
        names: the names of the tools that there are.

    Raises:
        InvalidToolError: it is none of these, or there is no such tool.
    """
    if choice is None or choice is False:
        return "auto"
    if choice is True:
        if len(names) != 1:
            raise InvalidToolError(f"tool_choice=True with {len(names)} tools: give the name of one, or 'any'")
        return names[0]
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
    if converted not in ("auto", "none", *names) and not (converted == "required" and names):
        raise InvalidToolError(
            f"tool_choice={choice!r} with the tools {list(names)}: give the name of one of them, 'auto', 'none' or "
            "'any'"
        )
    return converted
