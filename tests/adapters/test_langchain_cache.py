"""What a caller decides of the cache, and hears of it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_forms import FORMS, all_of
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, Usage
from omlx_core.errors import InvalidParameterError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import CacheUse, ChatOMLX, OMLXCacheCallback

BOOK = "A long book that all of the questions are about. " * 3
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def llm(engine):
    return ChatOMLX(engine=engine)


@pytest.mark.parametrize("form", FORMS)
async def test_salt_store_and_pin_can_be_given_to_a_call_and_bound(llm, engine, form):
    await all_of(llm.bind(cache_salt="tenant", store=False), form, "Hi", pin=True)
    options = engine.calls[0].options
    assert (options["cache_salt"], options["store"], options["pin"]) == ("tenant", False, True)


# Warming


def test_a_conversation_is_warmed_with_its_tools_and_options(llm, engine):
    messages = [SystemMessage("Be brief"), HumanMessage("Hi")]
    [usage] = llm.warm(messages, tools=[TOOL], cache_salt="tenant", progress=True)
    assert usage == Usage(700, cached_tokens_hot=512, cached_tokens_cold=128)
    [(prompt, options)] = engine.prefills
    assert [message["content"] for message in prompt] == ["Be brief", "Hi"]
    assert (options["cache_salt"], options["progress"], options["pin"]) == ("tenant", True, False)
    assert options["tools"][0]["function"]["name"] == "add"
    assert not engine.calls


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("Hi", [["Hi"]]),
        ([("system", "s"), ("user", "u")], [["s", "u"]]),
        ([[("system", "s")], [("system", "t"), HumanMessage("u")]], [["s"], ["t", "u"]]),
        ([ChatPromptTemplate([("user", "{x}")]).invoke({"x": "y"})], [["y"]]),
        (ChatPromptTemplate([("user", "{x}")]).invoke({"x": "y"}), [["y"]]),
        ([Document("one"), Document("two")], [["one"], ["two"]]),
    ],
    ids=["text", "messages", "several", "several prompts", "prompt", "documents"],
)
async def test_whatever_a_model_takes_can_be_warmed(llm, engine, inputs, expected):
    assert len(llm.warm(inputs)) == len(await llm.awarm(inputs)) == len(expected)
    warmed = [[message["content"] for message in prompt] for prompt, _ in engine.prefills]
    assert warmed == expected + expected


def test_documents_are_warmed_as_a_prompt_shows_them(llm, engine):
    prompt = ChatPromptTemplate([("system", "Use this: {context}"), ("placeholder", "{past}"), ("user", "{question}")])
    llm.warm([Document("one")], prompt=prompt, pin=True)
    [(chat, options)] = engine.prefills
    assert chat == [{"role": "system", "content": "Use this: one"}, {"role": "user", "content": ""}]
    assert options["pin"] is True


@pytest.mark.parametrize(
    ("inputs", "prompt", "message"),
    [
        ([Document("one")], ChatPromptTemplate([("user", "{x}")]), "'context'"),
        ("Hi", ChatPromptTemplate([("user", "{context}")]), "for documents"),
        ([Document("one"), "Hi"], None, "nothing else"),
    ],
)
def test_what_cannot_be_warmed_is_an_error(llm, inputs, prompt, message):
    with pytest.raises(InvalidParameterError, match=message):
        llm.warm(inputs, prompt=prompt)
    with pytest.raises(UnknownParameterError):
        llm.warm("Hi", temprature=1)


def test_pins_can_be_seen_and_undone(llm, engine):
    llm.warm("Hi", pin=True)
    llm.invoke("Ho", pin=True)
    assert len(llm.pins()) == 2
    assert llm.unpin("Hi") == 1
    assert llm.unpin() == 1
    assert llm.pins() == []


async def test_what_was_warmed_and_pinned_is_found_by_the_questions():
    cache = CacheSettings(block_size=16)
    with Engine(tiny_llama(), tiny_tokenizer(512), cache=cache) as engine:
        llm = ChatOMLX(engine=engine, max_tokens=2)
        prompt = ChatPromptTemplate([("system", "Use: {context}"), ("user", "{question}")])
        [usage] = llm.warm([Document(BOOK)], prompt=prompt, tools=[TOOL], pin=True)
        assert usage.cached_tokens == 0
        ask = prompt | llm.bind_tools([TOOL])
        answer = ask.invoke({"context": BOOK, "question": "What is it about?"})
        assert answer.usage_metadata["input_token_details"]["cache_read"] >= len(BOOK) // 16 * 16
        assert llm.unpin([("system", f"Use: {BOOK}"), ("user", "?")], tools=[TOOL]) == 0  # more was pinned: the turn
        assert llm.unpin() == 1

        mark = {"cache_control": {"type": "ephemeral"}}
        human = HumanMessage([{"type": "text", "text": BOOK, **mark}, {"type": "text", "text": "What is it about?"}])
        llm.invoke([human])
        [pinned] = llm.pins()
        assert len(BOOK) // 16 * 16 <= pinned.num_tokens < len(BOOK) + 48
        assert llm.unpin([HumanMessage(BOOK + "And who wrote it?")]) == 1


# The callback


@pytest.mark.parametrize("form", FORMS)
async def test_use_is_added_up_over_requests_in_every_form(llm, engine, form):
    engine.answers = [FakeAnswer(["abc"], ttft_s=0.5), FakeAnswer(["d"], ttft_s=1.5, usage=Usage(100, 1, 0, 20))]
    callback = OMLXCacheCallback()
    chain = ChatPromptTemplate([("user", "{x}")]) | llm
    for _ in range(2):
        await all_of(chain, form, {"x": "Hi"}, config={"callbacks": [callback]})
    assert callback.use == CacheUse(2, 800, 512, 148, 4, 2.0, 1.5)
    assert (callback.use.cached_tokens, callback.use.computed_tokens, callback.use.mean_ttft_s) == (660, 140, 1.0)
    assert callback.summary() == (
        "2 requests: 800 prompt tokens, 82% reused (512 from RAM, 148 from SSD), 140 computed; 4 generated; "
        "first token after 1.00 s on average, 1.50 s at most"
    )
    assert callback.reset().num_requests == 2
    assert callback.use == CacheUse()
    assert callback.summary().startswith("0 requests: 0 prompt tokens, 0% reused")


def test_answers_of_others_and_of_langchains_cache_are_passed_over(engine):
    callback = OMLXCacheCallback()
    FakeListChatModel(responses=["a"]).invoke("Hi", config={"callbacks": [callback]})
    llm = ChatOMLX(engine=engine, cache=InMemoryCache())
    for _ in range(3):
        llm.invoke("Hi", config={"callbacks": [callback]})
    assert callback.use.num_requests == 1


async def test_nothing_is_lost_between_threads_and_tasks(llm):
    callback = OMLXCacheCallback()
    config = {"callbacks": [callback]}
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: llm.invoke("Hi", config=config), range(64)))
    await asyncio.gather(*(llm.ainvoke("Hi", config=config) for _ in range(64)))
    assert callback.use.num_requests == 128
    assert callback.use.prompt_tokens == 128 * 700


def test_use_is_heard_of_streams_of_events_too(llm):
    callback = OMLXCacheCallback()
    message = llm.stream_events("Hi", version="v3", config={"callbacks": [callback]}).output
    assert message.usage_metadata["input_tokens"] == 700
    assert callback.use.num_requests == 1
