"""Tool calls as grammars: how each family of models writes them, and what a tool's parameters allow in them.

A grammar is a piece of llguidance's variant of Lark. Markers that are single special tokens must stand in it as tokens,
since text in a grammar never matches those.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omlx_core.errors import InvalidToolError
from omlx_core.model.tool_calls import BETWEEN_GENERIC_CALLS, GENERIC_FORMAT, Tool, ToolCallFormat

Piece = str | int
"""Text, or the id of a special token."""

Split = Callable[[str], list[Piece]]
"""Takes a text apart into plain text and special tokens."""

# JSON as `json.dumps` and the `tojson` of chat templates write it: a call that a template renders anew later then has
# the text that was generated, and its tokens are found in the prefix cache.
_JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What mlx-lm's parsers read back: a tool's name, an argument's name between tags, and either in Python's syntax.
_TOOL_NAME = re.compile(r"[\w-]+")
_TAGGED_NAME = re.compile(r"[^\s<>\"']+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class ArgumentSyntax:
    """How one argument is written: ``before``, its name, ``after``, its value, ``end``.

    Attributes:
        before, after, end: the fixed text.
        between: the text between two arguments.
        quotes_text: a string is written as a JSON string; otherwise bare, up to the next `end`.
    """

    before: str
    after: str
    end: str = ""
    between: str = ""
    quotes_text: bool = False


@dataclass(frozen=True)
class CallSyntax:
    """How a model writes tool calls: ``start``, calls with ``between`` between them, ``end``.

    Attributes:
        start, between, end: the fixed text around calls.
        before_name, after_name, call_end: the fixed text of a call, around the tool's name and its arguments.
        arguments: how each argument is written; None for one JSON object with all of them.
        escapes_name: the tool's name is part of a JSON string; otherwise bare.
    """

    before_name: str
    after_name: str
    call_end: str
    start: str = ""
    between: str = ""
    end: str = ""
    arguments: ArgumentSyntax | None = None
    escapes_name: bool = False


_GENERIC_SYNTAX = CallSyntax(
    f'{GENERIC_FORMAT.start}{{"name": "',
    '", "arguments": ',
    f"}}{GENERIC_FORMAT.end}",
    between=BETWEEN_GENERIC_CALLS,
    escapes_name=True,
)
# By the name of mlx-lm's parser. Texts are those that the families' chat templates render.
_SYNTAXES = {
    "json_tools": CallSyntax(
        '<tool_call>\n{"name": "',
        '", "arguments": ',
        "}\n</tool_call>",
        between="\n",
        escapes_name=True,
    ),
    "mistral": CallSyntax(
        '{"name": "',
        '", "arguments": ',
        "}",
        start="[TOOL_CALLS][",
        between=", ",
        end="]",
        escapes_name=True,
    ),
    "qwen3_coder": CallSyntax(
        "<tool_call>\n<function=",
        ">\n",
        "</function>\n</tool_call>",
        between="\n",
        arguments=ArgumentSyntax("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "glm47": CallSyntax(
        "<tool_call>",
        "",
        "</tool_call>",
        arguments=ArgumentSyntax("<arg_key>", "</arg_key><arg_value>", "</arg_value>"),
    ),
    "minimax_m2": CallSyntax(
        '<invoke name="',
        '">\n',
        "</invoke>\n",
        start="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
        arguments=ArgumentSyntax('<parameter name="', '">', "</parameter>\n"),
    ),
    "minicpm5": CallSyntax(
        '<function name="',
        '">',
        "</function>",
        arguments=ArgumentSyntax('<param name="', '">', "</param>"),
    ),
    "pythonic": CallSyntax(
        "",
        "(",
        ")",
        start="<|tool_call_start|>[",
        between=", ",
        end="]<|tool_call_end|>",
        arguments=ArgumentSyntax("", "=", between=", ", quotes_text=True),
    ),
}


def call_syntax_of(call_format: ToolCallFormat, chat_template: Any) -> CallSyntax | None:
    """The syntax of calls in a format.

    Args:
        call_format: the generic format, or a model's own.
        chat_template: the model's template; anything else than text says nothing.

    Returns:
        None if the model family's syntax isn't known here.
    """
    if call_format is GENERIC_FORMAT:
        return _GENERIC_SYNTAX
    family = call_format.parser.__module__.rpartition(".")[2]
    template = chat_template if isinstance(chat_template, str) else ""
    syntax = _SYNTAXES.get(family)
    if syntax is None:
        return None
    if family == "mistral" and "[ARGS]" in template:  # from version 11 of its tokenizers on
        return CallSyntax("[TOOL_CALLS]", "[ARGS]", "")
    if family == "mistral" and "[TOOL_CALLS] [" in template:  # those of SentencePiece
        return dataclasses.replace(syntax, start="[TOOL_CALLS] [")
    if family == "glm47" and "\n<arg_key>" in template:  # GLM 4.5 and 4.6
        lines = ArgumentSyntax("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
        return dataclasses.replace(syntax, after_name="\n", between="\n", arguments=lines)
    return syntax


def call_rules(tools: Sequence[Tool], syntax: CallSyntax, split: Split, *, is_single: bool) -> list[str]:
    """The rules of a grammar for calls of any of some tools; the first one is ``calls``.

    Keywords of JSON schema that can't be enforced are ignored in a tool's parameters, unless the tool is ``strict``:
    what calls it checks its arguments. Bare strings follow ``enum``, ``const`` and their lengths, and neither
    ``pattern`` nor ``format``.

    Args:
        tools: what may be called; at least one.
        syntax: how the model writes calls.
        split: finds the special tokens in a text.
        is_single: exactly one call, rather than one or more.

    Raises:
        InvalidToolError: a name or a schema that the syntax has no room for.
    """
    one = " | ".join(f"call_{position}" for position in range(len(tools)))
    more = "" if is_single else f"({_lark(split(syntax.between))} call)*"
    rules = [f"calls: {_lark(split(syntax.start))} call {more} {_lark(split(syntax.end))}", f"call: {one}"]
    for position, tool in enumerate(tools):
        rules += _ToolRules(f"call_{position}", tool["function"], syntax, split).rules
    return rules


def unknown_call_rules(start: str, end: str, split: Split) -> list[str]:
    """The rule ``calls`` for a call in a syntax that isn't known: anything between its markers.

    Args:
        start: the marker before calls.
        end: the marker after them; may be empty.
        split: finds the special tokens in a text.
    """
    return [f"calls: {_lark(split(start))} body", _text_rule("body", split(end))]


def json_rule(name: str, schema: Mapping[str, Any], *, strict: bool) -> str:
    """A rule for JSON of a schema.

    Args:
        name: the rule's name.
        schema: the schema.
        strict: refuse keywords that can't be enforced, rather than ignore them.
    """
    options = schema.get("x-guidance", {})
    if isinstance(options, Mapping):  # llguidance says what is wrong with anything else
        options = {**_JSON_SPACING, "lenient": not strict, **options}
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, always with ``properties``.

    Arguments that it doesn't declare are ruled out where it says nothing about them: whatever the tool calls would
    refuse them. A tool without parameters takes an empty object.

    Args:
        function: the ``function`` of a tool.

    Raises:
        InvalidToolError: the parameters are no schema of an object.
    """
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InvalidToolError(
            f'the parameters of the tool {function["name"]!r} are {schema!r}: give a JSON schema of "type": "object"'
        )
    schema = {"type": "object", "properties": {}, **schema}
    if not isinstance(schema["properties"], Mapping):
        raise InvalidToolError(
            f'the tool {function["name"]!r} has the "properties" {schema["properties"]!r}: give names and their schemas'
        )
    # Beside these, "additionalProperties" would rule out what they declare.
    if not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
        schema["additionalProperties"] = False
    return schema


class _ToolRules:
    """The rules for a call of one tool; the first is called `name`."""

    def __init__(self, name: str, function: Mapping[str, Any], syntax: CallSyntax, split: Split) -> None:
        self._function = function
        self._split = split
        self._parameters = parameters_of(function)
        before = _lark([*split(syntax.before_name), self._written_name(syntax), *split(syntax.after_name)])
        self.rules = [f"{name}: {before} {name}_arguments {_lark(split(syntax.call_end))}"]
        if syntax.arguments is None:
            self._add_json(f"{name}_arguments", self._parameters)
        else:
            self._add_arguments(f"{name}_arguments", syntax.arguments)

    def _written_name(self, syntax: CallSyntax) -> str:
        name: str = self._function["name"]
        if syntax.escapes_name:
            return json.dumps(name, ensure_ascii=False)[1:-1]
        self._check_name(name, _IDENTIFIER if syntax.arguments and syntax.arguments.quotes_text else _TOOL_NAME)
        return name

    def _check_name(self, name: str, pattern: re.Pattern[str]) -> None:
        if not pattern.fullmatch(name):
            raise InvalidToolError(
                f"the name {name!r} in the tool {self._function['name']!r} can't stand in the calls that this model "
                'writes: use letters, digits and underscores only, or tool_format="generic"'
            )

    def _add_arguments(self, name: str, syntax: ArgumentSyntax) -> None:
        """Arguments in the schema's order; optional ones may be left out."""
        between = _lark(self._split(syntax.between))
        required = self._parameters.get("required", ())
        later = ""  # what may follow where an argument was written before
        first = '""'  # and where none was
        properties = self._parameters["properties"]
        for position, (key, schema) in reversed([*enumerate(properties.items())]):
            argument = f"{name}_{position}"
            self._add_argument(argument, key, schema if isinstance(schema, Mapping) else {}, syntax)
            if key in required:
                first = f"{argument} {later}"
                later = f"{between} {argument} {later}"
            else:
                first = f"({argument} {later} | {first})"
                later = f"({between} {argument})? {later}"
        self.rules.append(f"{name}: {first}")

    def _add_argument(self, name: str, key: str, schema: Mapping[str, Any], syntax: ArgumentSyntax) -> None:
        self._check_name(key, _IDENTIFIER if syntax.quotes_text else _TAGGED_NAME)
        before = _lark([*self._split(syntax.before), key, *self._split(syntax.after)])
        end = self._split(syntax.end)
        schema = _resolve(schema, self._parameters)
        if syntax.quotes_text or not _allows_text(schema, self._parameters):
            self.rules.append(f"{name}: {before} {name}_value {_lark(end)}")
            definitions = {key: self._parameters[key] for key in _DEFINITIONS if key in self._parameters}
            self._add_json(f"{name}_value", {**schema, **definitions})
        elif options := schema.get("enum") or [schema[key] for key in ("const",) if key in schema]:
            texts = [option if isinstance(option, str) else json.dumps(option) for option in options]
            self.rules.append(f"{name}: {before} ({' | '.join(map(_literal, texts))}) {_lark(end)}")
        else:
            self.rules.append(f"{name}: {before} {name}_value")
            self.rules.append(_text_rule(f"{name}_value", end, schema.get("minLength", 0), schema.get("maxLength", "")))

    def _add_json(self, name: str, schema: Mapping[str, Any]) -> None:
        self.rules.append(json_rule(name, schema, strict=self._function.get("strict") is True))


def _text_rule(name: str, end: list[Piece], min_length: int = 0, max_length: int | str = "") -> str:
    """A rule for any text up to, and with, what ends it; lengths are in characters."""
    # Text never runs over a special token; anything else must be looked for.
    is_searched = bool(end) and isinstance(end[0], str)
    return f"{name}{'[lazy]' if is_searched else ''}: /(?s:.{{{min_length},{max_length}}})/ {_lark(end)}"


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references within the document `root`, as far as they lead somewhere."""
    followed = set()
    while isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/") and reference not in followed:
        followed.add(reference)
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            break
        schema = target
    return schema


def _allows_text(schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether a value may be a string, which is written bare."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return any(isinstance(value, str) for value in values)
    kinds = schema.get("type")
    if kinds is not None:
        return kinds == "string" or (not isinstance(kinds, str) and "string" in kinds)
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ()) if isinstance(part, Mapping)]
    return not parts or any(_allows_text(_resolve(part, root), root) for part in parts)


def _lark(pieces: list[Piece]) -> str:
    """Pieces in a row."""
    return " ".join(_literal(piece) if isinstance(piece, str) else f"<[{piece}]>" for piece in pieces)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
