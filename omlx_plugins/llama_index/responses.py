"""The engine's answers, whole and in pieces, to LlamaIndex's responses."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from omlx_core import GenerationChunk, GenerationResult
from omlx_core.engine.results import InvalidToolCall, ToolCall
from omlx_plugins.base import reuse_metadata, token_texts
from omlx_plugins.conversation import write_call
from omlx_plugins.llama_index.messages import INVALID_CALLS

if TYPE_CHECKING:
    from omlx_core import Engine

R_co = TypeVar("R_co", ChatResponse, CompletionResponse, covariant=True)


class Answer(ABC, Generic[R_co]):
    """One answer, as far as it has come, and its responses.

    Args:
        engine: the engine that gives it.
        model: the model's name in what a response says of it.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._text = ""
        self._reasoning = ""
        self._calls: list[ToolCall] = []
        self._invalid_calls: list[InvalidToolCall] = []

    def whole(self, result: GenerationResult) -> R_co:
        """The response to a request that isn't streamed."""
        self._take(result)
        return self._respond(None, "", result)

    def add(self, chunk: GenerationChunk) -> R_co | None:
        """The response for one chunk of a stream, with all that came before; None where it adds nothing.

        The last one says what the answer cost.
        """
        self._take(chunk)
        adds = chunk.text or chunk.reasoning or chunk.tool_calls or chunk.invalid_tool_calls
        if not adds and chunk.result is None:
            return None
        return self._respond(chunk.text, chunk.reasoning, chunk.result)

    def _take(self, piece: GenerationChunk | GenerationResult) -> None:
        self._text += piece.text
        self._reasoning += piece.reasoning
        self._calls += piece.tool_calls
        self._invalid_calls += piece.invalid_tool_calls

    def _details(self, result: GenerationResult | None) -> dict[str, Any]:
        """What a response says beside its text, once the answer is whole."""
        if result is None:
            return {}
        usage = {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.completion_tokens,
            "total_tokens": result.usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": result.usage.cached_tokens},
        }
        if result.usage.reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": result.usage.reasoning_tokens}
        raw = {
            "model": self._model,
            "finish_reason": result.finish_reason,
            "usage": usage,
            "omlx": reuse_metadata(result),
        }
        return {"raw": raw, "logprobs": _logprobs(self._engine, result)}

    @abstractmethod
    def _respond(self, delta: str | None, thinking_delta: str, result: GenerationResult | None) -> R_co: ...


class ChatAnswer(Answer[ChatResponse]):
    """An answer in a chat: its thinking, its text and its calls are blocks, in this order.

    There is one block of text, if only an empty one where nothing is called. Calls stand in the message's
    ``additional_kwargs["tool_calls"]`` too, where LlamaIndex's streaming programs look for them; what isn't one is in
    ``additional_kwargs["invalid_tool_calls"]``.
    """

    def _respond(self, delta: str | None, thinking_delta: str, result: GenerationResult | None) -> ChatResponse:
        blocks: list[Any] = []
        if self._reasoning:
            num_tokens = None if result is None else result.usage.reasoning_tokens
            blocks.append(ThinkingBlock(content=self._reasoning, num_tokens=num_tokens))
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        blocks += [
            ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments))
            for call in self._calls
        ]
        return ChatResponse(
            message=ChatMessage(
                role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=self._calls_beside_blocks()
            ),
            delta=delta,
            additional_kwargs={"thinking_delta": thinking_delta} if thinking_delta else {},
            **self._details(result),
        )

    def _calls_beside_blocks(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {}
        if self._calls:
            kwargs["tool_calls"] = [
                write_call(call.id, call.name, json.dumps(dict(call.arguments), ensure_ascii=False))
                for call in self._calls
            ]
        if self._invalid_calls:
            kwargs[INVALID_CALLS] = [
                {"id": call.id, "text": call.text, "error": call.error} for call in self._invalid_calls
            ]
        return kwargs


class CompletionAnswer(Answer[CompletionResponse]):
    """An answer to a prompt; what is thought before it is in ``additional_kwargs["reasoning_content"]``."""

    def _respond(self, delta: str | None, thinking_delta: str, result: GenerationResult | None) -> CompletionResponse:
        kwargs = {"reasoning_content": self._reasoning, "thinking_delta": thinking_delta}
        return CompletionResponse(
            text=self._text,
            delta=delta,
            additional_kwargs={name: text for name, text in kwargs.items() if text},
            **self._details(result),
        )


def _logprobs(engine: Engine, result: GenerationResult) -> list[list[LogProb]] | None:
    """A list for each generated token: that token, and then the likeliest others, if they were asked for."""
    if result.logprobs is None:
        return None
    places = result.top_logprobs or [[] for _ in result.logprobs]
    candidates = [
        [(token_id, logprob), *((likely.token_id, likely.logprob) for likely in place if likely.token_id != token_id)]
        for token_id, logprob, place in zip(result.token_ids, result.logprobs, places, strict=True)
    ]
    texts = iter(token_texts(engine, [token_id for place in candidates for token_id, _ in place]))
    return [[_logprob(next(texts), logprob) for _, logprob in place] for place in candidates]


def _logprob(text: str, logprob: float) -> LogProb:
    # A token that is part of a character has bytes that its text doesn't show.
    return LogProb(token=text, logprob=logprob, bytes=[] if "\ufffd" in text else list(text.encode()))
