"""JSON schemas as callers write them, made ready for an answer that follows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where a schema's parts are: a schema, a list of them, or schemas by name.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_SEVERAL = ("anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions", "patternProperties")
# Beside these, "additionalProperties" would rule out what they declare.
_DECLARES_ELSEWHERE = frozenset({"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"})


def close_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a schema whose objects have no other properties than it declares, where it says nothing about them.

    A model that may write any property more is apt to do so, and never to end.
    """
    closed = dict(schema)
    for key in _ONE:
        if isinstance(closed.get(key), Mapping):
            closed[key] = close_objects(closed[key])
    for key in _SEVERAL:
        if isinstance(closed.get(key), list):
            closed[key] = [close_objects(part) if isinstance(part, Mapping) else part for part in closed[key]]
    for key in _NAMED:
        if isinstance(closed.get(key), Mapping):
            closed[key] = {
                name: close_objects(part) if isinstance(part, Mapping) else part for name, part in closed[key].items()
            }
    if "properties" in closed and not closed.keys() & _DECLARES_ELSEWHERE:
        closed["additionalProperties"] = False
    return closed
