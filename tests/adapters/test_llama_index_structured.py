"""Objects of a class as answers, in every form and mode."""

from __future__ import annotations

import json

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index_forms import CHAT_FORMS, STRUCTURED_FORMS, all_of
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import BaseModel, Field, ValidationError, field_validator
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import Engine
from omlx_core.engine.constraints import JSONSchema
from omlx_core.engine.results import ToolCall
from omlx_core.errors import UnusableAnswerError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.llama_index import OMLX

PROMPT = PromptTemplate("Where is {what}?")
STREAMS = [form for form in STRUCTURED_FORMS if "stream" in form]


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=9, description="how far to the right")
    name: str = Field(max_length=3)

    @field_validator("name")
    @classmethod
    def is_lower(cls, name: str) -> str:
        if name != name.lower():
            raise ValueError("must be lower case")
        return name


@pytest.fixture
def engine():
    return FakeEngine([FakeAnswer(["", '{"x": ', "3, ", '"name": "a', "b", '"}'])])


@pytest.fixture
def llm(engine):
    return OMLX(engine=engine)


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_an_answer_of_the_schema_is_an_object(llm, engine, form):
    assert (await all_of(llm, form, Point, PROMPT, what="it"))[-1] == Point(x=3, name="ab")
    constraint = engine.calls[0].options["constraint"]
    assert isinstance(constraint, JSONSchema)
    assert not constraint.strict
    sent = json.loads(constraint.schema)
    assert sent["properties"]["x"]["maximum"] == 9
    assert sent["additionalProperties"] is False
    assert "tools" not in engine.calls[0].options


@pytest.mark.parametrize("form", STREAMS)
async def test_the_object_grows_while_it_is_streamed_and_comes_once_each_time(llm, form):
    objects = await all_of(llm, form, Point, PROMPT, what="it")
    assert [(object.x, object.name) for object in objects] == [(None, None), (3, None), (3, "a"), (3, "ab")]
    assert [isinstance(object, FlexibleModel) for object in objects] == [True, True, False, False]


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_the_model_is_shown_the_schema_before_what_it_is_asked(llm, engine, form):
    await all_of(llm, form, Point, PROMPT, what="it")
    [message] = engine.calls[0].prompt
    schema, question = message["content"].rsplit("\n", 1)
    assert "how far to the right" in schema
    assert question == "Where is it?"


def test_the_schema_comes_after_what_the_system_says(engine):
    llm = OMLX(engine=engine, system_prompt="Be brief.")
    prompt = ChatPromptTemplate([ChatMessage("Where?"), ChatMessage("There", role="assistant"), ChatMessage("{what}")])
    llm.structured_predict(Point, prompt, what="it")
    system, *others = engine.calls[0].prompt
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\nAnswer with a JSON object")
    assert [message["content"] for message in others] == ["Where?", "There", "it"]


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_options_of_the_request_are_passed_on_but_for_those_of_forced_calls(llm, engine, form):
    given = {"max_tokens": 7, "tool_choice": "any", "tool_required": True, "allow_parallel_tool_calls": False}
    await all_of(llm, form, Point, PROMPT, llm_kwargs=given, what="it")
    assert engine.calls[0].options["max_tokens"] == 7
    assert given["tool_choice"] == "any"


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_an_answer_that_was_cut_off_is_an_error(engine, llm, form):
    engine.answers = [FakeAnswer(['{"x": 3, "name": "a'], finish_reason="length")]
    with pytest.raises(UnusableAnswerError, match=r"the Point was cut off before it was complete.*max_tokens"):
        await all_of(llm, form, Point, PROMPT, what="it")


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_what_the_schema_does_not_say_is_validated(engine, llm, form):
    engine.answers = ['{"x": 3, "name": "A"}']
    with pytest.raises(ValidationError, match="lower case"):
        await all_of(llm, form, Point, PROMPT, what="it")


@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")  # LlamaIndex calls it
@pytest.mark.parametrize("form", CHAT_FORMS)
async def test_a_structured_llm_answers_with_objects(llm, form):
    response = (await all_of(llm.as_structured_llm(Point), form, [ChatMessage("Where?")]))[-1]
    assert response.raw == Point(x=3, name="ab")


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_function_mode_shows_the_class_as_a_tool_and_forces_its_call(engine, form):
    engine.answers = [FakeAnswer(tool_calls=[ToolCall("call_1", "Point", {"x": 3, "name": "ab"})])]
    llm = OMLX(engine=engine, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert (await all_of(llm, form, Point, PROMPT, what="it"))[-1] == Point(x=3, name="ab")
    options = engine.calls[0].options
    assert [tool["function"]["name"] for tool in options["tools"]] == ["Point"]
    assert options["tool_choice"] == "required"
    assert "constraint" not in options


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_text_mode_leaves_it_to_llama_index(engine, form):
    llm = OMLX(engine=engine, pydantic_program_mode=PydanticProgramMode.LLM)
    assert (await all_of(llm, form, Point, PROMPT, what="it"))[-1] == Point(x=3, name="ab")
    assert engine.calls[0].options.keys().isdisjoint({"tools", "constraint"})


@pytest.mark.parametrize("form", ["__call__", "acall", "stream_call", "astream_call"])
async def test_llama_indexs_own_program_finds_the_call(engine, llm, form):
    engine.answers = [FakeAnswer(tool_calls=[ToolCall("call_1", "Point", {"x": 3, "name": "ab"})])]
    program = FunctionCallingProgram.from_defaults(Point, prompt=PROMPT, llm=llm)
    assert (await all_of(program, form, what="it"))[-1] == Point(x=3, name="ab")


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_observers_see_a_prediction_from_its_beginning_to_its_end(llm, form):
    class Names(BaseEventHandler):
        seen: list[str] = Field(default_factory=list)

        def handle(self, event, **_):
            self.seen.append(event.class_name())

    names, dispatcher = Names(), get_dispatcher()
    dispatcher.add_event_handler(names)
    try:
        await all_of(llm, form, Point, PROMPT, what="it")
    finally:
        dispatcher.event_handlers.remove(names)
    assert names.seen[0] == "LLMStructuredPredictStartEvent"
    assert names.seen[-1] == "LLMStructuredPredictEndEvent"
    assert names.seen.count("LLMChatEndEvent") == 1


# The real engine


@pytest.fixture(scope="module")
def tiny_engine():
    with Engine(tiny_llama(), tiny_tokenizer()) as engine:
        yield engine


class Choice(BaseModel):
    """What even a random model ends."""

    is_warm: bool
    digit: int = Field(ge=0, le=9)


@pytest.mark.parametrize("form", STRUCTURED_FORMS)
async def test_even_a_random_model_makes_an_object_of_the_class(tiny_engine, form):
    predicted = (await all_of(OMLX(engine=tiny_engine), form, Choice, PROMPT, what="it"))[-1]
    assert type(predicted) is Choice
