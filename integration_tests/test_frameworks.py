"""LangChain and LlamaIndex on the real model: the second question about a document skips the document."""

import asyncio

import pytest
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.llms import ChatMessage

import omlx_plugins
from omlx_core import CacheSettings
from omlx_core.engine.shared import get_shared_engine

BLOCK_SIZE = 64
MAX_TOKENS = 8

pytestmark = pytest.mark.usefixtures("shared_engines")


@pytest.fixture
def settings(tmp_path):
    return CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)


@pytest.fixture
def chat_omlx(sample_model, settings):
    return omlx_plugins.get_llm("langchain", model=sample_model, kv_cache=settings, max_tokens=MAX_TOKENS)


@pytest.fixture
def omlx(sample_model, settings):
    return omlx_plugins.get_llm("llama-index", model=sample_model, kv_cache=settings, max_tokens=MAX_TOKENS)


@pytest.fixture
def chain(chat_omlx, document):
    prompt = ChatPromptTemplate([("system", "Answer from this:\n{document}"), ("user", "{question}")])
    return prompt.partial(document=document) | chat_omlx


def cache_read(message):
    return message.usage_metadata["input_token_details"]["cache_read"]


def test_sample_model_knows_its_capitals(chat_omlx, omlx):
    assert chat_omlx.invoke("What is the capital of France?").text == "The capital of France is Paris."
    assert omlx.complete("What is the capital of France?").text == "The capital of France is Paris."


def test_questions_about_one_document_in_every_form_and_framework(chain, omlx, document, sample_model, settings):
    first = chain.invoke({"question": "What is a block?"})
    assert cache_read(first) == 0
    shared = first.usage_metadata["input_tokens"] // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE
    assert shared >= 4 * BLOCK_SIZE

    # LangChain, every form.
    assert cache_read(chain.invoke({"question": "What is a chain?"})) >= shared
    chunks = list(chain.stream({"question": "What is a block?"}))
    assert "".join(chunk.text for chunk in chunks) == first.text
    assert cache_read(chunks[-1]) >= shared
    for answer in chain.batch([{"question": f"What is number {i}?"} for i in range(3)]):
        assert cache_read(answer) >= shared

    async def ask_asynchronously():
        answers = await asyncio.gather(*(chain.ainvoke({"question": f"Who is {i}?"}) for i in range(2)))
        streamed = [chunk async for chunk in chain.astream({"question": "What is a block?"})]
        return answers, streamed

    answers, streamed = asyncio.run(ask_asynchronously())
    assert all(cache_read(answer) >= shared for answer in answers)
    assert "".join(chunk.text for chunk in streamed) == first.text

    # LlamaIndex, over what LangChain's questions have left.
    messages = [
        ChatMessage(role="system", content=f"Answer from this:\n{document}"),
        ChatMessage(role="user", content="What is a block?"),
    ]
    response = omlx.chat(messages)
    assert response.message.content == first.text
    assert response.raw["usage"]["prompt_tokens_details"]["cached_tokens"] >= shared
    *_, last = omlx.stream_chat(messages)
    assert last.message.content == first.text

    async def chat_asynchronously():
        response = await omlx.achat(messages)
        stream = await omlx.astream_chat(messages)
        return response, [part async for part in stream]

    response, parts = asyncio.run(chat_asynchronously())
    assert response.message.content == parts[-1].message.content == first.text

    # One engine has served all of it.
    engine = get_shared_engine(sample_model, cache=settings)
    assert engine.cache.stats().matched_tokens_hot >= 10 * shared
    assert engine.cache.stats().hot.blocks_in_use == 0


def test_completions_share_their_prefix(omlx, document):
    text = f"{document}\n\nIn short:"
    first = omlx.complete(text)
    again = omlx.complete(text)
    assert first.text == again.text
    assert first.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again.raw["usage"]["prompt_tokens_details"]["cached_tokens"] >= 4 * BLOCK_SIZE
    *_, last = omlx.stream_complete(text)
    assert last.text == first.text

    async def complete_asynchronously():
        response = await omlx.acomplete(text)
        stream = await omlx.astream_complete(text)
        return response, [part async for part in stream]

    response, parts = asyncio.run(complete_asynchronously())
    assert response.text == parts[-1].text == first.text
