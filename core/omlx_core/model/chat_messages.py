"""Messages and tools as callers write them: checked, and brought into the one shape that chat templates get."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omlx_core.errors import InvalidPromptError, InvalidToolError
from omlx_core.model.tool_calls import Tool

ROLES = ("system", "user", "assistant", "tool")
"""The roles that any template is given; what else it takes is its own."""

_TOOL_SHAPE = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
_CALL_SHAPE = '{"type": "function", "id": …, "function": {"name": …, "arguments": {…}}}'


def check_messages(messages: Sequence[Any], is_known_role: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Messages for a template: text as content, calls with a dictionary of arguments, results with their tool's name.

    Args:
        messages: OpenAI's form. A message's content is text or a list of text parts, and may be missing beside
            `tool_calls`; a call's arguments are a dictionary or JSON text. Other keys are left as they are.
        is_known_role: whether the template takes a role beyond `ROLES`.

    Returns:
        New dictionaries; the caller's are never changed.

    Raises:
        InvalidPromptError: with the position of the message, what is wrong with it, and what to give instead.
    """
    checked = []
    called: dict[str, str] = {}  # ids of the calls so far, to the names of their tools
    for position, message in enumerate(messages):
        where = f"prompt[{position}]"
        if not isinstance(message, Mapping):
            raise InvalidPromptError(f"{where}={message!r} is not a message: give 'role' and 'content'")
        plain = {key: value for key, value in message.items() if value is not None}
        role = _check_role(plain, where, is_known_role)
        calls = _check_calls(plain.pop("tool_calls", []), role, where)
        plain["content"] = _check_content(plain, where, may_be_missing=bool(calls))
        if calls:
            plain["tool_calls"] = calls
            called |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        if role == "tool":
            _check_result(plain, where, called)
        checked.append(plain)
    return checked


def with_user_turn(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """A chat of system messages only, with an empty turn of the user, which some templates want; others as they are."""
    if all(message.get("role") == "system" for message in messages):
        return [*messages, {"role": "user", "content": ""}]
    return messages


def check_tools(tools: Sequence[Any]) -> list[Tool]:
    """Tools in OpenAI's form, with parameters.

    Args:
        tools: OpenAI's form, or the function in it alone.

    Raises:
        InvalidToolError: with the tool's position, what is wrong with it, and what to give instead.
    """
    checked: list[Tool] = []
    names: set[str] = set()
    for position, tool in enumerate(tools):
        where = f"tools[{position}]"
        function = _function_of(tool, where)
        if function["name"] in names:
            raise InvalidToolError(f"{where} is the second of the name {function['name']!r}: give each its own")
        names.add(function["name"])
        checked.append({"type": "function", "function": function})
    return checked


def _check_role(message: Mapping[str, Any], where: str, is_known_role: Callable[[str], bool]) -> str:
    if "role" not in message:
        raise InvalidPromptError(f"{where}={dict(message)!r} has no 'role': give one of {', '.join(ROLES)}")
    role = message["role"]
    if not isinstance(role, str) or (role not in ROLES and not is_known_role(role)):
        raise InvalidPromptError(
            f"{where}['role']={role!r} is none that this model's template knows: give one of {', '.join(ROLES)}"
        )
    return role


def _check_content(message: Mapping[str, Any], where: str, *, may_be_missing: bool) -> str:
    content = message.get("content")
    if content is None and may_be_missing:
        return ""  # templates differ in what they make of none
    if content is None:
        raise InvalidPromptError(f"{where} has no 'content': give text, if only an empty one")
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidPromptError(
            f"{where}['content'] is {type(content).__name__}: give text, or a list of parts of type 'text'"
        )
    return "".join(_text_of(part, f"{where}['content'][{index}]") for index, part in enumerate(content))


def _text_of(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise InvalidPromptError(
            f"{where} is of type {kind!r}, and this model is text only: leave it out or describe it in words"
        )
    return text


def _check_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise InvalidPromptError(f"{where}['tool_calls']={calls!r}: give a list of {_CALL_SHAPE}")
    if calls and role != "assistant":
        raise InvalidPromptError(f"{where} has 'tool_calls' and the role {role!r}: only an assistant calls tools")
    return [_check_call(call, f"{where}['tool_calls'][{index}]") for index, call in enumerate(calls)]


def _check_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InvalidPromptError(f"{where}={call!r} names no function: give {_CALL_SHAPE}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError as exc:
            raise InvalidPromptError(
                f"{where} has the arguments {arguments!r}, which are not JSON ({exc}): give a dictionary or its JSON"
            ) from exc
    arguments = {} if arguments in (None, "") else _plain(arguments)
    if not isinstance(arguments, dict):
        raise InvalidPromptError(f"{where} has the arguments {arguments!r}: give a dictionary or its JSON")
    checked: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    call_id = call.get("id")
    if call_id is not None:
        checked["id"] = _check_id(call_id, f"{where}['id']")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as exc:
        raise InvalidPromptError(f"{where} has arguments that JSON has no room for: {exc}") from exc
    return checked


def _check_result(message: dict[str, Any], where: str, called: Mapping[str, str]) -> None:
    call_id = message.get("tool_call_id")
    if call_id is None:
        return
    name = called.get(_check_id(call_id, f"{where}['tool_call_id']"))
    if name is not None:
        message.setdefault("name", name)  # some templates tell results apart by it


def _check_id(call_id: Any, where: str) -> str:
    if not isinstance(call_id, str):
        raise InvalidPromptError(f"{where}={call_id!r}: give the call's id, a string")
    return call_id


def _function_of(tool: Any, where: str) -> dict[str, Any]:
    """The function of a tool, which may also be the tool itself, with parameters if it has none."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or (function is not tool and tool.get("type", "function") != "function"):
        raise InvalidToolError(f"{where}={tool!r} is no function: give {_TOOL_SHAPE}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidToolError(f"{where}={tool!r} has no name: give {_TOOL_SHAPE}")
    plain: dict[str, Any] = _plain({key: value for key, value in function.items() if value is not None})
    if function is tool:
        plain.pop("type", None)
    if not isinstance(plain.get("description", ""), str):
        raise InvalidToolError(f"{where} has the description {plain['description']!r}: give text")
    # mlx-lm's parsers and some templates take for granted that there are some.
    parameters = plain.setdefault("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, dict):
        raise InvalidToolError(f"{where} has the parameters {parameters!r}: give a JSON schema of an object")
    try:
        json.dumps(plain)
    except (TypeError, ValueError) as exc:
        raise InvalidToolError(f"{where}={tool!r} has something that JSON has no room for: {exc}") from exc
    return plain


def _plain(value: Any) -> Any:
    """A deep copy in dictionaries and lists, which is what templates and JSON take."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
