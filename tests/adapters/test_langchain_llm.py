"""The completion model: text in, text out, for models without a chat template."""

from __future__ import annotations

import asyncio
import threading

import pytest
from langchain_core._api import suppress_langchain_beta_warning
from langchain_core.load import dumps, loads
from langchain_core.prompts import PromptTemplate
from langchain_forms import FORMS, STREAMS, all_of
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, GenerationParams
from omlx_core.errors import EngineError, InvalidParameterError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import OMLX, OMLXCacheCallback

TIMEOUT_S = 30


@pytest.fixture
def engine():
    return FakeEngine([FakeAnswer(["Hel", "", "lo"])])


@pytest.fixture
def llm(engine):
    return OMLX(engine=engine)


@pytest.mark.parametrize("form", FORMS)
async def test_every_form_sends_the_text_as_it_is_on_its_own_thread(engine, form):
    llm = OMLX(engine=engine, temperature=0.5, stop=["a"])
    assert "".join(await all_of(llm.bind(max_tokens=3), form, "Once", stop=["b"])) == "Hello"
    prompt, options = engine.calls[0]
    assert prompt == "Once"
    assert GenerationParams.from_options(options) == GenerationParams(max_tokens=3, temperature=0.5, stop=("b",))
    assert engine.threads == [threading.get_ident()]


@pytest.mark.parametrize("form", ["generate", "agenerate"])
async def test_the_prompts_of_a_batch_are_answered_in_their_order(engine, form):
    class Echo(FakeEngine):
        def stream(self, prompt, **options):
            return FakeEngine([prompt]).stream(prompt, **options)

    prompts = [str(number) for number in range(40)]
    given = getattr(OMLX(engine=Echo()), form)(prompts)
    result = await given if form == "agenerate" else given
    assert [generations[0].text for generations in result.generations] == prompts
    assert result.llm_output == {"model_name": "fake-model", "token_usage": result.llm_output["token_usage"]}
    assert OMLX(engine=Echo()).batch(prompts) == prompts


def test_a_generation_says_how_it_came_about(llm):
    [[generation]] = llm.generate(["Once"]).generations
    info = generation.generation_info
    assert (info["finish_reason"], info["model_name"], info["model_provider"]) == ("stop", "fake-model", "omlx")
    assert info["usage_metadata"]["input_token_details"] == {"cache_read": 640}
    assert info["omlx"]["cached_tokens_hot"] == 512


def test_a_streamed_generation_says_it_once():
    chunks = list(OMLX(engine=FakeEngine([FakeAnswer(["Hel", "lo"])]))._stream("Once"))
    assert [bool(chunk.generation_info) for chunk in chunks] == [False, False, True]


def test_a_callback_hears_tokens_and_use(llm):
    use = OMLXCacheCallback()
    assert "".join(llm.stream("Once", config={"callbacks": [use]})) == "Hello"
    llm.invoke("Once", config={"callbacks": [use]})
    assert (use.use.num_requests, use.use.prompt_tokens, use.use.cached_tokens_cold) == (2, 1400, 256)


async def test_events_have_the_tokens(llm):
    events = [event async for event in llm.astream_events("Once", version="v2")]
    assert [event["data"]["chunk"] for event in events if event["event"] == "on_llm_stream"] == ["Hel", "lo", ""]


def test_a_stream_closed_early_cancels_its_request(llm, engine):
    stream = llm.stream("Once")
    next(stream)
    stream.close()
    assert engine.cancelled.is_set()


async def test_an_async_stream_closed_early_cancels_its_request(llm, engine):
    stream = llm.astream("Once")
    await anext(stream)
    await stream.aclose()
    assert await asyncio.to_thread(engine.cancelled.wait, TIMEOUT_S)


@pytest.mark.parametrize("form", STREAMS)
async def test_errors_reach_the_caller(llm, engine, form):
    engine.answers = [FakeAnswer(["Hel"], error=EngineError("the request failed"))]
    with pytest.raises(EngineError):
        await all_of(llm, form, "Once")


async def test_of_several_prompts_the_first_error_cancels_the_others(llm, engine):
    cancelled = []

    async def agenerate(prompt, **options):
        if prompt == "bad":
            raise EngineError("no")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise

    engine.agenerate = agenerate
    with pytest.raises(EngineError):
        await llm.agenerate(["good", "bad"])
    await asyncio.sleep(0)
    assert cancelled == ["good"]


def test_bad_options_are_errors_as_with_the_chat_model(llm):
    with pytest.raises(UnknownParameterError, match="did you mean 'temperature'"):
        OMLX(model="some/model", temprature=1)
    with pytest.raises(InvalidParameterError, match="top_p=2"):
        llm.invoke("Once", top_p=2)


def test_it_is_traced_counted_and_written_down(llm):
    assert llm._llm_type == "omlx-completion"
    params = llm._get_ls_params(stop=["x"])
    assert (params["ls_provider"], params["ls_model_name"], params["ls_stop"]) == ("omlx", "fake-model", ["x"])
    assert llm.get_num_tokens("Hi") == 2
    with suppress_langchain_beta_warning():
        copy = loads(dumps(llm), allowed_objects=[OMLX], valid_namespaces=["omlx_plugins"])
    assert copy.model == "fake-model"


async def test_the_real_engine_reuses_a_texts_beginning():
    tokenizer = tiny_tokenizer(chat_template=None)
    with Engine(tiny_llama(), tokenizer, cache=CacheSettings(block_size=16)) as engine:
        llm = OMLX(engine=engine, max_tokens=4)
        chain = PromptTemplate.from_template("{text} In short:") | llm
        text = "A long story that goes on and on. " * 3
        cold = chain.invoke({"text": text})
        use = OMLXCacheCallback()
        assert await chain.ainvoke({"text": text}, config={"callbacks": [use]}) == cold
        assert use.use.cached_tokens_hot >= 96
        assert "".join([piece async for piece in llm.astream(f"{text} In short:")]) == cold
        assert engine.cache.stats().hot.blocks_in_use == 0
