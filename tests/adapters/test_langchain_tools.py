"""Tools in every form that LangChain's users write, and calls in every form that they read."""

from __future__ import annotations

import json
from typing import TypedDict

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_forms import FORMS, STREAMS, all_of
from pydantic import BaseModel
from tiny_chats import chat_tokenizer
from tiny_models import tiny_llama

from omlx_core import Engine
from omlx_core.engine import constraint_compiler
from omlx_core.engine.results import InvalidToolCall, ToolCall
from omlx_core.errors import InvalidConstraintError, InvalidToolError, MissingDependencyError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX

ONE, TWO = ToolCall("call_1", "add", {"a": 1, "b": "é"}), ToolCall("call_2", "add", {})
WRONG = InvalidToolCall("call_3", '{"name": "sub", "arguments": {}}', "there is no tool 'sub'")


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


class Add(BaseModel):
    """Adds."""

    a: int


class AddDict(TypedDict):
    """Adds."""

    a: int


@pytest.fixture
def engine():
    return FakeEngine([FakeAnswer(["So: "], reasoning="hm", tool_calls=[ONE, TWO], invalid_tool_calls=[WRONG])])


@pytest.fixture
def llm(engine):
    return ChatOMLX(engine=engine)


def sent(engine):
    return engine.calls[-1].options


@pytest.mark.parametrize(
    "given",
    [
        add,
        Add,
        AddDict,
        lambda: None,
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
        {"name": "add", "input_schema": {"type": "object", "properties": {}}, "cache_control": {"type": "ephemeral"}},
        {"title": "add", "description": "Adds.", "type": "object", "properties": {"a": {"type": "integer"}}},
    ],
    ids=["tool", "pydantic", "typed dict", "function", "openai", "anthropic", "schema"],
)
def test_every_form_of_a_tool_reaches_the_engine_in_openais(llm, engine, given):
    if callable(given) and getattr(given, "__name__", "") == "<lambda>":

        def given(a: int) -> int:
            """Adds."""
            return a

    llm.bind_tools([given]).invoke("Hi")
    [sent_tool] = sent(engine)["tools"]
    assert sent_tool["type"] == "function"
    assert sent_tool["function"]["name"].lower().startswith(("add", "given"))
    assert "cache_control" not in json.dumps(sent_tool)


def test_strict_is_part_of_the_tool(llm, engine):
    llm.bind_tools([add], strict=True).invoke("Hi")
    assert sent(engine)["tools"][0]["function"]["strict"] is True


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "add"),
        (False, "auto"),
        ("add", "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
        ({"type": "tool", "name": "add"}, "add"),
        ({"type": "any"}, "required"),
    ],
)
def test_every_form_of_a_choice_is_the_engines(llm, engine, choice, expected):
    llm.bind_tools([add], tool_choice=choice).invoke("Hi")
    assert sent(engine).get("tool_choice") == expected
    if choice is not True:
        llm.bind_tools([add]).invoke("Hi", tool_choice=choice)
        assert sent(engine).get("tool_choice") == (expected or "auto")


def test_parallel_calls_can_be_ruled_out(llm, engine):
    llm.bind_tools([add], parallel_tool_calls=False).invoke("Hi")
    assert sent(engine)["parallel_tool_calls"] is False
    llm.bind_tools([add], parallel_tool_calls=None).invoke("Hi", parallel_tool_calls=None)
    assert "parallel_tool_calls" not in sent(engine)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([add], "sub", "tool_choice='sub'"),
        ([add], {}, r"tool_choice=\{\}"),
        ([add], 3, "tool_choice=3"),
        ([], "any", r"tool_choice='any' with the tools \[\]"),
        ([add, Add], True, "2 tools"),
        ([3], None, r"tools\[0\]=3 is no tool"),
    ],
)
def test_a_choice_or_a_tool_that_cannot_be_is_an_error_when_it_is_bound(llm, tools, choice, message):
    with pytest.raises(InvalidToolError, match=message):
        llm.bind_tools(tools, tool_choice=choice)


@pytest.mark.parametrize(
    ("tools", "message"), [([add, add], "second of the name 'add'"), ([{"type": "web_search"}], "has no name")]
)
def test_tools_that_do_not_go_together_or_are_a_providers_own_are_an_error_of_the_call(llm, engine, tools, message):
    with pytest.raises(InvalidToolError, match=message):
        llm.bind_tools(tools).invoke("Hi")
    assert not engine.calls


# Calls


@pytest.mark.parametrize("form", FORMS)
async def test_calls_reasoning_and_text_come_apart(llm, form):
    first, *rest = await all_of(llm.bind_tools([add]), form, "Hi")
    message = sum(rest, first)
    assert message.content == "So: "
    assert message.additional_kwargs == {"reasoning_content": "hm"}
    assert message.tool_calls == [
        {"name": "add", "args": {"a": 1, "b": "é"}, "id": "call_1", "type": "tool_call"},
        {"name": "add", "args": {}, "id": "call_2", "type": "tool_call"},
    ]
    [invalid] = message.invalid_tool_calls
    assert (invalid["id"], json.loads(invalid["args"])) == ("call_3", WRONG.text)
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert message.usage_metadata["output_token_details"] == {"reasoning": 2}
    assert [block["type"] for block in message.content_blocks][:2] == ["reasoning", "text"]


def test_an_invalid_call_says_what_is_wrong_with_it(llm):
    [invalid] = llm.bind_tools([add]).invoke("Hi").invalid_tool_calls
    assert invalid["error"] == "there is no tool 'sub'"


@pytest.mark.parametrize("written", ["", "{}", '{"name": "add", "argu', "no JSON at all", "[1]", '"text"'])
@pytest.mark.parametrize("form", FORMS)
async def test_what_is_no_call_never_becomes_one(engine, llm, form, written):
    engine.answers = [FakeAnswer(invalid_tool_calls=[InvalidToolCall("call_1", written, "?")])]
    first, *rest = await all_of(llm.bind_tools([add]), form, "Hi")
    message = sum(rest, first)
    assert message.tool_calls == []
    assert [invalid["id"] for invalid in message.invalid_tool_calls] == ["call_1"]


@pytest.mark.parametrize("form", STREAMS)
async def test_a_call_streams_as_its_name_and_id_and_then_its_arguments_at_a_stable_index(llm, form):
    chunks = await all_of(llm.bind_tools([add]), form, "Hi")
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert [(piece["index"], piece["name"], piece["id"]) for piece in pieces] == [
        (0, "add", "call_1"),
        (0, None, None),
        (1, "add", "call_2"),
        (1, None, None),
        (2, None, "call_3"),
        (2, None, None),
    ]
    assert [piece["args"] for piece in pieces][:4] == ["", '{"a": 1, "b": "é"}', "", "{}"]


@pytest.mark.parametrize("form", FORMS)
async def test_standard_blocks_are_the_same_streamed_and_whole(engine, form):
    answer = FakeAnswer(["So: "], reasoning="hm", tool_calls=[ONE, TWO])
    engine.answers = [answer]
    llm = ChatOMLX(engine=engine, output_version="v1").bind_tools([add])
    first, *rest = await all_of(llm, form, "Hi")
    message = sum(rest, first)
    blocks = [{key: value for key, value in block.items() if key != "index"} for block in message.content]
    assert blocks == [
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "text", "text": "So: "},
        {"type": "tool_call", "id": "call_1", "name": "add", "args": {"a": 1, "b": "é"}},
        {"type": "tool_call", "id": "call_2", "name": "add", "args": {}},
    ]
    assert [call["id"] for call in message.tool_calls] == ["call_1", "call_2"]


@pytest.mark.parametrize("form", STREAMS)
async def test_text_between_calls_is_a_block_of_its_own(form):
    class Between(FakeEngine):
        def _play(self, answer, params):
            *chunks, last = super()._play(answer, params)
            yield from [*chunks, *chunks, last]

    engine = Between([FakeAnswer(["So: "], tool_calls=[ONE])])
    first, *rest = await all_of(ChatOMLX(engine=engine, output_version="v1").bind_tools([add]), form, "Hi")
    message: AIMessageChunk = sum(rest, first)
    assert [block["type"] for block in message.content] == ["text", "tool_call", "text", "tool_call"]
    assert [block["index"] for block in message.content if "index" in block] == [0, 2]


def test_calls_and_results_go_back_as_they_came(llm, engine):
    answer = llm.bind_tools([add]).invoke("Hi")
    llm.bind_tools([add]).invoke([HumanMessage("Hi"), answer, ToolMessage("3", tool_call_id="call_1")])
    _, assistant, result = engine.calls[-1].prompt
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": 1, "b": "é"}, {}]
    assert assistant["reasoning_content"] == "hm"
    assert result == {"role": "tool", "content": "3", "tool_call_id": "call_1"}


# The real engine


@pytest.fixture(scope="module")
def tiny_engine():
    with Engine(tiny_llama(), chat_tokenizer()) as engine:
        yield engine


@pytest.mark.parametrize("form", FORMS)
async def test_even_a_random_model_makes_the_call_that_it_must(tiny_engine, form):
    llm = ChatOMLX(engine=tiny_engine, max_tokens=200)
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    ping = {"name": "ping", "description": "Pings.", "parameters": schema}
    first, *rest = await all_of(llm.bind_tools([add, ping], tool_choice="ping"), form, "Hi")
    [call] = sum(rest, first).tool_calls
    assert call["name"] == "ping"
    assert call["args"]["unit"] in ("C", "F")


def test_a_forced_call_without_the_extra_is_an_error_that_names_it(monkeypatch, tiny_engine):
    def missing(_):
        raise MissingDependencyError("pip install 'omlx-plugins[structured]'")

    monkeypatch.setattr(constraint_compiler, "_make_ll_tokenizer", missing)
    monkeypatch.setattr(tiny_engine._maker._constraints, "_llguidance_tokenizer", None)
    with pytest.raises(MissingDependencyError, match="structured"):
        ChatOMLX(engine=tiny_engine).bind_tools([add], tool_choice="any").invoke("Hi")


def test_response_format_beside_tools_is_a_call_or_the_schema(llm, engine):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    bound = llm.bind_tools(
        [add], response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    )
    bound.invoke("Hi")
    options = sent(engine)
    assert json.loads(options["constraint"].schema) == {**schema, "additionalProperties": False}
    assert "tool_choice" not in options
    with pytest.raises(InvalidConstraintError, match="has no schema"):
        llm.invoke("Hi", response_format={"type": "json_schema"})
