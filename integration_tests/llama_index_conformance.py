"""What LlamaIndex may ask of any function-calling LLM, as a suite to be inherited from.

::

    class TestMyLLM(FunctionCallingLLMConformance):
        def make_llm(self, **options):
            return MyLLM(model="…", **options)

It asks little of the model: short greedy answers, and calls and objects that are demanded. What a model or a class
can't do is switched off by overriding a property. A method's streaming and asynchronous forms are asked alike and have
to answer alike.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import pytest
from llama_index.core import Settings
from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    ChatResponse,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_forms import CHAT_FORMS, COMPLETE_FORMS, STRUCTURED_FORMS, WITH_TOOLS_FORMS, all_of
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import BaseModel, Field

PREDICT_FORMS = ("predict", "stream", "apredict", "astream")
WAIT_S = 60

QUESTION = "What is the capital of France?"
TEMPLATE = PromptTemplate("What is the capital of {country}?")


class Weather(BaseModel):
    """Where to look."""

    city: str = Field(description="the city", max_length=8)


class Reading(BaseModel):
    """What a thermometer says."""

    unit: Literal["C", "F"]


class Nested(BaseModel):
    """Two things."""

    inner: Reading
    flags: list[bool] = Field(max_length=1)


def weather(city: str) -> str:
    return f"It is sunny in {city}."


def fail() -> str:
    raise RuntimeError("the thermometer is broken")


WEATHER = FunctionTool.from_defaults(weather, description="The weather in a city.", fn_schema=Weather)
FAILING = FunctionTool.from_defaults(fail, description="Reads the thermometer.")


def text_of(response: Any) -> str:
    """A response's text, of a chat or of a completion."""
    text = response.message.content if isinstance(response, ChatResponse) else response.text
    assert isinstance(text, str)
    return text


@contextmanager
def observed() -> Iterator[list[str]]:
    """The names of all events of the block."""

    class Observer(BaseEventHandler):
        names: list[str] = Field(default_factory=list)

        def handle(self, event: Any, **_: Any) -> None:
            self.names.append(event.class_name())

    observer, dispatcher = Observer(), get_dispatcher()
    dispatcher.add_event_handler(observer)
    try:
        yield observer.names
    finally:
        dispatcher.event_handlers.remove(observer)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0)


class FunctionCallingLLMConformance(ABC):
    """The suite. An LLM of `make_llm` answers greedily, in a few tokens."""

    @abstractmethod
    def make_llm(self, **options: Any) -> FunctionCallingLLM:
        """The LLM under test, with what it is made for and ``options`` on top, such as ``max_tokens``."""

    def make_thinking_llm(self) -> FunctionCallingLLM | None:
        """One that thinks before it answers; None skips what is tested of that."""
        return None

    def num_active_requests(self, llm: FunctionCallingLLM) -> int | None:
        """Requests that the model still works on; None skips what is tested of cancelling."""
        return None

    @property
    def call_tokens(self) -> int:
        """Most tokens of a call, or an object, that is demanded."""
        return 40

    @property
    def supports_images(self) -> bool:
        return False

    @property
    def supports_cached_tokens(self) -> bool:
        """Whether ``raw["usage"]["prompt_tokens_details"]`` says what was reused."""
        return True

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        return self.make_llm(max_tokens=3)

    @pytest.fixture
    def calling_llm(self) -> FunctionCallingLLM:
        return self.make_llm(max_tokens=self.call_tokens)

    # What it says of itself.

    def test_metadata(self, llm: FunctionCallingLLM) -> None:
        metadata = llm.metadata
        assert metadata.context_window > metadata.num_output == 3
        assert metadata.is_chat_model
        assert metadata.is_function_calling_model
        assert metadata.model_name != "unknown"

    def test_settings_take_it(self, llm: FunctionCallingLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Settings, "_llm", None)
        Settings.llm = llm
        assert Settings.llm is llm

    def test_a_copy_that_was_written_down_answers_alike(self) -> None:
        llm = self.make_llm(max_tokens=1)
        copies = [
            type(llm).from_dict(llm.to_dict()),
            type(llm).from_json(llm.to_json()),
            pickle.loads(pickle.dumps(llm)),
            copy.deepcopy(llm),
        ]
        assert all(other.to_dict() == llm.to_dict() for other in copies)
        assert len({text_of(other.complete(QUESTION)) for other in [llm, *copies]}) == 1

    # Text.

    @pytest.mark.parametrize("forms", [CHAT_FORMS, COMPLETE_FORMS], ids=["chat", "complete"])
    async def test_all_forms_give_the_same_text(self, llm: FunctionCallingLLM, forms: Sequence[str]) -> None:
        question = [ChatMessage(QUESTION)] if forms is CHAT_FORMS else QUESTION
        answers = [await all_of(llm, form, question) for form in forms]
        texts = [text_of(responses[-1]) for responses in answers]
        assert len(set(texts)) == 1
        assert texts[0]
        for responses, form in zip(answers, forms, strict=True):
            if "stream" in form:
                assert len(responses) > 1
                self.check_stream(responses)

    def check_stream(self, responses: list[Any]) -> None:
        """Each response has what came before it, and its own part."""
        text = ""
        for response in responses:
            text += response.delta or ""
            assert text_of(response) == text

    async def test_all_forms_of_a_prediction_give_the_same_text(self, llm: FunctionCallingLLM) -> None:
        texts = ["".join(await all_of(llm, form, TEMPLATE, country="France")) for form in PREDICT_FORMS]
        assert set(texts) == {text_of(llm.chat([ChatMessage(QUESTION)]))}

    def test_a_system_prompt_is_said_before_a_prediction(self) -> None:
        system = "Answer in capital letters, please. " * 4
        llm = self.make_llm(max_tokens=3, system_prompt=system)
        chat = [ChatMessage(system, role="system"), ChatMessage(QUESTION)]
        assert llm.predict(TEMPLATE, country="France") == text_of(llm.chat(chat))

    def test_a_conversation_goes_on(self, llm: FunctionCallingLLM) -> None:
        chat = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]
        answer = llm.chat(chat)
        assert text_of(llm.chat([*chat, answer.message, ChatMessage("And of Italy?")]))

    def test_an_empty_message_of_the_assistant_is_no_hindrance(self, llm: FunctionCallingLLM) -> None:
        assert text_of(llm.chat([ChatMessage("Hi"), ChatMessage(role="assistant", blocks=[]), ChatMessage(QUESTION)]))

    async def test_questions_at_the_same_time_are_answered_as_if_alone(self, llm: FunctionCallingLLM) -> None:
        questions = [f"What is the capital of {country}?" for country in ("France", "Italy")]
        alone = [text_of(llm.complete(question)) for question in questions]
        together = await asyncio.gather(*(llm.acomplete(question) for question in questions))
        assert [text_of(response) for response in together] == alone
        with ThreadPoolExecutor(len(questions)) as threads:
            assert [text_of(response) for response in threads.map(llm.complete, questions)] == alone

    @pytest.mark.parametrize(
        "block",
        [
            ImageBlock(url="http://localhost/x.png"),
            AudioBlock(url="http://localhost/x.wav"),
            DocumentBlock(url="http://localhost/x.pdf"),
        ],
        ids=["image", "audio", "document"],
    )
    async def test_a_block_that_it_cannot_take_is_an_error_that_names_it(
        self, llm: FunctionCallingLLM, block: Any
    ) -> None:
        if self.supports_images:
            pytest.skip("the model takes more than text")
        for form in CHAT_FORMS:
            with pytest.raises(ValueError, match=type(block).__name__):
                await all_of(llm, form, [ChatMessage(blocks=[TextBlock(text="Look:"), block])])

    # Usage and counting.

    @pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
    async def test_tokens_are_counted_and_an_option_of_a_call_counts_most(
        self, llm: FunctionCallingLLM, form: str
    ) -> None:
        counter = TokenCountingHandler(tokenizer=list)
        llm.callback_manager = CallbackManager([counter])
        question = [ChatMessage(QUESTION)] if form in CHAT_FORMS else QUESTION
        raw = (await all_of(llm, form, question, max_tokens=2))[-1].raw
        usage = raw["usage"]
        assert raw["finish_reason"] == "length"
        assert usage["completion_tokens"] == counter.completion_llm_token_count == 2
        assert usage["prompt_tokens"] == counter.prompt_llm_token_count
        assert usage["total_tokens"] == usage["prompt_tokens"] + 2
        if self.supports_cached_tokens:
            assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]

    def test_a_prompt_that_comes_again_is_reused(self, llm: FunctionCallingLLM) -> None:
        if not self.supports_cached_tokens:
            pytest.skip("it doesn't say what was reused")
        chat = [ChatMessage("These are the rules of the house. " * 8, role="system"), ChatMessage("Which?")]
        llm.chat(chat, max_tokens=1)
        usage = llm.chat(chat, max_tokens=1).raw["usage"]  # type: ignore[index]
        assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2

    # Tools.

    @pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
    async def test_a_call_that_is_demanded_comes(self, calling_llm: FunctionCallingLLM, form: str) -> None:
        history = [ChatMessage("Hi", role="user"), ChatMessage("Hello.", role="assistant")]
        responses = await all_of(
            calling_llm,
            form,
            [WEATHER, FAILING],
            user_msg="How is the weather in Rome?",
            chat_history=history,
            tool_choice="weather",
        )
        assert len(history) == 2
        for response in responses:
            calling_llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
        [call] = calling_llm.get_tool_calls_from_response(responses[-1])
        assert call.tool_name == "weather"
        assert call.tool_id
        assert 0 < len(Weather(**call.tool_kwargs).city) <= 8
        [block] = [block for block in responses[-1].message.blocks if isinstance(block, ToolCallBlock)]
        assert (block.tool_call_id, block.tool_kwargs) == (call.tool_id, call.tool_kwargs)

    def test_calls_can_be_demanded_and_be_parallel(self, calling_llm: FunctionCallingLLM) -> None:
        response = calling_llm.chat_with_tools(
            [FAILING], "How warm is it?", tool_required=True, allow_parallel_tool_calls=True
        )
        calls = calling_llm.get_tool_calls_from_response(response)
        assert len({call.tool_id for call in calls}) == len(calls) >= 1

    @pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
    async def test_calls_can_be_forbidden(self, llm: FunctionCallingLLM, form: str) -> None:
        response = (await all_of(llm, form, [WEATHER], user_msg=QUESTION, tool_choice="none"))[-1]
        assert text_of(response)
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ValueError, match="call"):
            llm.get_tool_calls_from_response(response)

    @pytest.mark.parametrize("form", WITH_TOOLS_FORMS)
    async def test_a_tool_that_there_is_not_is_an_error(self, llm: FunctionCallingLLM, form: str) -> None:
        with pytest.raises(ValueError, match="no_such_tool"):
            await all_of(llm, form, [WEATHER], user_msg=QUESTION, tool_choice="no_such_tool")

    def test_no_tools_are_a_chat(self, llm: FunctionCallingLLM) -> None:
        assert text_of(llm.chat_with_tools([], QUESTION)) == text_of(llm.chat([ChatMessage(QUESTION)]))

    @pytest.mark.parametrize("form", ["chat", "astream_chat"])
    async def test_results_go_back(self, llm: FunctionCallingLLM, form: str) -> None:
        calls = [
            ToolCallBlock(tool_call_id=f"call_{city}", tool_name="weather", tool_kwargs={"city": city})
            for city in ("Rome", "Bern")
        ]
        chat = [
            ChatMessage("How is the weather in Rome and Bern?"),
            ChatMessage(role="assistant", blocks=calls),
            *(
                ChatMessage("Sunny.", role="tool", additional_kwargs={"tool_call_id": call.tool_call_id})
                for call in calls
            ),
        ]
        assert text_of((await all_of(llm, form, chat))[-1])

    @pytest.mark.parametrize("form", ["predict_and_call", "apredict_and_call"])
    async def test_predict_and_call_calls(self, calling_llm: FunctionCallingLLM, form: str) -> None:
        [response] = await all_of(
            calling_llm, form, [WEATHER], user_msg="How is the weather in Rome?", tool_required=True
        )
        [source] = response.sources
        assert response.response == source.content
        assert response.response.startswith("It is sunny in ")

    def test_a_tool_that_fails_can_be_an_error(self, calling_llm: FunctionCallingLLM) -> None:
        given: dict[str, Any] = {"tool_required": True, "error_on_tool_error": True}
        with pytest.raises(ValueError, match="thermometer is broken"):
            calling_llm.predict_and_call([FAILING], "How warm is it?", **given)

    # Objects.

    @pytest.mark.parametrize("form", STRUCTURED_FORMS)
    async def test_an_object_of_the_class_comes(self, calling_llm: FunctionCallingLLM, form: str) -> None:
        prompt = PromptTemplate("How warm is it in {city}?")
        with observed() as names:
            objects = await all_of(calling_llm, form, Reading, prompt, city="Rome")
        assert type(objects[-1]) is Reading
        assert (names[0], names[-1]) == ("LLMStructuredPredictStartEvent", "LLMStructuredPredictEndEvent")
        if "stream" in form:
            assert len(objects) > 1

    @pytest.mark.parametrize("form", STRUCTURED_FORMS)
    async def test_an_object_that_is_cut_off_is_an_error(self, llm: FunctionCallingLLM, form: str) -> None:
        prompt = PromptTemplate("How warm is it?")
        with pytest.raises(ValueError, match="Nested"):
            await all_of(llm, form, Nested, prompt, llm_kwargs={"max_tokens": 3})

    def test_an_object_may_have_others_within(self, calling_llm: FunctionCallingLLM) -> None:
        assert isinstance(calling_llm.structured_predict(Nested, PromptTemplate("How warm is it?")), Nested)

    # LlamaIndex's own class uses a method that pydantic has given up.
    @pytest.mark.filterwarnings("ignore:The `json` method is deprecated")
    @pytest.mark.parametrize("form", CHAT_FORMS)
    async def test_a_structured_llm_answers_with_objects(self, calling_llm: FunctionCallingLLM, form: str) -> None:
        structured = calling_llm.as_structured_llm(Reading)
        last = (await all_of(structured, form, [ChatMessage("How warm is it?")]))[-1]
        assert type(last.raw) is Reading
        assert Reading.model_validate_json(last.message.content) == last.raw

    def test_a_program_makes_an_object_of_a_call(self, calling_llm: FunctionCallingLLM) -> None:
        program = FunctionCallingProgram.from_defaults(
            Reading, prompt=PromptTemplate("How warm is it?"), llm=calling_llm
        )
        assert isinstance(program(), Reading)

    # Thinking.

    @pytest.mark.parametrize("form", CHAT_FORMS)
    async def test_thinking_is_a_block_of_its_own(self, form: str) -> None:
        llm = self.make_thinking_llm()
        if llm is None:
            pytest.skip("the model doesn't think")
        responses = await all_of(llm, form, [ChatMessage(QUESTION)])
        message = responses[-1].message
        thinking, text = message.blocks
        assert isinstance(thinking, ThinkingBlock)
        assert isinstance(text, TextBlock)
        assert thinking.content
        assert thinking.content not in text_of(responses[-1])
        if "stream" in form:
            deltas = [response.additional_kwargs.get("thinking_delta", "") for response in responses]
            assert "".join(deltas) == thinking.content
            self.check_stream(responses)
        assert text_of(llm.chat([ChatMessage(QUESTION), message, ChatMessage("And of Italy?")]))

    # Cancelling.

    def _check_counts(self, llm: FunctionCallingLLM) -> None:
        if self.num_active_requests(llm) is None:
            pytest.skip("it isn't known when the model stops")

    @pytest.mark.parametrize("form", ["stream_chat", "stream_complete"])
    def test_closing_a_stream_ends_its_request(self, form: str) -> None:
        llm = self.make_llm(max_tokens=500)
        self._check_counts(llm)
        stream = getattr(llm, form)([ChatMessage(QUESTION)] if form in CHAT_FORMS else QUESTION)
        next(stream)
        assert self.num_active_requests(llm) == 1
        stream.close()
        wait_until(lambda: self.num_active_requests(llm) == 0)

    @pytest.mark.parametrize("form", ["astream_chat", "astream_complete"])
    async def test_closing_an_asynchronous_stream_ends_its_request(self, form: str) -> None:
        llm = self.make_llm(max_tokens=500)
        self._check_counts(llm)
        stream = await getattr(llm, form)([ChatMessage(QUESTION)] if form in CHAT_FORMS else QUESTION)
        await anext(stream)
        assert self.num_active_requests(llm) == 1
        await stream.aclose()
        await asyncio.to_thread(wait_until, lambda: self.num_active_requests(llm) == 0)

    @pytest.mark.parametrize("form", ["achat", "acomplete", "achat_with_tools", "astructured_predict"])
    async def test_cancelling_a_task_ends_its_request(self, form: str) -> None:
        llm = self.make_llm(max_tokens=500)
        self._check_counts(llm)
        arguments: dict[str, tuple[Any, ...]] = {
            "achat": ([ChatMessage(QUESTION)],),
            "acomplete": (QUESTION,),
            "achat_with_tools": ([WEATHER], QUESTION),
            "astructured_predict": (Unbounded, TEMPLATE),
        }
        options = {"country": "France"} if form == "astructured_predict" else {}
        task = asyncio.create_task(getattr(llm, form)(*arguments[form], **options))
        await asyncio.sleep(0)
        await asyncio.to_thread(wait_until, lambda: self.num_active_requests(llm) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: self.num_active_requests(llm) == 0)

    # Observers.

    @pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
    async def test_observers_and_callbacks_see_a_request_from_its_beginning_to_its_end(
        self, llm: FunctionCallingLLM, form: str
    ) -> None:
        kind, result = ("LLMChat", "response") if form in CHAT_FORMS else ("LLMCompletion", "completion")
        debug = LlamaDebugHandler(print_trace_on_end=False)
        llm.callback_manager = CallbackManager([debug])
        with observed() as names:
            question = [ChatMessage(QUESTION)] if form in CHAT_FORMS else QUESTION
            responses = await all_of(llm, form, question, max_tokens=1)
        in_between = [f"{kind}InProgressEvent"] * len(responses) if "stream" in form else []
        assert names == [f"{kind}StartEvent", *in_between, f"{kind}EndEvent"]
        [[start, end]] = debug.get_llm_inputs_outputs()
        assert start.payload["serialized"]["class_name"] == llm.class_name()
        assert end.payload[result] == responses[-1]

    @pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
    async def test_callbacks_see_a_request_fail(self, llm: FunctionCallingLLM, form: str) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        llm.callback_manager = CallbackManager([debug])
        with pytest.raises((TypeError, ValueError)):
            await all_of(llm, form, [ChatMessage(QUESTION)] if form in CHAT_FORMS else QUESTION, no_such_option=1)
        [[_, failed]] = debug.get_event_pairs(CBEventType.LLM)
        assert "exception" in failed.payload


class Unbounded(BaseModel):
    """A text of any length."""

    text: str
