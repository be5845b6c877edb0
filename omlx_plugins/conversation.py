"""Messages as the engine takes them, and what of them is to be pinned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the engine takes them.

    Attributes:
        messages: each with ``role`` and ``content``, calls and results in OpenAI's form.
        pinned: the messages up to the last mark of a prefix to keep, of which the last has the text up to that mark
            only; empty if there is none.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    pinned: list[dict[str, Any]] = field(default_factory=list)


def write_call(call_id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """A call of a tool in OpenAI's form.

    Args:
        call_id: names the call within a conversation; None for none.
        name: the tool's name.
        arguments: a dictionary, or its JSON.
    """
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call_id is None else {**call, "id": call_id}
