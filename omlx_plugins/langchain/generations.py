"""The engine's answers, whole and in pieces, to LangChain's generations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall
from langchain_core.messages import ToolCall as MessageToolCall
from langchain_core.messages.tool import ToolCallChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.utils.json import parse_partial_json

from omlx_core import GenerationChunk, GenerationResult
from omlx_core.engine import results
from omlx_plugins.langchain.metadata import response_metadata, usage_metadata

if TYPE_CHECKING:
    from omlx_core import Engine


def make_chat_result(engine: Engine, model: str, result: GenerationResult) -> ChatResult:
    """A whole answer.

    Args:
        engine: the engine that gave it.
        model: the model's name in its metadata.
        result: the answer.
    """
    message = AIMessage(
        content=result.text,
        additional_kwargs=_reasoning(result.reasoning),
        tool_calls=[
            MessageToolCall(name=call.name, args=dict(call.arguments), id=call.id, type="tool_call")
            for call in result.tool_calls
        ],
        invalid_tool_calls=[
            InvalidToolCall(
                name=None, args=_never_a_call(call.text), id=call.id, error=call.error, type="invalid_tool_call"
            )
            for call in result.invalid_tool_calls
        ],
        usage_metadata=usage_metadata(result.usage),
        response_metadata=response_metadata(engine, model, result),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


class ChunkMaker:
    """Makes the chunks of one streamed answer.

    A call comes as its name and id, and then its arguments, under an index of its own. The last chunk has no content,
    and alone carries usage and metadata.

    Args:
        engine: the engine that gives it.
        model: the model's name in its metadata.
        as_blocks: content is a list of standard blocks, as LangChain's ``output_version="v1"`` has it. Each has an
            index of its own: those of the same index are merged, whatever they are.
    """

    def __init__(self, engine: Engine, model: str, *, as_blocks: bool) -> None:
        self._engine = engine
        self._model = model
        self._as_blocks = as_blocks
        self._num_calls = 0
        self._num_blocks = 0
        self._open_block = ""

    def make(self, chunk: GenerationChunk) -> Iterator[ChatGenerationChunk]:
        """LangChain's chunks for one of the engine's; none where that adds nothing."""
        if chunk.reasoning:
            content = self._block("reasoning", chunk.reasoning)
            yield _generation(content=content, additional_kwargs=_reasoning(chunk.reasoning))
        if chunk.text:
            yield _generation(content=self._block("text", chunk.text) if self._as_blocks else chunk.text)
        for call in chunk.tool_calls:
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            yield from self._call(call, call.name, arguments)
        for invalid in chunk.invalid_tool_calls:
            yield from self._call(invalid, None, _never_a_call(invalid.text))
        if chunk.result is not None:
            yield _generation(
                content=[] if self._as_blocks else "",
                chunk_position="last",
                usage_metadata=usage_metadata(chunk.result.usage),
                response_metadata=response_metadata(self._engine, self._model, chunk.result),
            )

    def _block(self, kind: str, text: str) -> str | list[str | dict[Any, Any]]:
        if not self._as_blocks:
            return ""
        if self._open_block != kind:
            self._open_block = kind
            self._num_blocks += 1
        return [{"type": kind, kind: text, "index": self._num_blocks - 1}]

    def _call(
        self, call: results.ToolCall | results.InvalidToolCall, name: str | None, arguments: str
    ) -> Iterator[ChatGenerationChunk]:
        index = self._num_blocks if self._as_blocks else self._num_calls
        self._num_calls += 1
        self._num_blocks += 1
        self._open_block = ""
        pieces = ({"name": name, "args": "", "id": call.id}, {"name": None, "args": arguments, "id": None})
        for piece in pieces:
            part = ToolCallChunk(**piece, index=index, type="tool_call_chunk")  # type: ignore[typeddict-item]
            # LangChain makes the standard block of it, where one is wanted.
            yield _generation(content="", tool_call_chunks=[part])


def _generation(**fields: Any) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(**fields))


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning_content": text} if text else {}


def _never_a_call(text: str) -> str:
    """What stood where a call should, as something that LangChain doesn't take for a call's arguments.

    It reads the arguments of streamed calls leniently, and would make a call without a name of any JSON object.
    """
    try:
        reads_as_arguments = not text or isinstance(parse_partial_json(text), dict)
    except ValueError:
        reads_as_arguments = False
    return json.dumps(text, ensure_ascii=False) if reads_as_arguments else text
