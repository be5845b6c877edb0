from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.prompts import PromptTemplate, SelectorPromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_forms import CHAT_FORMS, COMPLETE_FORMS, all_of
from pydantic import BaseModel
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, GenerationParams, ModelPool
from omlx_core.engine import shared
from omlx_core.engine.results import ToolCall
from omlx_core.errors import EngineError, InvalidParameterError, InvalidPromptError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.llama_index import OMLX

TIMEOUT_S = 30
WHEN = PromptTemplate("When?")
STREAMS = ["stream_chat", "astream_chat", "stream_complete", "astream_complete"]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([FakeAnswer(["Hel", "", "lo"])])


@pytest.fixture
def llm(engine: FakeEngine) -> OMLX:
    return OMLX(engine=engine)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> list[Any]:
    """What the shared engines are made from that are loaded, which all are the fake."""
    specs: list[Any] = []
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: specs.append(spec) or engine))
    return specs


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., str]:
    """Makes a folder with what the small files of a model say."""

    def make(config: dict[str, Any], chat_template: str | None) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = {} if chat_template is None else {"chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        return str(tmp_path)

    return make


async def _all(llm: OMLX, form: str, text: str = "Hi", **kwargs: Any) -> list[Any]:
    """What one of the eight forms gives, as a list."""
    return await all_of(llm, form, text if form in COMPLETE_FORMS else [ChatMessage(text)], **kwargs)


def _text(response: Any) -> str:
    return response.text if hasattr(response, "text") else response.message.content


# Construction and metadata


def test_construction_loads_nothing(loads):
    llm = OMLX(model="some/model")
    assert llm.class_name() == "OMLX"
    assert llm.to_payload()["model_name"] == "some/model"
    assert loads == []


def test_both_frameworks_share_one_engine(loads):
    cache = CacheSettings(block_size=16)
    OMLX(model="some/model", kv_cache=cache).complete("Hi")
    ChatOMLX(model="some/model", kv_cache=cache).invoke("Hi")
    assert len(loads) == 1


@pytest.mark.parametrize("form", ["achat", "astream_chat", "acomplete", "astream_complete"])
async def test_a_load_from_a_coroutine_leaves_the_event_loop_free(monkeypatch, engine, form):
    await _assert_loop_is_free_while_loading(monkeypatch, engine, _all(OMLX(model="some/model"), form))


async def test_a_prediction_that_loads_leaves_the_event_loop_free(monkeypatch, engine):
    prediction = OMLX(model="some/model").apredict(PromptTemplate("Say {word}"), word="hi")
    await _assert_loop_is_free_while_loading(monkeypatch, engine, prediction)


async def test_a_streamed_prediction_that_loads_leaves_the_event_loop_free(monkeypatch, engine):
    prediction = OMLX(model="some/model").astream(PromptTemplate("Say {word}"), word="hi")
    await _assert_loop_is_free_while_loading(monkeypatch, engine, prediction)


async def test_a_called_tool_of_a_model_that_loads_leaves_the_event_loop_free(monkeypatch, engine):
    engine.answers = [FakeAnswer(tool_calls=[ToolCall("call_1", "now", {})])]
    tool = FunctionTool.from_defaults(lambda: "noon", name="now", description="The time.")
    prediction = OMLX(model="some/model").apredict_and_call([tool], "When?")
    await _assert_loop_is_free_while_loading(monkeypatch, engine, prediction)


@pytest.mark.parametrize("form", ["astructured_predict", "astream_structured_predict"])
@pytest.mark.parametrize("mode", ["default", "function"])
async def test_an_object_of_a_model_that_loads_leaves_the_event_loop_free(monkeypatch, engine, form, mode):
    class Time(BaseModel):
        """A time."""

        hour: int

    engine.answers = [FakeAnswer(['{"hour": 3}'], tool_calls=[ToolCall("call_1", "Time", {"hour": 3})])]
    # Such a prompt looks at the model's metadata.
    prompt = SelectorPromptTemplate(WHEN, [(lambda llm: llm.metadata.is_chat_model, WHEN)])
    llm = OMLX(model="some/model", pydantic_program_mode=mode)
    await _assert_loop_is_free_while_loading(monkeypatch, engine, all_of(llm, form, Time, prompt))


async def _assert_loop_is_free_while_loading(monkeypatch: Any, engine: FakeEngine, request: Any) -> None:
    started, gate = threading.Event(), threading.Event()

    def load(*_: Any) -> FakeEngine:
        started.set()
        assert gate.wait(TIMEOUT_S)
        return engine

    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=load))
    task = asyncio.create_task(request)
    # A load on the event loop would keep it from opening the gate.
    assert await asyncio.to_thread(started.wait, TIMEOUT_S)
    gate.set()
    assert await task


def test_metadata_describes_the_model(llm, engine):
    metadata = OMLX(engine=engine, max_tokens=64).metadata
    assert metadata.context_window == 2048
    assert metadata.num_output == 64
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.model_name == "fake-model"


def test_metadata_of_a_model_that_does_not_say_its_context_and_has_no_template(llm, engine):
    engine.context_length, engine.has_chat_template = None, False
    assert llm.metadata.context_window == DEFAULT_CONTEXT_WINDOW
    assert not llm.metadata.is_chat_model
    assert not llm.metadata.is_function_calling_model


def test_metadata_of_a_model_on_this_machine_loads_nothing(loads, model_folder):
    folder = model_folder({"max_position_embeddings": 4096}, chat_template="{{ messages }}")
    metadata = OMLX(model=folder).metadata
    assert (metadata.context_window, metadata.is_chat_model, metadata.is_function_calling_model) == (4096, True, True)
    assert loads == []


@pytest.mark.parametrize(
    ("config", "chat_template"), [({}, "{{ messages }}"), ({"max_position_embeddings": 4096}, None)]
)
def test_metadata_that_the_files_do_not_say_is_the_loaded_models(loads, model_folder, config, chat_template):
    assert OMLX(model=model_folder(config, chat_template)).metadata.context_window == 2048
    assert len(loads) == 1


def test_a_component_survives_its_serialization():
    llm = OMLX(model="some/model", kv_cache=CacheSettings(block_size=16), temperature=0.5, stop=["a"])
    assert OMLX.from_dict(llm.to_dict()).to_dict() == llm.to_dict()
    assert OMLX.from_dict(llm.to_dict()).kv_cache == llm.kv_cache


def test_a_misspelled_field_is_an_error_that_suggests_the_right_one():
    with pytest.raises(UnknownParameterError, match="'max_token': did you mean 'max_tokens'"):
        OMLX(model="some/model", max_token=1)


def test_a_field_out_of_range_is_an_error_at_construction():
    with pytest.raises(InvalidParameterError, match="top_p=2"):
        OMLX(model="some/model", top_p=2)


# Requests


@pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
async def test_every_form_sends_the_same_request(engine, form):
    llm = OMLX(engine=engine, temperature=0.5, stop=["a"], cache_salt="tenant")
    responses = await _all(llm, form, max_tokens=3)
    assert _text(responses[-1]) == "Hello"
    prompt, options = engine.calls[0]
    assert prompt == [{"role": "user", "content": "Hi"}]
    assert GenerationParams.from_options(options) == GenerationParams(
        max_tokens=3, temperature=0.5, stop=("a",), cache_salt="tenant"
    )
    assert engine.threads == [threading.get_ident()]  # no thread hopping


@pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
async def test_the_last_response_has_the_usage_and_what_was_reused(llm, form):
    *pieces, last = await _all(llm, form)
    assert last.raw == {
        "model": "fake-model",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 700,
            "completion_tokens": 5,
            "total_tokens": 705,
            "prompt_tokens_details": {"cached_tokens": 640},
        },
        "omlx": {
            "cached_tokens_hot": 512,
            "cached_tokens_cold": 128,
            "ttft_s": 0.25,
            "tokens_per_s": 4.0,
            "divergence": None,
        },
    }
    assert [piece.raw for piece in pieces] == [None] * len(pieces)


@pytest.mark.parametrize("form", STREAMS)
async def test_a_streamed_response_has_the_text_so_far_and_what_is_new(llm, form):
    responses = await _all(llm, form)
    assert [_text(response) for response in responses] == ["Hel", "Hello", "Hello"]
    assert [response.delta for response in responses] == ["Hel", "lo", ""]


@pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
async def test_an_unknown_keyword_is_an_error_before_the_model_is_loaded(loads, form):
    with pytest.raises(UnknownParameterError, match="'tempo'"):
        await _all(OMLX(model="some/model"), form, tempo=1)
    assert loads == []


@pytest.mark.parametrize("form", CHAT_FORMS)
async def test_logprobs_come_with_the_last_response(engine, form):
    last = (await _all(OMLX(engine=engine, logprobs=True), form))[-1]
    assert [(entry.token, entry.logprob) for (entry,) in last.logprobs] == [(token, -0.5) for token in "Hello"]


@pytest.mark.parametrize("form", ["stream_chat", "stream_complete"])
def test_a_stream_closed_early_cancels_its_request(llm, engine, form):
    stream = getattr(llm, form)("Hi" if form in COMPLETE_FORMS else [ChatMessage("Hi")])
    next(stream)
    assert not engine.cancelled.is_set()
    stream.close()
    assert engine.cancelled.is_set()


@pytest.mark.parametrize("form", ["astream_chat", "astream_complete"])
async def test_an_async_stream_closed_early_cancels_its_request(llm, engine, form):
    stream = await getattr(llm, form)("Hi" if form in COMPLETE_FORMS else [ChatMessage("Hi")])
    await anext(stream)
    assert not engine.cancelled.is_set()
    await stream.aclose()
    assert await asyncio.to_thread(engine.cancelled.wait, TIMEOUT_S)


@pytest.mark.parametrize("form", STREAMS)
async def test_an_error_while_streaming_reaches_the_caller(llm, engine, form):
    engine.answers = [FakeAnswer(["Hel"], error=EngineError("the request failed"))]
    with pytest.raises(EngineError, match="the request failed"):
        await _all(llm, form)


@pytest.mark.parametrize("form", [*CHAT_FORMS, *COMPLETE_FORMS])
async def test_the_standard_callbacks_see_every_form(engine, form):
    counter = TokenCountingHandler(tokenizer=list)
    await _all(OMLX(engine=engine, callback_manager=CallbackManager([counter])), form)
    assert counter.prompt_llm_token_count == 700
    assert counter.completion_llm_token_count == 5


# Chat templates


def test_a_formatted_prompt_is_sent_as_it_is(llm, engine):
    llm.complete("<|im_start|>user", formatted=True)
    assert engine.calls[0][0] == "<|im_start|>user"


def test_without_a_chat_template_a_prompt_is_text_to_continue(llm, engine):
    engine.has_chat_template = False
    llm.complete("Once upon a time")
    assert engine.calls[0][0] == "Once upon a time"


def test_without_a_chat_template_the_models_own_format_is_used(engine):
    engine.has_chat_template = False
    llm = OMLX(
        engine=engine,
        completion_to_prompt=lambda prompt: f"[{prompt}]",
        messages_to_prompt=lambda messages: "|".join(message.content for message in messages),
    )
    llm.complete("Hi")
    llm.chat([ChatMessage("a"), ChatMessage("b")])
    assert [prompt for prompt, _ in engine.calls] == ["[Hi]", "a|b"]


def test_without_a_chat_template_a_conversation_is_written_out(llm, engine):
    engine.has_chat_template = False
    llm.chat([ChatMessage("Hi")])
    assert engine.calls[0][0] == "user: Hi\nassistant: "


def test_a_prediction_sends_the_system_prompt_first(engine):
    assert OMLX(engine=engine, system_prompt="Be brief").predict(PromptTemplate("Say {word}"), word="hi") == "Hello"
    assert engine.calls[0][0] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Say hi"},
    ]


def test_a_block_that_is_not_text_is_an_error_without_a_chat_template_too(llm, engine):
    engine.has_chat_template = False
    with pytest.raises(InvalidPromptError, match="ImageBlock"):
        llm.chat([ChatMessage(blocks=[ImageBlock(url="http://localhost/x.png")])])


# The real engine


async def test_a_second_question_reuses_the_first_ones_prefix():
    from tiny_models import tiny_llama

    from omlx_core import Engine

    with Engine(tiny_llama(), tiny_tokenizer(), name="tiny", cache=CacheSettings(block_size=16)) as engine:
        llm = OMLX(engine=engine, max_tokens=4)
        context = "All of this is shared by both questions. " * 3
        cold = llm.complete(context + "first?")
        warm = await llm.acomplete(context + "second?")
        again = [response async for response in await llm.astream_complete(context + "first?")]
        assert cold.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert warm.raw["usage"]["prompt_tokens_details"]["cached_tokens"] >= 112
        assert warm.raw["omlx"]["cached_tokens_cold"] == 0
        assert again[-1].text == cold.text
