"""LlamaIndex messages to the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from pydantic import BaseModel

from omlx_core.errors import InvalidPromptError
from omlx_plugins.conversation import Conversation, write_call

INVALID_CALLS = "invalid_tool_calls"
"""The key in a message's ``additional_kwargs`` for what stood where a call should and isn't one."""

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


def convert_messages(messages: Sequence[ChatMessage]) -> Conversation:
    """Turn LlamaIndex messages into what a chat template takes.

    The texts of a message are joined by newlines, as `ChatMessage.content` does, and those within a citable or cited
    block are among them. Earlier thinking is handed on as ``reasoning_content``, of which the template decides. Calls
    are taken from their blocks or, in a message without such, from ``additional_kwargs["tool_calls"]``. A cache point
    pins what comes before it.

    Raises:
        InvalidPromptError: a message has an image, audio, a video, a document, or another block that it can't have;
            with the message's position and the block's type.
    """
    conversation = Conversation()
    for position, message in enumerate(messages):
        _MessageConverter(message, position, conversation).convert()
    return conversation


class _MessageConverter:
    """Adds one message to a conversation."""

    def __init__(self, message: ChatMessage, position: int, conversation: Conversation) -> None:
        self._message = message
        self._role = _ROLES[message.role]
        self._position = position
        self._conversation = conversation
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def convert(self) -> None:
        for block in self._message.blocks:
            self._take(block)
        if self._role == "assistant":
            self._take_what_stands_beside_blocks()
        self._conversation.messages.append(self._converted())

    def _take(self, block: Any) -> None:
        is_answer = self._role == "assistant"
        match block:
            case TextBlock():
                self._texts.append(block.text)
            case CachePoint():
                self._pin()
            case CitableBlock() | CitationBlock():
                for nested in block.nested_blocks:
                    self._take(nested)
            case ThinkingBlock() if is_answer:
                self._thoughts.append(block.content or "")
            case ToolCallBlock() if is_answer:
                self._calls.append(write_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
            case ThinkingBlock() | ToolCallBlock():
                raise InvalidPromptError(
                    f"message {self._position} has a {type(block).__name__} and the role {self._message.role.value!r}: "
                    "only an assistant's message can have one"
                )
            case _:
                raise InvalidPromptError(
                    f"message {self._position} has a {type(block).__name__}, and this model is text only: leave the "
                    "block out or describe it in words"
                )

    def _take_what_stands_beside_blocks(self) -> None:
        kwargs = self._message.additional_kwargs
        if not self._calls:
            self._calls += [_plain(call) for call in kwargs.get("tool_calls") or ()]
        # The model is shown what it wrote in place of calls, so that it can do better.
        self._texts += [call["text"] for call in kwargs.get(INVALID_CALLS) or ()]

    def _converted(self) -> dict[str, Any]:
        """The message as far as it was taken."""
        converted: dict[str, Any] = {"role": self._role, "content": "\n".join(self._texts)}
        if any(self._thoughts):
            converted["reasoning_content"] = "\n".join(self._thoughts)
        if self._calls:
            converted["tool_calls"] = list(self._calls)
        for name in ("tool_call_id", "name"):
            if self._role == "tool" and name in self._message.additional_kwargs:
                converted[name] = self._message.additional_kwargs[name]
        return converted

    def _pin(self) -> None:
        """Pin what was converted up to here."""
        self._conversation.pinned[:] = self._conversation.messages
        if self._texts or self._calls:
            self._conversation.pinned.append(self._converted())


def _plain(call: BaseModel | dict[str, Any]) -> dict[str, Any]:
    """A call as other models' adapters leave it: a dictionary, or an object of their client."""
    return call.model_dump() if isinstance(call, BaseModel) else call
