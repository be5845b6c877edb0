from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core._api import suppress_langchain_beta_warning
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumps, loads
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_forms import FORMS, all_of
from langchain_tests.unit_tests import ChatModelUnitTests
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, GenerationParams, ModelPool
from omlx_core.engine import shared
from omlx_core.errors import EngineError, InvalidParameterError, InvalidPromptError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX

TIMEOUT_S = 30


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([FakeAnswer(["Hel", "", "lo"])])


@pytest.fixture
def llm(engine: FakeEngine) -> ChatOMLX:
    return ChatOMLX(engine=engine)


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")  # the suite's own
@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
class TestStandardSuite(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _allow_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`load` takes classes that LangChain doesn't list only if they are given to it, and the suite gives none."""
        path = tuple(ChatOMLX.lc_id())
        load = importlib.import_module("langchain_core.load.load")  # the package has a function of that name
        monkeypatch.setitem(load.ALL_SERIALIZABLE_MAPPINGS, path, path)
        monkeypatch.setattr(load, "_default_class_paths_cache", {})

    @property
    def chat_model_class(self) -> type[ChatOMLX]:
        return ChatOMLX

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "some/model"}

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


def loaded(text: str) -> Any:
    with suppress_langchain_beta_warning():
        return loads(text, allowed_objects=[ChatOMLX], valid_namespaces=["omlx_plugins"])


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
        "omlx": {
            "cached_tokens_hot": 512,
            "cached_tokens_cold": 128,
            "ttft_s": 0.25,
            "tokens_per_s": 4.0,
            "divergence": None,
        },
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


@pytest.mark.parametrize("call", FORMS)
async def test_an_unknown_keyword_is_an_error_before_the_model_is_loaded(monkeypatch, call):
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: pytest.fail("loaded")))
    llm = ChatOMLX(model="some/model")
    with pytest.raises(UnknownParameterError, match="'tempo'"):
        await all_of(llm, call, "Hi", tempo=1)


@pytest.mark.parametrize("call", FORMS)
async def test_every_form_sends_the_same_request(llm, engine, call):
    await all_of(llm, call, [SystemMessage("Be brief"), HumanMessage("Hi")], max_tokens=3)
    prompt, options = engine.calls[0]
    assert prompt == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert options["max_tokens"] == 3
    assert engine.threads == [threading.get_ident()]  # no thread hopping


@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_one_chunk_of_a_stream_carries_usage_and_it_is_the_last(llm, call):
    chunks = await all_of(llm, call, "Hi")
    assert [chunk.content for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk.chunk_position for chunk in chunks] == [None, None, "last"]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False, False, True]
    assert [bool(chunk.response_metadata) for chunk in chunks] == [False, False, True]


@pytest.mark.parametrize("call", ["stream", "astream"])
async def test_the_sum_of_a_stream_is_the_invoked_message(llm, call):
    invoked = llm.invoke("Hi")
    first, *rest = await all_of(llm, call, "Hi")
    total: AIMessageChunk = sum(rest, first)
    assert total.content == invoked.content
    assert total.usage_metadata == invoked.usage_metadata
    assert total.response_metadata == invoked.response_metadata


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
        await all_of(llm, call, "Hi")


def test_a_chain_runs(llm, engine):
    chain = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{question}")]) | llm
    assert chain.invoke({"context": "c", "question": "q"}).content == "Hello"
    assert engine.calls[0][0] == [
        {"role": "system", "content": "Context: c"},
        {"role": "user", "content": "q"},
    ]


async def test_a_cancelled_task_cancels_its_request(engine):
    waits, reached = asyncio.Event(), asyncio.Event()

    async def agenerate(prompt: Any, **options: Any) -> Any:
        try:
            reached.set()
            await waits.wait()
        finally:
            engine.cancelled.set()

    engine.agenerate = agenerate
    task = asyncio.create_task(ChatOMLX(engine=engine).ainvoke("Hi"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.cancelled.is_set()


@pytest.mark.parametrize("call", FORMS)
async def test_a_call_can_ask_another_model(monkeypatch, call):
    asked = FakeEngine(["other"], name="other")
    specs = []
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: specs.append(spec) or asked))
    llm = ChatOMLX(engine=FakeEngine(["own"]), adapter_path="lora", max_tokens=5)
    *_, last = await all_of(llm, call, "Hi", model="some/other")
    assert last.response_metadata["model_name"] == "some/other"
    assert [(spec.model, spec.adapter_path) for spec in specs] == [("some/other", None)]
    assert asked.calls[0].options["max_tokens"] == 5
    assert (await all_of(llm, call, "Hi", model="fake-model"))[-1].response_metadata["model_name"] == "fake-model"


# Tracing, and what is written down


def test_traces_have_the_options_that_a_call_was_made_with():
    llm = ChatOMLX(model="some/model", temperature=0.5, max_tokens=9, stop="x")
    assert llm._get_ls_params() == {
        "ls_provider": "omlx",
        "ls_model_name": "some/model",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["x"],
    }
    assert llm._get_ls_params(stop=["y"], model="other")["ls_stop"] == ["y"]
    assert llm._identifying_params["temperature"] == 0.5


def test_a_model_survives_being_written_down_with_its_cache_and_without_its_engine(engine, tmp_path):
    cache = CacheSettings(block_size=16, paged_ssd_cache_dir=tmp_path)
    llm = ChatOMLX(engine=engine, kv_cache=cache, stop=["a"], logit_bias={3: 1.0})
    text = dumps(llm)
    assert "FakeEngine" not in text
    copy = loaded(text)
    assert isinstance(copy, ChatOMLX)
    assert (copy.model, copy.kv_cache, copy.stop, copy.engine) == ("fake-model", cache, ["a"], None)
    assert copy.logit_bias == {3: 1.0}


def test_langchains_own_cache_keeps_answers_apart_by_options(engine):
    engine.answers = ["one", "two"]
    llm = ChatOMLX(engine=engine, cache=InMemoryCache())
    assert [llm.invoke("Hi", temperature=t).content for t in (0, 0, 1)] == ["one", "one", "two"]


# Profile


def test_profile_of_an_engine_says_what_it_can(engine):
    profile = ChatOMLX(engine=engine, max_tokens=7).profile
    assert (profile["max_input_tokens"], profile["max_output_tokens"]) == (2048, 7)
    assert profile["tool_calling"]
    assert not profile["reasoning_output"]
    assert not profile["image_inputs"]
    engine.has_chat_template = False
    assert not ChatOMLX(engine=engine).profile["tool_calling"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (4096, False, False)),
        ({"chat_template.jinja": "{{ messages }}<think>"}, (4096, True, True)),
        ({"tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"})}, (4096, True, False)),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "<think>"}]})},
            (4096, True, True),
        ),
        ({"config.json": json.dumps({"text_config": {"n_ctx": 12}})}, (12, False, False)),
    ],
)
def test_profile_is_read_from_the_models_files(tmp_path, files, expected):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    profile = ChatOMLX(model=tmp_path).profile
    assert (profile["max_input_tokens"], profile["tool_calling"], profile["reasoning_output"]) == expected


def test_profile_of_a_repository_is_read_where_it_was_fetched_to(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "max_input_tokens" not in ChatOMLX(model="some/model").profile
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"max_position_embeddings": 99}))
    assert ChatOMLX(model="some/model").profile["max_input_tokens"] == 99


def test_without_the_extra_structured_the_profile_promises_no_constraints(monkeypatch, engine):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    profile = ChatOMLX(engine=engine).profile
    assert (profile["structured_output"], profile["tool_choice"], profile["tool_calling"]) == (False, False, True)


# Counting


def test_token_ids_are_the_models_own_without_special_tokens(llm):
    assert llm.get_token_ids("Hi") == [ord("H"), ord("i")]
    assert llm.get_num_tokens("Hi") == 2


def test_messages_are_counted_as_the_template_renders_them(llm):
    assert llm.get_num_tokens_from_messages([HumanMessage("Hi"), AIMessage("Yes")]) == 2 + 3 + 3 + 3


def test_tools_are_counted_too(llm):
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    counted = [llm.get_num_tokens_from_messages([HumanMessage("Hi")], tools) for tools in (None, [tool])]
    assert counted == [2 + 3, 2 + 3 + 1]


def test_messages_that_the_template_refuses_are_counted_one_by_one(llm, engine):
    engine.has_chat_template = False
    assert llm.get_num_tokens_from_messages([HumanMessage("Hi")]) == len("Human: Hi")


def test_an_engine_without_a_tokenizer_cannot_count(llm, engine):
    engine.tokenizer = None
    with pytest.raises(InvalidPromptError, match="'fake-model' has no tokenizer"):
        llm.get_token_ids("Hi")


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
