"""Answers of a schema, in every form of schema and method."""

from __future__ import annotations

import json
from typing import Annotated, TypedDict

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_forms import FORMS, STREAMS, all_of
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import Engine
from omlx_core.engine.results import ToolCall
from omlx_core.errors import InvalidConstraintError, InvalidParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.langchain.response_format import convert_response_format
from omlx_plugins.schemas import close_objects

SCHEMA = {"title": "Point", "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=9)


class PointV1(BaseModelV1):
    """A point."""

    x: int


class PointDict(TypedDict):
    """A point."""

    x: Annotated[int, ..., "where"]


FUNCTION = {"name": "Point", "description": "A point.", "parameters": {**SCHEMA}}
SCHEMAS = [Point, PointV1, PointDict, SCHEMA, FUNCTION]


@pytest.fixture
def engine():
    return FakeEngine([FakeAnswer(['{"x"', ": 3}"], tool_calls=())])


@pytest.fixture
def llm(engine):
    return ChatOMLX(engine=engine)


def is_point(answer, schema):
    return answer == ({"x": 3} if not isinstance(schema, type) or schema is PointDict else schema(x=3))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: getattr(schema, "__name__", "dict"))
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
@pytest.mark.parametrize("form", FORMS)
async def test_an_answer_of_the_schema_is_an_object(llm, engine, schema, method, form):
    *_, last = await all_of(llm.with_structured_output(schema, method=method), form, "Hi")
    assert is_point(last, schema)
    constraint = engine.calls[0].options["constraint"]
    sent = json.loads(constraint.schema)
    assert sent["properties"]["x"]["type"] == "integer"
    assert sent["additionalProperties"] is False
    assert constraint.strict is False
    assert "tools" not in engine.calls[0].options


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: getattr(schema, "__name__", "dict"))
@pytest.mark.parametrize("form", FORMS)
async def test_a_call_of_the_schema_is_an_object(llm, engine, schema, form):
    name = getattr(schema, "__name__", "Point")
    engine.answers = [FakeAnswer(tool_calls=[ToolCall("call_1", name, {"x": 3})])]
    *_, last = await all_of(llm.with_structured_output(schema, method="function_calling"), form, "Hi")
    assert is_point(last, schema)
    options = engine.calls[0].options
    assert [tool["function"]["name"] for tool in options["tools"]] == [name]
    assert (options["tool_choice"], options["parallel_tool_calls"]) == (name, False)
    assert "constraint" not in options


@pytest.mark.parametrize("form", STREAMS)
async def test_a_dictionary_grows_while_it_streams(llm, engine, form):
    engine.answers = [FakeAnswer(['{"x": 3', ', "y": [1', ", 2]}"])]
    seen = await all_of(llm.with_structured_output({"type": "object", "properties": {}}), form, "Hi")
    assert seen == [{"x": 3}, {"x": 3, "y": [1]}, {"x": 3, "y": [1, 2]}]


def test_strict_reaches_the_constraint_and_the_tool(llm, engine):
    llm.with_structured_output(Point, strict=True).invoke("Hi")
    assert engine.calls[-1].options["constraint"].strict is True
    engine.answers = [FakeAnswer(tool_calls=[ToolCall("call_1", "Point", {"x": 3})])]
    llm.with_structured_output(Point, method="function_calling", strict=True).invoke("Hi")
    assert engine.calls[-1].options["tools"][0]["function"]["strict"] is True


def test_json_mode_needs_no_schema(llm, engine):
    assert llm.with_structured_output(method="json_mode").invoke("Hi") == {"x": 3}
    assert json.loads(engine.calls[0].options["constraint"].schema) == {"type": "object"}


def test_raw_answers_come_beside_what_they_are_parsed_to_or_why_not(llm, engine):
    chain = llm.with_structured_output(Point, include_raw=True)
    whole = chain.invoke("Hi")
    assert (whole["raw"].content, whole["parsed"], whole["parsing_error"]) == ('{"x": 3}', Point(x=3), None)
    engine.answers = ['{"x": 33}']
    wrong = chain.invoke("Hi")
    assert (wrong["raw"].content, wrong["parsed"]) == ('{"x": 33}', None)
    assert isinstance(wrong["parsing_error"], OutputParserException)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_an_answer_that_was_cut_off_is_an_error_that_says_so(llm, engine, form, method):
    calls = [ToolCall("call_1", "Point", {"x": 3})] if method == "function_calling" else []
    engine.answers = [FakeAnswer(['{"x": 3, "y'], tool_calls=calls, finish_reason="length")]
    with pytest.raises(OutputParserException, match=r"cut off.*max_tokens"):
        await all_of(llm.with_structured_output(SCHEMA, method=method), form, "Hi")


def test_options_can_be_bound_beside_the_schema(llm, engine):
    llm.with_structured_output(Point, max_tokens=7).invoke("Hi")
    assert engine.calls[0].options["max_tokens"] == 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schema": Point, "method": "xml"}, InvalidParameterError, "method='xml'"),
        ({}, InvalidParameterError, "without a schema"),
        ({"schema": 3}, InvalidConstraintError, "schema=3 is none"),
    ],
)
def test_what_cannot_be_meant_is_an_error_at_once(llm, arguments, error, message):
    with pytest.raises(error, match=message):
        llm.with_structured_output(**arguments)


def test_every_form_of_a_response_format_is_a_constraint():
    assert convert_response_format({"type": "text"}) is None
    for given in (Point, PointDict, SCHEMA):
        assert json.loads(convert_response_format(given).schema)["additionalProperties"] is False


def test_objects_are_closed_where_the_schema_says_nothing():
    inner = {"properties": {"y": {}}}
    schema = {
        "properties": {"a": inner, "b": {"items": inner}, "c": {"anyOf": [inner, {"type": "null"}]}},
        "$defs": {"d": inner},
        "additionalProperties": True,
    }
    closed = {**inner, "additionalProperties": False}
    assert close_objects(schema) == {
        "properties": {"a": closed, "b": {"items": closed}, "c": {"anyOf": [closed, {"type": "null"}]}},
        "$defs": {"d": closed},
        "additionalProperties": True,
    }
    assert close_objects({"allOf": [inner], "properties": {}}) == {"allOf": [inner], "properties": {}}
    assert close_objects({"type": "object"}) == {"type": "object"}


@pytest.mark.parametrize("form", FORMS)
async def test_even_a_random_model_answers_with_the_schema(form):
    with Engine(tiny_llama(), tiny_tokenizer()) as engine:
        llm = ChatOMLX(engine=engine, max_tokens=60)
        *_, last = await all_of(llm.with_structured_output(Point), form, "Hi")
    assert isinstance(last, Point)
