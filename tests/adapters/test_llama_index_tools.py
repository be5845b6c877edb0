"""Tools in every form that LlamaIndex's users write, and calls in every form that its agents read."""

from __future__ import annotations

import json

import pytest
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.tools import FunctionTool
from llama_index_forms import COMPLETE_FORMS, WITH_TOOLS_FORMS, all_of
from tiny_chats import chat_tokenizer
from tiny_models import tiny_llama

from omlx_core import Engine
from omlx_core.engine.results import InvalidToolCall, ToolCall
from omlx_core.errors import InvalidToolError, UnusableAnswerError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.llama_index import OMLX

ONE, TWO = ToolCall("call_1", "add", {"a": 1, "b": 2}), ToolCall("call_2", "add", {"a": 3, "b": 4})
WRONG = InvalidToolCall("call_3", '{"name": "sub"}', "there is no tool 'sub'")


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


ADD = FunctionTool.from_defaults(add)
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def engine():
    return FakeEngine([FakeAnswer(["So: "], reasoning="hm", tool_calls=[ONE, TWO], invalid_tool_calls=[WRONG])])


@pytest.fixture
def llm(engine):
    return OMLX(engine=engine)


def sent(engine):
    return engine.calls[-1].options


@pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
async def test_every_form_sends_tools_in_openais_form_after_the_history(llm, engine, form):
    history = [ChatMessage("Hi")]
    await all_of(llm, form, [ADD, SUB], user_msg="Add.", chat_history=history)
    assert [message["content"] for message in engine.calls[0].prompt] == ["Hi", "Add."]
    assert history == [ChatMessage("Hi")]
    tool, other = sent(engine)["tools"]
    assert tool["function"]["name"] == "add"
    assert set(tool["function"]["parameters"]["properties"]) == {"a", "b"}
    assert other == SUB
    assert (sent(engine)["tool_choice"], sent(engine)["parallel_tool_calls"]) == ("auto", False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "auto"),
        ({"tool_choice": "auto"}, "auto"),
        ({"tool_required": True}, "required"),
        ({"tool_required": True, "tool_choice": "auto"}, "required"),
        ({"tool_required": True, "tool_choice": "none"}, "none"),
        ({"tool_required": True, "tool_choice": "add"}, "add"),
        ({"tool_choice": "any"}, "required"),
        ({"tool_choice": "required"}, "required"),
        ({"tool_choice": False}, "auto"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "sub"),
        ({"tool_choice": {"type": "tool", "name": "sub"}}, "sub"),
        ({"tool_choice": {"type": "any"}}, "required"),
    ],
)
def test_every_form_of_a_choice_is_the_engines(llm, engine, given, expected):
    llm.chat_with_tools([ADD, SUB], "Hi", **given)
    assert sent(engine)["tool_choice"] == expected


def test_true_is_the_only_tool_that_there_is(llm, engine):
    llm.chat_with_tools([ADD], "Hi", tool_choice=True)
    assert sent(engine)["tool_choice"] == "add"
    with pytest.raises(InvalidToolError, match="2 tools"):
        llm.chat_with_tools([ADD, SUB], "Hi", tool_choice=True)


def test_parallel_calls_can_be_allowed(llm, engine):
    llm.chat_with_tools([ADD], "Hi", allow_parallel_tool_calls=True)
    assert sent(engine)["parallel_tool_calls"] is True


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([ADD], "mul", r"tool_choice='mul' with the tools \['add'\]"),
        ([ADD], 3, "tool_choice=3"),
        ([ADD], {}, r"tool_choice=\{\}"),
        ([], "any", r"tool_choice='any' with the tools \[\]"),
        ([add], None, r"tools\[0\]=.*is no tool.*FunctionTool"),
        ([{"type": "web_search"}], "web_search", r"with the tools \[\]"),
    ],
)
def test_a_choice_or_a_tool_that_cannot_be_is_an_error_before_the_engine_is_asked(llm, engine, tools, choice, message):
    with pytest.raises(InvalidToolError, match=message):
        llm.chat_with_tools(tools, "Hi", tool_choice=choice)
    assert not engine.calls


@pytest.mark.parametrize("form", COMPLETE_FORMS)
async def test_a_completion_has_no_room_for_calls(llm, form):
    with pytest.raises(InvalidToolError, match="no room for calls"):
        await all_of(llm, form, "Hi", tools=[ADD])


# Calls


@pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
async def test_thinking_text_and_calls_come_apart(llm, form):
    message = (await all_of(llm, form, [ADD], user_msg="Hi"))[-1].message
    assert message.blocks == [
        ThinkingBlock(content="hm", num_tokens=2),
        TextBlock(text="So: "),
        ToolCallBlock(tool_call_id="call_1", tool_name="add", tool_kwargs={"a": 1, "b": 2}),
        ToolCallBlock(tool_call_id="call_2", tool_name="add", tool_kwargs={"a": 3, "b": 4}),
    ]
    assert [json.loads(call["function"]["arguments"]) for call in message.additional_kwargs["tool_calls"]] == [
        {"a": 1, "b": 2},
        {"a": 3, "b": 4},
    ]
    assert message.additional_kwargs["invalid_tool_calls"] == [
        {"id": "call_3", "text": WRONG.text, "error": WRONG.error}
    ]


@pytest.mark.parametrize("form", ["stream_chat_with_tools", "astream_chat_with_tools"])
async def test_every_chunk_has_what_came_before_it_and_can_be_asked_for_calls(llm, form):
    responses = await all_of(llm, form, [ADD], user_msg="Hi")
    calls = [llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) for response in responses]
    assert [len(found) for found in calls] == [0, 0, 2, 2]
    assert [(call.tool_id, call.tool_name, call.tool_kwargs) for call in calls[-1]] == [
        ("call_1", "add", {"a": 1, "b": 2}),
        ("call_2", "add", {"a": 3, "b": 4}),
    ]
    assert [response.message.content for response in responses] == ["", "So: ", "So: ", "So: "]
    assert [response.delta for response in responses] == ["", "So: ", "", ""]
    assert [response.additional_kwargs for response in responses] == [{"thinking_delta": "hm"}, {}, {}, {}]
    assert responses[-1].raw["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_an_answer_without_calls_is_an_error_unless_it_need_not_call(engine, llm):
    engine.answers = ["I won't."]
    response = llm.chat_with_tools([ADD], "Hi")
    with pytest.raises(UnusableAnswerError, match=r"calls no tool; it is .I won't\."):
        llm.get_tool_calls_from_response(response)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []


@pytest.mark.parametrize(("arguments", "expected"), [('{"a": 1}', {"a": 1}), ("{", {}), ("[1]", {})])
def test_arguments_that_another_model_left_as_text_are_read(llm, arguments, expected):
    engine = FakeEngine()
    response = OMLX(engine=engine).chat([ChatMessage("Hi")])
    response.message.blocks = [ToolCallBlock(tool_name="add", tool_kwargs=arguments)]
    assert [call.tool_kwargs for call in llm.get_tool_calls_from_response(response)] == [expected]


def test_what_is_no_call_is_shown_to_the_model_in_the_next_turn(llm, engine):
    answer = llm.chat_with_tools([ADD], "Hi").message
    llm.chat([ChatMessage("Hi"), answer, ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": "call_1"})])
    _, assistant, result = engine.calls[-1].prompt
    assert assistant["content"] == f"So: \n{WRONG.text}"
    assert [call["id"] for call in assistant["tool_calls"]] == ["call_1", "call_2"]
    assert result == {"role": "tool", "content": "3", "tool_call_id": "call_1"}


@pytest.mark.parametrize("form", ["predict_and_call", "apredict_and_call"])
async def test_predict_and_call_runs_what_is_called(llm, form):
    [response] = await all_of(llm, form, [ADD], user_msg="Hi", allow_parallel_tool_calls=True)
    assert response.response == "3\n\n7"


@pytest.mark.parametrize("form", COMPLETE_FORMS)
async def test_what_is_thought_before_a_completion_stands_beside_it(llm, form):
    response = (await all_of(llm, form, "Hi"))[-1]
    assert response.text == "So: "
    assert response.additional_kwargs == {"reasoning_content": "hm"}


# The real engine


@pytest.fixture(scope="module")
def tiny_engine():
    with Engine(tiny_llama(), chat_tokenizer()) as engine:
        yield engine


@pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
async def test_even_a_random_model_makes_the_call_that_it_must(tiny_engine, form):
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    ping = {"type": "function", "function": {"name": "ping", "parameters": schema}}
    llm = OMLX(engine=tiny_engine, max_tokens=200)
    response = (await all_of(llm, form, [ADD, ping], user_msg="Hi", tool_choice="ping"))[-1]
    [call] = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "ping"
    assert call.tool_kwargs["unit"] in ("C", "F")


def test_tokens_are_the_models_and_those_of_tools_count(tiny_engine):
    llm = OMLX(engine=tiny_engine)
    assert llm.get_token_ids("Hi") == tiny_engine.tokenizer.encode("Hi", add_special_tokens=False)
    without, with_tools = llm.count_tokens([ChatMessage("Hi")]), llm.count_tokens([ChatMessage("Hi")], [ADD])
    assert without == llm.chat([ChatMessage("Hi")], max_tokens=1).raw["usage"]["prompt_tokens"]
    assert with_tools == llm.chat([ChatMessage("Hi")], max_tokens=1, tools=[ADD]).raw["usage"]["prompt_tokens"]
    assert with_tools > without


def test_a_chat_form_takes_tools_too(llm, engine):
    llm.chat([ChatMessage("Hi")], tools=[ADD], tool_choice="any")
    assert (sent(engine)["tools"][0]["function"]["name"], sent(engine)["tool_choice"]) == ("add", "required")
