"""LangChain messages to the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from omlx_plugins.conversation import Conversation, write_call

_CALL_BLOCKS = ("tool_call", "tool_use")
# Blocks of an earlier answer that stand elsewhere in the message too, or say nothing to a local model.
_PASSED_OVER = frozenset(
    {"redacted_thinking", "tool_call_chunk", "invalid_tool_call", "input_json_delta", "function_call"}
)


def convert_messages(messages: Sequence[BaseMessage]) -> Conversation:
    """Turn LangChain messages into what a chat template takes.

    Text blocks are joined in their order, arguments of tools stay dictionaries, and earlier reasoning is handed on as
    ``reasoning_content``, of which the template decides. Standard content blocks and Anthropic's ``tool_use``,
    ``tool_result``, ``thinking`` and text ``document`` blocks are understood. A failed tool's result begins with
    ``Error:``.

    Raises:
        InvalidPromptError: a message of a kind that no model takes, or a block that isn't text, such as an image,
            audio, a file or a video; with the message's position and the block's type.
    """
    conversation = Conversation()
    for position, message in enumerate(messages):
        _MessageConverter(message, position, conversation).convert()
    return conversation


class _MessageConverter:
    """Adds one message to a conversation."""

    def __init__(self, message: BaseMessage, position: int, conversation: Conversation) -> None:
        self._message = message
        self._where = f"message {position}"
        self._conversation = conversation
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._has_results = False

    def convert(self) -> None:
        message = self._message
        role = self._role()
        if isinstance(message, AIMessage):
            self._take_answer(message)
        blocks = [message.content] if isinstance(message.content, str) else message.content
        for block in blocks:
            self._take(block)
        if isinstance(message, AIMessage):
            self._take_invalid_calls(message)
        converted = self._converted(role)
        if self._texts or self._calls or not self._has_results:
            self._conversation.messages.append(converted)
        if message.additional_kwargs.get("cache_control"):
            self._pin()

    def _role(self) -> str:
        match self._message:
            case SystemMessage():
                return "system"
            case HumanMessage():
                return "user"
            case AIMessage():
                return "assistant"
            case ToolMessage() | FunctionMessage():
                return "tool"
            case ChatMessage():
                return self._message.role
        raise InvalidPromptError(
            f"{self._where} is a {type(self._message).__name__}, which no model takes: send system, human, AI and tool "
            "messages"
        )

    def _converted(self, role: str) -> dict[str, Any]:
        """The message as far as it was taken."""
        message = self._message
        text = "".join(self._texts)
        if isinstance(message, ToolMessage) and message.status == "error":
            text = _as_error(text)
        converted: dict[str, Any] = {"role": role, "content": text}
        if self._reasoning:
            converted["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            converted["tool_calls"] = list(self._calls)
        if isinstance(message, ToolMessage):
            converted["tool_call_id"] = message.tool_call_id
        if message.name:
            converted["name"] = message.name
        return converted

    def _take_answer(self, message: AIMessage) -> None:
        """What stands beside an answer's content."""
        reasoning = message.additional_kwargs.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            self._reasoning.append(reasoning)
        self._calls += [write_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]

    def _take_invalid_calls(self, message: AIMessage) -> None:
        """Show the model what it wrote in place of calls, so that it can do better."""
        for call in message.invalid_tool_calls:
            written = f"{call['name'] or ''} {call['args'] or ''}".strip()
            self._texts.append(f"\n{written}" if self._texts and any(self._texts) else written)

    def _take(self, block: str | dict[Any, Any]) -> None:
        if isinstance(block, str):
            self._texts.append(block)
            return
        kind = block.get("type")
        if kind == "tool_result" and isinstance(self._message, HumanMessage):
            self._take_result(block)
        elif isinstance(self._message, AIMessage) and self._is_of_answer(kind):
            self._take_of_answer(kind, block)
        else:
            self._texts.append(self._text(block))
        if block.get("cache_control"):
            self._pin(self._converted(self._role()) if self._texts or self._calls else None)

    @staticmethod
    def _is_of_answer(kind: Any) -> bool:
        return kind in ("reasoning", "thinking", *_CALL_BLOCKS) or kind in _PASSED_OVER

    def _take_of_answer(self, kind: Any, block: Mapping[Any, Any]) -> None:
        if kind in ("reasoning", "thinking"):
            # Reasoning that also stands beside the content is not to be taken twice.
            if "reasoning_content" not in self._message.additional_kwargs:
                self._reasoning.append(str(block.get(kind) or ""))
        elif kind in _CALL_BLOCKS and block.get("id") not in {call.get("id") for call in self._calls}:
            arguments = block.get("args" if kind == "tool_call" else "input")
            self._calls.append(write_call(block.get("id"), str(block.get("name")), arguments or {}))

    def _take_result(self, block: Mapping[Any, Any]) -> None:
        """A tool's result within a human message, which is a message of its own for everyone else."""
        self._has_results = True
        if self._texts:
            self._conversation.messages.append(self._converted(self._role()))
            self._texts.clear()
        content = block.get("content") or ""
        parts = [content] if isinstance(content, str) else content
        text = "".join(part if isinstance(part, str) else self._text(part) for part in parts)
        result = {"role": "tool", "content": _as_error(text) if block.get("is_error") else text}
        self._conversation.messages.append({**result, "tool_call_id": str(block.get("tool_use_id"))})

    def _text(self, block: Mapping[Any, Any]) -> str:
        kind, source = block.get("type"), block.get("source")
        if kind in ("text", "text-plain") and isinstance(block.get("text"), str):
            text: str = block["text"]
            return text
        if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
            return str(source.get("data"))
        raise InvalidPromptError(
            f"{self._where} has a block of type {kind!r}, and this model is text only: leave the block out or describe "
            "it in words"
        )

    def _pin(self, unfinished: dict[str, Any] | None = None) -> None:
        """Pin what was converted up to here."""
        self._conversation.pinned[:] = self._conversation.messages
        if unfinished is not None:
            self._conversation.pinned.append(unfinished)


def _as_error(text: str) -> str:
    return text if text.lower().startswith("error") else f"Error: {text}"
