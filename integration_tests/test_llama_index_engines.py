"""LlamaIndex's query engines, chat engines and ingestion on the real model."""

from __future__ import annotations

import hashlib
import re

import pytest
from llama_index.core import Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.extractors import (
    KeywordExtractor,
    PydanticProgramExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool
from pydantic import BaseModel, Field

from omlx_core import CacheSettings
from omlx_core.engine.shared import close_shared_engines
from omlx_plugins.llama_index import OMLX
from omlx_plugins.llama_index.structured import SchemaProgram

BLOCK_SIZE = 16
TEXTS = ("A block holds the keys and values of some tokens.", "Pinned blocks stay in RAM until they are unpinned.")


class WordHashes(BaseEmbedding):
    """Texts with the same words are alike; needs no model."""

    def _embed(self, text: str) -> list[float]:
        vector = [0.0] * 64
        for word in re.findall(r"\w+", text.lower()):
            vector[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._embed(query)


# LlamaIndex leaves event loops open, wherever it runs a coroutine of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("llama_index_leaves_nothing"),
]


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    yield
    close_shared_engines()


@pytest.fixture(autouse=True)
def llm(sample_model, monkeypatch):
    llm = OMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=3)
    monkeypatch.setattr(Settings, "_llm", llm)  # LlamaIndex asks for one here and there, even if it uses none
    return llm


@pytest.fixture
def nodes():
    return [TextNode(text=text, id_=str(number)) for number, text in enumerate(TEXTS)]


@pytest.fixture
def index(nodes):
    return VectorStoreIndex(nodes, embed_model=WordHashes())


@pytest.fixture
def asked(llm):
    """What the engine was asked, and what it reused, since the test began."""
    before = llm.get_engine().cache.stats()

    def count():
        after = llm.get_engine().cache.stats()
        reused = after.matched_tokens - before.matched_tokens
        return reused + after.missed_tokens - before.missed_tokens, reused

    return count


# Query engines


@pytest.mark.parametrize("mode", ResponseMode, ids=lambda mode: mode.value)
def test_every_response_mode_answers(llm, nodes, mode):
    response = SummaryIndex(nodes).as_query_engine(llm=llm, response_mode=mode).query("What is a block?")
    assert len(response.source_nodes) == 2
    assert bool(str(response)) or mode is ResponseMode.NO_TEXT
    if mode is ResponseMode.CONTEXT_ONLY:
        assert all(text in str(response) for text in TEXTS)


async def test_a_query_can_be_asynchronous_and_streamed(llm, nodes):
    index = SummaryIndex(nodes)
    whole = str(index.as_query_engine(llm=llm).query("What is a block?"))
    assert str(await index.as_query_engine(llm=llm, use_async=True).aquery("What is a block?")) == whole
    streamed = index.as_query_engine(llm=llm, streaming=True).query("What is a block?")
    assert "".join(streamed.response_gen) == whole


@pytest.mark.filterwarnings("ignore:The `json` method is deprecated")  # LlamaIndex calls it
def test_a_query_can_be_answered_with_an_object(llm, nodes):
    class Kept(BaseModel):
        """Where something is kept."""

        in_ram: bool

    structured = llm.model_copy(update={"max_tokens": 20}).as_structured_llm(Kept)
    response = SummaryIndex(nodes).as_query_engine(llm=structured).query("Where are blocks?")
    assert isinstance(response.response, Kept)


def test_the_second_question_about_a_context_skips_it(llm, index, asked):
    query_engine = index.as_query_engine(llm=llm, similarity_top_k=2)
    query_engine.query("What is a block?")
    first_tokens, first_reused = asked()
    query_engine.query("What is a block for?")
    tokens, reused = asked()
    assert reused - first_reused > 0.8 * (tokens - first_tokens)


def test_settings_give_the_llm(llm, index, nodes, monkeypatch):
    monkeypatch.setattr(Settings, "_embed_model", WordHashes())
    assert Settings.llm is llm
    assert str(VectorStoreIndex(nodes).as_query_engine().query("What is a block?"))
    assert str(index.as_chat_engine(chat_mode="context").chat("What is a block?"))


class Questions(BaseModel):
    """What is to be asked of one of two tools."""

    of_blocks: str = Field(max_length=10)
    of_pins: str = Field(max_length=10)


class StructuredQuestions(BaseQuestionGenerator):
    """Sub-questions as an object, since the sample model writes no JSON of its own accord."""

    def __init__(self, llm):
        self._llm = llm

    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        pass

    def generate(self, tools, query):
        made = self._llm.structured_predict(Questions, PromptTemplate("Split: {query}"), query=query.query_str)
        return self._questions(tools, made)

    async def agenerate(self, tools, query):
        made = await self._llm.astructured_predict(Questions, PromptTemplate("Split: {query}"), query=query.query_str)
        return self._questions(tools, made)

    def _questions(self, tools, made):
        texts = (made.of_blocks, made.of_pins)
        return [SubQuestion(sub_question=text, tool_name=tool.name) for tool, text in zip(tools, texts, strict=True)]


def test_sub_questions_go_to_their_engines(llm, nodes):
    tools = [
        QueryEngineTool.from_defaults(
            SummaryIndex([node]).as_query_engine(llm=llm), name=f"tool{node.id_}", description=node.text
        )
        for node in nodes
    ]
    engine = SubQuestionQueryEngine.from_defaults(
        tools,
        llm=llm,
        question_gen=StructuredQuestions(llm.model_copy(update={"max_tokens": 40})),
        verbose=False,
    )
    response = engine.query("What are blocks and pins?")
    assert str(response)
    assert len(response.source_nodes) >= 2


# Chat engines


@pytest.mark.parametrize("mode", ["simple", "condense_question", "context", "condense_plus_context"])
async def test_every_chat_engine_chats(llm, index, mode):
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=2000))
    assert str(engine.chat("What is a block?"))
    streamed = await engine.astream_chat("And a pin?")
    assert "".join([token async for token in streamed.async_response_gen()])
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"] * 2
    assert all(message.content for message in engine.chat_history)


@pytest.mark.parametrize("mode", ["simple", "context"])
async def test_a_chat_engines_other_forms(llm, index, mode):
    engine = index.as_chat_engine(chat_mode=mode, llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=2000))
    assert "".join(engine.stream_chat("What is a block?").response_gen)
    assert str(await engine.achat("And a pin?"))


# Ingestion


class Kind(BaseModel):
    """What a text is about."""

    about_ram: bool


async def test_all_extractors_extract(llm, nodes):
    program = SchemaProgram(Kind, llm.model_copy(update={"max_tokens": 20}), PromptTemplate("{input}"))
    pipeline = IngestionPipeline(
        transformations=[
            TitleExtractor(llm=llm, nodes=1),
            SummaryExtractor(llm=llm),
            QuestionsAnsweredExtractor(llm=llm, questions=1),
            KeywordExtractor(llm=llm, keywords=1),
            PydanticProgramExtractor(program=program),
        ]
    )
    [node] = await pipeline.arun(nodes=nodes[:1])
    assert node.metadata.keys() == {
        "document_title",
        "section_summary",
        "questions_this_excerpt_can_answer",
        "excerpt_keywords",
        "about_ram",
    }


def test_a_long_instruction_is_read_once_for_all_nodes(llm, asked):
    instruction = "Summarize in a few words, as a librarian would for the catalogue. " * 10
    nodes = [TextNode(text=f"Shelf {number} holds atlases.") for number in range(6)]
    extractor = SummaryExtractor(llm=llm, prompt_template=instruction + "{context_str}", num_workers=1)
    extractor(nodes)
    tokens, reused = asked()
    shared = len(llm.get_token_ids(instruction)) // BLOCK_SIZE * BLOCK_SIZE
    assert reused >= 5 * shared > tokens / 2
