"""How models write tool calls, and how what they wrote is read.

A model whose chat template knows tools writes calls in its family's own syntax, which mlx-lm's parsers read. For all
others there is a generic format, which this module also writes::

    <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>
    <tool_response>3</tool_response>

A call is JSON with ``", "`` and ``": "`` between its parts, so that one which was generated like this has the same text
when it is rendered as part of a conversation.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omlx_core.engine.results import InvalidToolCall, ToolCall

Tool = Mapping[str, Any]
"""A validated tool: ``{"type": "function", "function": {"name": …, "parameters": …}}``."""

CallParser = Callable[[str, list[Tool]], Any]
"""Reads what stands between the markers: one call or a list of them, as dictionaries; raises what it likes."""

BETWEEN_GENERIC_CALLS = "\n"
"""What stands between two calls in the generic format."""

# Mistral's templates refuse ids of another length.
_MISTRAL_ID_LENGTH = 9


def _parse_json(body: str, _: list[Tool]) -> Any:
    return json.loads(body)


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a model writes tool calls: `start`, a body, `end`, any number of times.

    Attributes:
        start: the marker before a body.
        end: the marker after it; empty if a body reaches to the end of the answer.
        style: ``"json"`` if a body is one object ``{"name": …, "arguments": {…}}``, white space around it ignored;
            None if it is the model family's own syntax, and may hold several calls.
        gap: white space between an answer's text and its first `start`, which belongs to the markup.
        id_length: most characters of a call's id; of longer ones the last are used. None is no limit.
        parser: reads a body.
    """

    start: str
    end: str
    style: Literal["json"] | None
    gap: str = ""
    id_length: int | None = None
    parser: CallParser = field(default=_parse_json, repr=False, compare=False)


GENERIC_FORMAT = ToolCallFormat("<tool_call>", "</tool_call>", "json")


def template_format(tokenizer: Any, gap: str = "") -> ToolCallFormat | None:
    """The format that a model's chat template has for calls.

    Args:
        tokenizer: the model's mlx-lm `TokenizerWrapper`.
        gap: what the template writes between text and a call.

    Returns:
        None if mlx-lm has no parser for it.
    """
    if not tokenizer.has_tool_calling:
        return None
    family = tokenizer.tool_parser.__module__.rpartition(".")[2]
    return ToolCallFormat(
        tokenizer.tool_call_start,
        tokenizer.tool_call_end or "",
        style="json" if family == "json_tools" else None,
        gap=gap,
        id_length=_MISTRAL_ID_LENGTH if family == "mistral" else None,
        parser=tokenizer.tool_parser,
    )


def new_call_id() -> str:
    """An id for a call, unlike any other."""
    return f"call_{uuid.uuid4().hex[:12]}"


def parse_calls(body: str, call_format: ToolCallFormat, tools: Sequence[Tool]) -> list[ToolCall | InvalidToolCall]:
    """Read what a model wrote between two markers. Never raises.

    Args:
        body: the text, without the markers.
        call_format: how it was to be written.
        tools: what may be called.

    Returns:
        One or more calls. One that can't be read or names none of the tools is an `InvalidToolCall`.
    """
    try:
        parsed = call_format.parser(body, list(tools))
    except Exception as exc:  # parsers of other people's, on text that a model made up
        return [invalid_call(body, f"it can't be read ({type(exc).__name__}: {exc})")]
    if not isinstance(parsed, list):
        parsed = [parsed]
    if not parsed:
        return [invalid_call(body, "it calls nothing")]
    names = [tool["function"]["name"] for tool in tools]
    return [_checked(call, body, names, keeps_id=call_format.style is None) for call in parsed]


def invalid_call(body: str, error: str) -> InvalidToolCall:
    """What stood where a call should.

    Args:
        body: the text, without the markers.
        error: what is wrong with it.
    """
    return InvalidToolCall(new_call_id(), body, error)


def _checked(call: Any, body: str, names: Sequence[str], *, keeps_id: bool) -> ToolCall | InvalidToolCall:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return invalid_call(body, "it doesn't name a tool")
    if call["name"] not in names:
        known = ", ".join(map(repr, names))
        return invalid_call(body, f"there is no tool {call['name']!r}: there are {known}")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as exc:
            return invalid_call(body, f"its arguments are not JSON ({exc})")
    if arguments is None and not call.keys() - {"name", "arguments", "id", "type"}:
        arguments = {}
    if not isinstance(arguments, dict):
        return invalid_call(body, "its arguments are not an object")
    # A family whose syntax has ids renders them again in the next turn.
    call_id = call.get("id") if keeps_id else None
    return ToolCall(call_id if isinstance(call_id, str) and call_id else new_call_id(), call["name"], arguments)


# The generic format.


def describe_tools(tools: Sequence[Tool]) -> str:
    """What the system turn tells a model about its tools, in the words that many were trained on."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n"
        '<tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>\n\n'
        "The results are returned to you within <tool_response></tool_response> XML tags."
    )


def write_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as a model writes them.

    Args:
        calls: each ``{"name": …, "arguments": {…}}``.
    """
    bodies = [json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False) for call in calls]
    return BETWEEN_GENERIC_CALLS.join(f"{GENERIC_FORMAT.start}{body}{GENERIC_FORMAT.end}" for body in bodies)


def write_result(content: str) -> str:
    """A tool's result as the model is shown it."""
    return f"<tool_response>{content}</tool_response>"
