"""Every message and block that LangChain has comes to the engine as it is meant, or is refused by name."""

from __future__ import annotations

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from omlx_core.errors import InvalidPromptError
from omlx_core.testing import FakeEngine
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.langchain.messages import convert_messages

CALL = {"name": "add", "args": {"a": {"b": 1}}, "id": "call-1", "type": "tool_call"}
ENGINE_CALL = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": {"a": {"b": 1}}}}
MARK = {"cache_control": {"type": "ephemeral"}}


def converted(*messages):
    return convert_messages(messages).messages


def pinned(*messages):
    return convert_messages(messages).pinned


def text(content, **more):
    return {"type": "text", "text": content, **more}


def test_every_kind_of_message_gets_its_role():
    assert converted(
        SystemMessage("s"),
        HumanMessage("h", name="ann"),
        AIMessage("", tool_calls=[CALL]),
        ToolMessage("2", tool_call_id="call-1", name="add"),
        AIMessage("a"),
        ChatMessage("c", role="critic"),
        FunctionMessage("f", name="g"),
    ) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [ENGINE_CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "call-1", "name": "add"},
        {"role": "assistant", "content": "a"},
        {"role": "critic", "content": "c"},
        {"role": "tool", "content": "f", "name": "g"},
    ]


def test_text_blocks_keep_their_order():
    blocks = [
        "one ",
        text("two "),
        {"type": "text-plain", "text": "three ", "mime_type": "text/plain"},
        {"type": "document", "source": {"type": "text", "data": "four"}},
    ]
    assert converted(HumanMessage(blocks)) == [{"role": "user", "content": "one two three four"}]


def test_an_empty_message_stays_one():
    assert converted(HumanMessage(""), AIMessage([])) == [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_use", "id": "call-1", "name": "add", "input": {"a": {"b": 1}}},
        {"type": "tool_call", "id": "call-1", "name": "add", "args": {"a": {"b": 1}}},
    ],
    ids=lambda block: block["type"],
)
@pytest.mark.parametrize("beside", [[], [CALL]])
def test_a_call_counts_once_whether_it_stands_in_the_content_or_beside_it_too(block, beside):
    [message] = converted(AIMessage([text("Let me see."), block], tool_calls=beside))
    assert message == {"role": "assistant", "content": "Let me see.", "tool_calls": [ENGINE_CALL]}


def test_reasoning_is_handed_on_apart_from_the_text():
    for message in (
        AIMessage("Yes", additional_kwargs={"reasoning_content": "hm"}),
        AIMessage([{"type": "reasoning", "reasoning": "hm"}, text("Yes")]),
        AIMessage([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "redacted_thinking"}, "Yes"]),
        AIMessage(
            [{"type": "reasoning", "reasoning": "hm"}, text("Yes")], additional_kwargs={"reasoning_content": "hm"}
        ),
    ):
        assert converted(message) == [{"role": "assistant", "content": "Yes", "reasoning_content": "hm"}]


def test_an_answer_in_standard_blocks_reads_like_the_same_one_in_text():
    chunk = AIMessageChunk(
        [{"type": "reasoning", "reasoning": "hm", "index": 0}, text("Yes", index=1)],
        response_metadata={"output_version": "v1", "model_provider": "omlx"},
    )
    as_blocks = AIMessage(content_blocks=[text("Yes"), CALL])
    assert converted(chunk) == [{"role": "assistant", "content": "Yes", "reasoning_content": "hm"}]
    assert converted(as_blocks) == [{"role": "assistant", "content": "Yes", "tool_calls": [ENGINE_CALL]}]


def test_the_model_is_shown_what_it_wrote_in_place_of_a_call():
    invalid = {"name": None, "args": '{"name": add', "id": "call-1", "error": "no JSON"}
    assert converted(AIMessage("", invalid_tool_calls=[invalid]))[0]["content"] == '{"name": add'
    named = {**invalid, "name": "add"}
    assert converted(AIMessage("So:", invalid_tool_calls=[named]))[0]["content"] == 'So:\nadd {"name": add'


@pytest.mark.parametrize(("content", "seen"), [("no such city", "Error: no such city"), ("Error: none", "Error: none")])
def test_a_failed_tools_result_says_so(content, seen):
    failed = ToolMessage(content, tool_call_id="1", status="error")
    assert converted(failed) == [{"role": "tool", "content": seen, "tool_call_id": "1"}]
    in_human = HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": content, "is_error": True}])
    assert converted(in_human) == [{"role": "tool", "content": seen, "tool_call_id": "1"}]


def test_tool_results_within_a_human_message_are_messages_of_their_own():
    message = HumanMessage(
        [
            {"type": "tool_result", "tool_use_id": "1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "2", "content": [text("t"), text("wo")]},
            text("And now?"),
        ]
    )
    assert converted(message) == [
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "2"},
        {"role": "user", "content": "And now?"},
    ]
    assert converted(HumanMessage([text("So:"), message.content[0]])) == [
        {"role": "user", "content": "So:"},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "image", "base64": "", "mime_type": "image/png"},
        {"type": "audio", "base64": "", "mime_type": "audio/wav"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video", "url": "file:x"},
        {"type": "file", "base64": "", "mime_type": "application/pdf"},
        {"type": "document", "source": {"type": "base64", "data": ""}},
        {"type": "text-plain", "url": "file:x", "mime_type": "text/plain"},
        {"type": "reasoning", "reasoning": "in a user's message"},
        {"type": "non_standard", "value": {}},
        {"type": "text"},
        {"data": "no type"},
    ],
    ids=lambda block: block.get("type"),
)
def test_a_block_that_is_not_text_is_an_error_that_names_it_and_says_where(block):
    with pytest.raises(InvalidPromptError, match=rf"message 1 has a block of type {block.get('type')!r}.*text only"):
        converted(HumanMessage("Look:"), HumanMessage([block]))
    with pytest.raises(InvalidPromptError, match="message 0"):
        converted(ToolMessage([block], tool_call_id="1"))


def test_a_message_that_no_model_takes_is_an_error():
    with pytest.raises(InvalidPromptError, match="message 0 is a RemoveMessage"):
        converted(RemoveMessage(id="1"))


# Pins


def test_a_mark_pins_all_up_to_its_block_and_no_more():
    system, human = SystemMessage("s"), HumanMessage([text("book ", **MARK), text("question")])
    assert pinned(system, human, AIMessage("a")) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "book "},
    ]
    assert pinned(system, HumanMessage("h")) == []


def test_the_last_of_several_marks_counts():
    marked = [SystemMessage([text("s", **MARK)]), HumanMessage("h"), AIMessage([text("a", **MARK)])]
    assert [message["content"] for message in pinned(*marked, HumanMessage("q"))] == ["s", "h", "a"]


def test_marks_on_messages_results_and_null_marks():
    whole = HumanMessage("h", additional_kwargs=MARK)
    assert pinned(whole, AIMessage("a")) == [{"role": "user", "content": "h"}]
    result = HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": "r", **MARK}, text("q")])
    assert pinned(result) == [{"role": "tool", "content": "r", "tool_call_id": "1"}]
    assert pinned(HumanMessage([text("h", cache_control=None)])) == []


@pytest.mark.parametrize(("given", "expected"), [({}, "marked"), ({"pin": False}, False), ({"pin": True}, True)])
def test_what_a_call_says_about_pins_counts_more_than_marks(given, expected):
    engine = FakeEngine()
    ChatOMLX(engine=engine).invoke([HumanMessage([text("marked", **MARK), text(" not")])], **given)
    pin = engine.calls[0].options["pin"]
    assert pin == ([{"role": "user", "content": "marked"}] if expected == "marked" else expected)
