"""LangChain messages to the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from omlx_core.errors import InvalidPromptError

# Parts of an assistant's earlier answer that are not its text. Tool calls are also in `AIMessage.tool_calls`, and
# chat templates leave earlier reasoning out.
_ASSISTANT_ONLY = frozenset({"reasoning", "thinking", "redacted_thinking", "tool_call", "tool_use", "function_call"})


def to_engine_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Turn LangChain messages into ``{"role", "content"}`` messages for a chat template.

    The text parts of a message are joined in their order; tool calls keep their arguments as a dict.

    Raises:
        InvalidPromptError: a message of a kind that no model takes, or one with an image, audio or a file in it.
    """
    return [_to_engine_message(message, position) for position, message in enumerate(messages)]


def _to_engine_message(message: BaseMessage, position: int) -> dict[str, Any]:
    converted: dict[str, Any] = {"role": _role(message, position), "content": _text(message, position)}
    if isinstance(message, AIMessage) and message.tool_calls:
        converted["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    elif isinstance(message, ToolMessage):
        converted["tool_call_id"] = message.tool_call_id
    if isinstance(message, ToolMessage | FunctionMessage) and message.name:
        converted["name"] = message.name
    return converted


def _role(message: BaseMessage, position: int) -> str:
    match message:
        case SystemMessage():
            return "system"
        case HumanMessage():
            return "user"
        case AIMessage():
            return "assistant"
        case ToolMessage() | FunctionMessage():
            return "tool"
        case ChatMessage():
            return message.role
    raise InvalidPromptError(
        f"message {position} is a {type(message).__name__}, which no model takes: send system, human, AI and tool "
        "messages"
    )


def _text(message: BaseMessage, position: int) -> str:
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for part in message.content:
        kind = "text" if isinstance(part, str) else part.get("type")
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif not (isinstance(message, AIMessage) and kind in _ASSISTANT_ONLY):
            raise InvalidPromptError(
                f"message {position} has a part of type {kind!r}, and this model is text only: leave the part out "
                "or describe it in words"
            )
    return "".join(texts)
