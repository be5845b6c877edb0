"""What an answer may be made to follow: a JSON schema, a pattern, a grammar or a choice.

These are plain values: cheap to import and to make, comparable and hashable. The engine compiles them with
`llguidance <https://github.com/guidance-ai/llguidance>`_, which the extra ``structured`` brings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omlx_core.errors import InvalidConstraintError


class Constraint:
    """Base of all constraints.

    An answer that follows its constraint is complete when it ends by itself. One that is cut off by ``max_tokens``,
    the context or a stop text is the beginning of one that follows it.
    """

    __slots__ = ()


@dataclass(frozen=True, init=False)
class JSONSchema(Constraint):
    """The answer is JSON of a schema (draft 2020-12), and nothing else.

    Properties come in the schema's order, with ``", "`` and ``": "`` between them and no other white space, as
    `json.dumps` and chat templates write JSON; a top-level ``"x-guidance"`` in the schema sets llguidance's options
    otherwise. Which keywords can be followed is listed in llguidance's ``docs/json_schema.md``.

    Args:
        schema: the schema as a mapping or as JSON text.
        strict: refuse a schema with keywords or formats that can't be enforced; False ignores those.

    Attributes:
        schema: the schema as JSON text.
        strict: as given.

    Raises:
        InvalidConstraintError: the schema isn't JSON, or no object.
    """

    schema: str
    strict: bool

    def __init__(self, schema: Mapping[str, Any] | str, *, strict: bool = True) -> None:
        try:
            value = json.loads(schema) if isinstance(schema, str) else dict(schema)
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise InvalidConstraintError(
                f"schema={schema!r} is not JSON ({exc}): give a JSON schema as a mapping or as JSON text"
            ) from exc
        if not isinstance(value, dict):
            raise InvalidConstraintError(f'schema={schema!r} is no object: give one such as {{"type": "object"}}')
        object.__setattr__(self, "schema", text)
        object.__setattr__(self, "strict", strict)


@dataclass(frozen=True)
class Regex(Constraint):
    """The answer as a whole matches a regular expression.

    Attributes:
        pattern: in the syntax of `Rust's regex crate <https://docs.rs/regex/latest/regex/#syntax>`_, which is much
            like Python's, without look-around and back-references. Anchors at its ends make no difference.

    Raises:
        InvalidConstraintError: the pattern isn't a string.
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_text("pattern", self.pattern)


@dataclass(frozen=True)
class Grammar(Constraint):
    """The answer follows a context-free grammar.

    Attributes:
        lark: the grammar in llguidance's variant of Lark's syntax (its ``docs/syntax.md``), with a rule ``start``.

    Raises:
        InvalidConstraintError: the grammar isn't a string.
    """

    lark: str

    def __post_init__(self) -> None:
        _check_text("lark", self.lark)


@dataclass(frozen=True)
class Choice(Constraint):
    """The answer is one of several texts.

    Attributes:
        options: the texts; any sequence of strings is taken, and kept as a tuple.

    Raises:
        InvalidConstraintError: there are no options, or one isn't a non-empty string.
    """

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        options = self.options
        is_sequence = isinstance(options, Sequence) and not isinstance(options, str)
        if not is_sequence or not all(isinstance(option, str) and option for option in options):
            raise InvalidConstraintError(f"options={options!r}: give a sequence of non-empty strings")
        if not options:
            raise InvalidConstraintError("options is empty, so that no answer is allowed: give one or more strings")
        object.__setattr__(self, "options", tuple(options))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidConstraintError(f"{name}={value!r}: give a string")
