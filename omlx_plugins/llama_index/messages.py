"""LlamaIndex messages to the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import CachePoint, ChatMessage, MessageRole, TextBlock

from omlx_core.errors import InvalidPromptError

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


def to_engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Turn LlamaIndex messages into ``{"role", "content"}`` messages for a chat template.

    The text blocks of a message are joined by newlines, as `ChatMessage.content` does. Cache points are passed over:
    every prefix is cached.

    Raises:
        InvalidPromptError: a message has an image, audio, a document, or another block that isn't text.
    """
    return [_to_engine_message(message, position) for position, message in enumerate(messages)]


def _to_engine_message(message: ChatMessage, position: int) -> dict[str, Any]:
    texts: list[str] = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif not isinstance(block, CachePoint):
            raise InvalidPromptError(
                f"message {position} has a {type(block).__name__}, and this model is text only: leave the block out "
                "or describe it in words"
            )
    converted: dict[str, Any] = {"role": _ROLES[message.role], "content": "\n".join(texts)}
    for name in ("tool_call_id", "name"):
        if converted["role"] == "tool" and name in message.additional_kwargs:
            converted[name] = message.additional_kwargs[name]
    return converted
