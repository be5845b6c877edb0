from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_tests.unit_tests import ChatModelUnitTests
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, GenerationParams, ModelPool
from omlx_core.engine import shared
from omlx_core.errors import EngineError, InvalidParameterError, InvalidPromptError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.langchain.messages import convert_messages

TIMEOUT_S = 30


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([FakeAnswer(["Hel", "", "lo"])])


@pytest.fixture
def llm(engine: FakeEngine) -> ChatOMLX:
    return ChatOMLX(engine=engine)


class TestStandardSuite(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatOMLX]:
        return ChatOMLX

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "some/model"}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


# Construction


def test_construction_loads_nothing(monkeypatch):
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: pytest.fail("loaded")))
    llm = ChatOMLX(model="some/model", max_tokens=8)
    assert llm._llm_type == "omlx"
    assert llm._get_ls_params()["ls_model_name"] == "some/model"


def test_the_first_request_loads_the_shared_engine(monkeypatch, engine):
    specs = []
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: specs.append(spec) or engine))
    cache = CacheSettings(block_size=16)
    ChatOMLX(model=Path("some/model"), kv_cache=cache).invoke("Hi")
    ChatOMLX(model="some/model", kv_cache=cache, temperature=0.5).invoke("Hi")
    assert [(spec.model, spec.cache) for spec in specs] == [("some/model", cache)]


async def test_a_load_from_a_coroutine_leaves_the_event_loop_free(monkeypatch, engine):
    started, gate = threading.Event(), threading.Event()

    def load(*_: Any) -> FakeEngine:
        started.set()
        assert gate.wait(TIMEOUT_S)
        return engine

    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=load))
    task = asyncio.create_task(ChatOMLX(model="some/model").ainvoke("Hi"))
    assert await asyncio.to_thread(started.wait, TIMEOUT_S)
    gate.set()
    assert (await task).content == "Hello"


def test_the_defaults_are_the_engines():
    fields = ChatOMLX.model_fields
    options = {field.name for field in dataclasses.fields(GenerationParams)} & fields.keys()
    assert {"temperature", "xtc_threshold", "repetition_penalty", "top_logprobs", "timeout_s", "store"} < options
    defaults = {name: fields[name].get_default(call_default_factory=True) for name in options}
    assert GenerationParams.from_options(defaults) == GenerationParams()


def test_a_misspelled_field_is_an_error_that_suggests_the_right_one():
    with pytest.raises(UnknownParameterError, match="'temprature': did you mean 'temperature'"):
        ChatOMLX(model="some/model", temprature=1.0)


def test_a_field_out_of_range_is_an_error_at_construction():
    with pytest.raises(InvalidParameterError, match="max_tokens=0"):
        ChatOMLX(model="some/model", max_tokens=0)


def test_hosted_models_parameters_are_accepted():
    assert ChatOMLX(model="some/model", api_key="x", timeout=60, max_retries=2).model == "some/model"


# Requests


def test_invoke_returns_text_usage_and_what_was_reused(llm):
    message = llm.invoke("Hi")
    assert message.content == "Hello"
    assert message.usage_metadata == {
        "input_tokens": 700,
        "output_tokens": 5,
        "total_tokens": 705,
        "input_token_details": {"cache_read": 640},
    }
    assert message.response_metadata == {
        "model_name": "fake-model",
        "model_provider": "omlx",
        "finish_reason": "stop",
        "omlx": {"cached_tokens_hot": 512, "cached_tokens_cold": 128, "ttft_s": 0.25},
    }


def test_the_options_of_model_binding_and_call_reach_the_engine_the_call_first(engine):
    llm = ChatOMLX(engine=engine, max_tokens=8, temperature=0.5, stop=["a"], seed=1, cache_salt="tenant")
    llm.bind(max_tokens=16, stop=["b"]).invoke("Hi", max_tokens=32)
    prompt, options = engine.calls[0]
    assert prompt == [{"role": "user", "content": "Hi"}]
    assert GenerationParams.from_options(options) == GenerationParams(
        max_tokens=32, temperature=0.5, seed=1, stop=("b",), cache_salt="tenant"
    )


def test_options_that_belong_to_a_call_are_not_fields_and_reach_the_engine(engine):
    seen = []
    ChatOMLX(engine=engine).invoke("Hi", on_prefill=seen.append)
    assert engine.calls[0][1]["on_prefill"] == seen.append
    with pytest.raises(UnknownParameterError, match="'on_prefill'"):
        ChatOMLX(engine=engine, on_prefill=seen.append)


@pytest.mark.parametrize("call", ["invoke", "stream", "ainvoke", "astream"])
async def test_an_unknown_keyword_is_an_error_before_the_model_is_loaded(monkeypatch, call):
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: pytest.fail("loaded")))
    llm = ChatOMLX(model="some/model")
    with pytest.raises(UnknownParameterError, match="'tempo'"):
        await _all(llm, call, "Hi", tempo=1)


@pytest.mark.parametrize("call", ["invoke", "stream", "ainvoke", "astream"])
async def test_every_form_sends_the_same_request(llm, engine, call):
    await _all(llm, call, [SystemMessage("Be brief"), HumanMessage("Hi")], max_tokens=3)
    prompt, options = engine.calls[0]
    assert prompt == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert options["max_tokens"] == 3
    assert engine.threads == [threading.get_ident()]  # no thread hopping


@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_one_chunk_of_a_stream_carries_usage_and_it_is_the_last(llm, call):
    chunks = await _all(llm, call, "Hi")
    assert [chunk.content for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk.chunk_position for chunk in chunks] == [None, None, "last"]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False, False, True]
    assert [bool(chunk.response_metadata) for chunk in chunks] == [False, False, True]


@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_the_sum_of_a_stream_is_the_invoked_message(llm, call):
    invoked = llm.invoke("Hi")
    first, *rest = await _all(llm, call, "Hi")
    total: AIMessageChunk = sum(rest, first)
    assert total.content == invoked.content
    assert total.usage_metadata == invoked.usage_metadata
    assert total.response_metadata == invoked.response_metadata


def test_logprobs_have_openais_shape(engine):
    message = ChatOMLX(engine=engine, logprobs=True).invoke("Hi")
    content = message.response_metadata["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list("Hello")
    assert content[0] == {"token": "H", "logprob": -0.5, "bytes": None, "top_logprobs": []}


def test_batch_answers_each_prompt(llm, engine):
    assert [message.content for message in llm.batch(["a", "b", "c"])] == ["Hello"] * 3
    assert {prompt[0]["content"] for prompt, _ in engine.calls} == {"a", "b", "c"}


def test_a_callback_for_tokens_gets_them_when_invoke_streams(engine):
    class Tokens(BaseCallbackHandler):
        tokens: list[str] = []  # noqa: RUF012 - one test, one instance

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.tokens.append(token)

    handler = Tokens()
    message = ChatOMLX(engine=engine, streaming=True).invoke("Hi", config={"callbacks": [handler]})
    assert handler.tokens == ["Hel", "lo", ""]
    assert message.content == "Hello"
    assert message.usage_metadata["input_tokens"] == 700


def test_streaming_can_be_switched_by_the_call(llm, engine):
    llm.invoke("Hi", stream=True)
    assert "stream" not in engine.calls[0][1]


def test_a_stream_closed_early_cancels_its_request(llm, engine):
    stream = llm.stream("Hi")
    assert next(stream).content == "Hel"
    assert not engine.cancelled.is_set()
    stream.close()
    assert engine.cancelled.is_set()


async def test_an_async_stream_closed_early_cancels_its_request(llm, engine):
    stream = llm.astream("Hi")
    assert (await anext(stream)).content == "Hel"
    assert not engine.cancelled.is_set()
    await stream.aclose()
    assert await asyncio.to_thread(engine.cancelled.wait, TIMEOUT_S)


@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_an_error_while_streaming_reaches_the_caller(llm, engine, call):
    engine.answers = [FakeAnswer(["Hel"], error=EngineError("the request failed"))]
    with pytest.raises(EngineError, match="the request failed"):
        await _all(llm, call, "Hi")


def test_a_chain_runs(llm, engine):
    chain = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{question}")]) | llm
    assert chain.invoke({"context": "c", "question": "q"}).content == "Hello"
    assert engine.calls[0][0] == [
        {"role": "system", "content": "Context: c"},
        {"role": "user", "content": "q"},
    ]


# Counting


def test_token_ids_are_the_models_own_without_special_tokens(llm):
    assert llm.get_token_ids("Hi") == [ord("H"), ord("i")]
    assert llm.get_num_tokens("Hi") == 2


def test_messages_are_counted_as_the_template_renders_them(llm):
    assert llm.get_num_tokens_from_messages([HumanMessage("Hi"), AIMessage("Yes")]) == 2 + 3 + 3 + 3


def test_messages_that_the_template_refuses_are_counted_one_by_one(llm, engine):
    engine.has_chat_template = False
    assert llm.get_num_tokens_from_messages([HumanMessage("Hi")]) == len("Human: Hi")


def test_an_engine_without_a_tokenizer_cannot_count(llm, engine):
    engine.tokenizer = None
    with pytest.raises(InvalidPromptError, match="'fake-model' has no tokenizer"):
        llm.get_token_ids("Hi")


# Messages


def test_every_kind_of_message_gets_its_role():
    messages = [
        SystemMessage("s"),
        HumanMessage("h"),
        AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "call-1"}]),
        ToolMessage("2", tool_call_id="call-1", name="add"),
        AIMessage("a"),
        ChatMessage("c", role="critic"),
    ]
    assert convert_messages(messages).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "h"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call-1", "name": "add"},
        {"role": "assistant", "content": "a"},
        {"role": "critic", "content": "c"},
    ]


def test_text_parts_keep_their_order():
    parts = ["one ", {"type": "text", "text": "two "}, {"type": "text", "text": "three", "cache_control": {}}]
    assert convert_messages([HumanMessage(parts)]).messages == [{"role": "user", "content": "one two three"}]


def test_earlier_reasoning_and_tool_use_parts_are_not_text():
    parts = [
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "text", "text": "Yes"},
        {"type": "tool_use", "id": "1", "name": "add", "input": {}},
    ]
    assert convert_messages([AIMessage(parts)])[0]["content"] == "Yes"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "audio", "base64": "", "mime_type": "audio/wav"},
        {"type": "file", "base64": "", "mime_type": "application/pdf"},
        {"type": "reasoning", "reasoning": "in a user's message"},
        {"type": "text"},
    ],
    ids=lambda part: part["type"],
)
def test_a_part_that_is_not_text_is_an_error_that_says_where(part):
    with pytest.raises(InvalidPromptError, match=rf"message 1 has a part of type '{part['type']}'.*text only"):
        convert_messages([HumanMessage("Look:"), HumanMessage([part])])


def test_a_message_that_no_model_takes_is_an_error():
    with pytest.raises(InvalidPromptError, match="message 0 is a RemoveMessage"):
        convert_messages([RemoveMessage(id="1")])


# The real engine


async def test_a_second_question_reuses_the_first_ones_prefix():
    from tiny_models import tiny_llama

    from omlx_core import Engine

    with Engine(tiny_llama(), tiny_tokenizer(), name="tiny", cache=CacheSettings(block_size=16)) as engine:
        llm = ChatOMLX(engine=engine, max_tokens=4)
        context = SystemMessage("All of this is shared by both questions. " * 3)
        cold = llm.invoke([context, HumanMessage("first?")])
        warm = await llm.ainvoke([context, HumanMessage("second?")])
        again = [chunk async for chunk in llm.astream([context, HumanMessage("first?")])]
        assert cold.usage_metadata["input_token_details"]["cache_read"] == 0
        assert warm.usage_metadata["input_token_details"]["cache_read"] >= 112
        assert warm.response_metadata["omlx"]["cached_tokens_cold"] == 0
        assert "".join(chunk.content for chunk in again) == cold.content
        assert (
            llm.get_num_tokens_from_messages([context, HumanMessage("first?")]) == (cold.usage_metadata["input_tokens"])
        )


async def _all(llm: ChatOMLX, call: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What one of the four forms gives, as a list."""
    method = getattr(llm, call)
    match call:
        case "invoke":
            return [method(*args, **kwargs)]
        case "stream":
            return list(method(*args, **kwargs))
        case "ainvoke":
            return [await method(*args, **kwargs)]
        case "astream":
            return [chunk async for chunk in method(*args, **kwargs)]
    raise ValueError(call)
