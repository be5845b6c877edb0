"""Every block of LlamaIndex's messages, as the engine gets it, and the engine's answers as blocks."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from pydantic import BaseModel

from omlx_core.engine.results import Divergence, GenerationChunk, GenerationResult, TokenLogprob, ToolCall, Usage
from omlx_core.errors import InvalidPromptError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.llama_index import OMLX
from omlx_plugins.llama_index.messages import convert_messages
from omlx_plugins.llama_index.responses import ChatAnswer

POINT = CachePoint(cache_control=CacheControl(type="ephemeral"))


def engine_messages(*messages):
    return convert_messages(messages).messages


@pytest.mark.parametrize("role", MessageRole)
def test_every_role_has_one_that_templates_know(role):
    [message] = engine_messages(ChatMessage("x", role=role))
    assert message["role"] in {"system", "user", "assistant", "tool"}
    assert message["content"] == "x"


def test_texts_keep_their_order_and_those_of_citations_are_among_them():
    blocks = [
        TextBlock(text="one"),
        CitableBlock(title="t", source="s", content="two"),
        CitationBlock(title="t", source="s", cited_content="three", additional_location_info={}),
    ]
    assert engine_messages(ChatMessage(blocks=blocks)) == [{"role": "user", "content": "one\ntwo\nthree"}]


def test_a_tools_result_keeps_its_call_id():
    message = ChatMessage("2", role="tool", additional_kwargs={"tool_call_id": "call-1", "name": "add"})
    assert engine_messages(message) == [{"role": "tool", "content": "2", "tool_call_id": "call-1", "name": "add"}]


def test_an_answer_that_is_returned_directly_is_no_result():
    message = ChatMessage("2", role="assistant", additional_kwargs={"tool_call_id": "call-1"})
    assert engine_messages(message) == [{"role": "assistant", "content": "2"}]


def test_thinking_and_calls_go_back_as_they_came():
    blocks = [
        ThinkingBlock(content="hm"),
        TextBlock(text="So: "),
        ToolCallBlock(tool_call_id="call-1", tool_name="add", tool_kwargs={"a": 1}),
        ToolCallBlock(tool_name="sub", tool_kwargs='{"a": 2}'),
    ]
    assert engine_messages(ChatMessage(role="assistant", blocks=blocks)) == [
        {
            "role": "assistant",
            "content": "So: ",
            "reasoning_content": "hm",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "call-1"},
                {"type": "function", "function": {"name": "sub", "arguments": '{"a": 2}'}},
            ],
        }
    ]


class ClientsFunction(BaseModel):
    name: str = "add"
    arguments: str = "{}"


class ClientsCall(BaseModel):
    id: str = "call-1"
    function: ClientsFunction = ClientsFunction()


@pytest.mark.parametrize("call", [ClientsCall(), ClientsCall().model_dump()], ids=["object", "dictionary"])
def test_calls_of_other_models_adapters_are_taken_from_beside_the_blocks(call):
    [message] = engine_messages(ChatMessage(role="assistant", additional_kwargs={"tool_calls": [call]}))
    assert message["tool_calls"] == [{"id": "call-1", "function": {"name": "add", "arguments": "{}"}}]


def test_calls_that_stand_in_both_places_are_taken_once():
    answer = FakeAnswer(tool_calls=[ToolCall("call-1", "add", {"a": 1})])
    message = OMLX(engine=FakeEngine([answer])).chat([ChatMessage("Hi")]).message
    assert "tool_calls" in message.additional_kwargs
    [converted] = engine_messages(message)
    assert [call["function"]["arguments"] for call in converted["tool_calls"]] == [{"a": 1}]


@pytest.mark.parametrize(
    "block",
    [
        ImageBlock(url="http://localhost/x.png"),
        AudioBlock(url="http://localhost/x.wav"),
        VideoBlock(url="http://localhost/x.mp4"),
        DocumentBlock(url="http://localhost/x.pdf"),
    ],
    ids=lambda block: block.block_type,
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_a_block_that_is_not_text_is_an_error_that_says_where(block, role):
    with pytest.raises(InvalidPromptError, match=rf"message 1 has a {type(block).__name__}.*text only"):
        engine_messages(ChatMessage("Look:"), ChatMessage(role=role, blocks=[block]))


def test_an_image_within_a_citable_block_is_an_error_too():
    block = CitableBlock(title="t", source="s", content=[ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(InvalidPromptError, match="message 0 has a ImageBlock"):
        engine_messages(ChatMessage(blocks=[block]))


@pytest.mark.parametrize("block", [ThinkingBlock(content="hm"), ToolCallBlock(tool_name="add")])
def test_thinking_and_calls_of_a_user_are_an_error(block):
    with pytest.raises(InvalidPromptError, match=rf"message 0 has a {type(block).__name__} and the role 'user'"):
        engine_messages(ChatMessage(blocks=[block]))


# Cache points


def test_a_cache_point_pins_what_comes_before_it():
    conversation = convert_messages(
        [
            ChatMessage("rules", role="system"),
            ChatMessage(blocks=[TextBlock(text="one"), POINT, TextBlock(text="two")]),
            ChatMessage("three"),
        ]
    )
    system = {"role": "system", "content": "rules"}
    assert conversation.pinned == [system, {"role": "user", "content": "one"}]
    assert [message["content"] for message in conversation.messages] == ["rules", "one\ntwo", "three"]


def test_the_last_cache_point_counts():
    messages = [ChatMessage(blocks=[TextBlock(text=text), POINT]) for text in ("one", "two")]
    assert [message["content"] for message in convert_messages(messages).pinned] == ["one", "two"]


def test_a_point_at_the_beginning_of_a_message_pins_those_before():
    messages = [ChatMessage("one"), ChatMessage(blocks=[POINT, TextBlock(text="two")])]
    assert [message["content"] for message in convert_messages(messages).pinned] == ["one"]


def test_pins_reach_the_engine_unless_the_call_says_otherwise():
    engine = FakeEngine()
    llm = OMLX(engine=engine)
    llm.chat([ChatMessage(blocks=[TextBlock(text="one"), POINT])])
    llm.chat([ChatMessage(blocks=[TextBlock(text="one"), POINT])], pin=False)
    llm.chat([ChatMessage("one")])
    pins = [call.options.get("pin") for call in engine.calls]
    assert pins == [[{"role": "user", "content": "one"}], False, None]


def test_a_model_without_a_chat_template_passes_over_cache_points():
    engine = FakeEngine(has_chat_template=False)
    OMLX(engine=engine).chat([ChatMessage(blocks=[TextBlock(text="one"), POINT])])
    assert "pin" not in engine.calls[0].options


# Responses


def result(**fields):
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    return GenerationResult("", [72, 200], None, "stop", usage, ttft_s=0.1, **fields)


def test_the_likeliest_others_come_after_each_token():
    top = [[TokenLogprob(73, -0.1), TokenLogprob(72, -0.5)], [TokenLogprob(200, -0.2)]]
    whole = result(top_logprobs=top)
    response = ChatAnswer(FakeEngine(), "fake").whole(
        GenerationResult(**{**{name: getattr(whole, name) for name in whole.__slots__}, "logprobs": [-0.5, -0.2]})
    )
    assert [[(entry.token, entry.logprob) for entry in place] for place in response.logprobs] == [
        [("H", -0.5), ("I", -0.1)],
        [("È", -0.2)],
    ]
    assert response.logprobs[1][0].bytes == [195, 136]


def test_a_response_says_where_the_prompt_left_the_cache():
    response = ChatAnswer(FakeEngine(), "fake").whole(result(divergence=Divergence(7, (1,), (2,), "a", None)))
    assert response.raw["omlx"]["divergence"] == {"position": 7, "prompt_text": "a"}


def test_a_chunk_that_adds_nothing_makes_no_response():
    assert ChatAnswer(FakeEngine(), "fake").add(GenerationChunk("", [72])) is None


def test_an_answer_without_calls_has_a_text_if_only_an_empty_one():
    message = ChatAnswer(FakeEngine(), "fake").whole(result()).message
    assert message.content == ""
