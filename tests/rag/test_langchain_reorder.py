"""LangChain's documents in the order that the cache knows best."""

from __future__ import annotations

import sys

import pytest
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate, format_document
from rag_engine import BLOCK_SIZE, document, make_engine

from omlx_core.errors import InvalidParameterError, MissingDependencyError
from omlx_plugins.langchain import OMLX, ChatOMLX
from omlx_plugins.rag.langchain import CacheAwareReorder

PROMPT = ChatPromptTemplate([("system", "Answer from these:\n\n{context}"), ("user", "{question}")])
ALIGNED = PromptTemplate.from_template("{omlx_padding}{page_content}")


@pytest.fixture
def engine():
    with make_engine() as engine:
        yield engine


@pytest.fixture
def llm(engine):
    return ChatOMLX(engine=engine, max_tokens=1)


def documents_of(*numbers):
    return [Document(document(number), id=str(number), metadata={"source": f"{number}.md"}) for number in numbers]


def answer(llm, documents, prompt=PROMPT, question="Which?"):
    context = "\n\n".join(each.page_content for each in documents)
    return (prompt | llm).invoke({"context": context, "question": question})


def cache_read(message):
    return message.usage_metadata["input_token_details"]["cache_read"]


def test_it_is_a_transformer_and_a_compressor(llm):
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT)
    assert isinstance(reorder, BaseDocumentTransformer)
    assert isinstance(reorder, BaseDocumentCompressor)
    documents = documents_of(0, 1, 2)
    assert reorder.compress_documents(documents, "Which?") == reorder.transform_documents(documents)


def test_documents_of_the_longest_cached_chain_come_first_and_are_the_same_objects(llm):
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT)
    first = documents_of(3, 1, 2)
    answer(llm, first)
    arrived = documents_of(2, 5, 1, 4, 3)
    ordered = reorder.transform_documents(arrived)
    assert [each.id for each in ordered[:3]] == ["3", "1", "2"]
    assert sorted(map(id, ordered)) == sorted(map(id, arrived))


def test_the_answer_reuses_what_was_expected(llm):
    plans = []
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT, on_reorder=plans.append)
    for number, numbers in enumerate([(0, 1, 2), (3, 1, 0), (2, 1, 0), (4, 0, 1)]):
        ordered = reorder.transform_documents(documents_of(*numbers))
        read = cache_read(answer(llm, ordered, question=f"{number}: which?"))
        assert 0 <= read - plans[-1].expected.cached_tokens <= BLOCK_SIZE
    assert [plan.expected.cached_tokens > 0 for plan in plans] == [False, *[True] * 3]
    assert plans[2].num_chained == 3


async def test_asynchronous_forms_give_the_same(llm):
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT)
    documents = documents_of(0, 1, 2)
    ordered = reorder.transform_documents(documents)
    assert await reorder.atransform_documents(documents) == ordered
    assert await reorder.acompress_documents(documents, "Which?") == ordered


def test_prompts_may_be_templates_strings_and_functions(engine, llm):
    text = "Answer from these:\n\n{context}\n\n{question}"
    template = PromptTemplate.from_template(text)
    completion = OMLX(engine=engine, max_tokens=1)
    documents = documents_of(2, 0, 1)
    context = "\n\n".join(each.page_content for each in documents)
    for model in (llm, completion):
        model.invoke(template.format(context=context, question="Which?"))
        for prompt in (text, template, lambda context: text.format(context=context, question="")):
            plan = CacheAwareReorder(llm=model, prompt=prompt).plan(documents)
            assert (plan.order, plan.num_chained) == ((0, 1, 2), 3)


def test_documents_are_found_as_the_chain_writes_them(llm):
    written = PromptTemplate.from_template("<{source}>\n{page_content}\n</>")
    documents = documents_of(2, 0, 1)
    context = "\n\n".join(format_document(each, written) for each in documents)
    (PROMPT | llm).invoke({"context": context, "question": "Which?"})
    plan = CacheAwareReorder(llm=llm, prompt=PROMPT, document_prompt=written).plan(documents)
    assert (plan.order, plan.num_chained, plan.context) == ((0, 1, 2), 3, context)


def test_options_of_the_requests_count(llm):
    documents = documents_of(2, 0, 1)
    answer(llm.bind(cache_salt="a"), documents)
    assert CacheAwareReorder(llm=llm, prompt=PROMPT, options={"cache_salt": "a"}).plan(documents).num_chained == 3
    assert CacheAwareReorder(llm=llm, prompt=PROMPT).plan(documents).num_chained == 0


def test_what_the_cache_does_not_order_is_sorted_by_a_key_of_ones_own(llm):
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT, key=lambda each: each.metadata["source"])
    assert [each.id for each in reorder.transform_documents(documents_of(2, 0, 1))] == ["0", "1", "2"]


def test_aligned_documents_begin_a_block_where_the_chain_writes_their_padding(engine, llm):
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT, document_prompt=ALIGNED, align=True)
    arrived = documents_of(0, 1, 2)
    ordered = reorder.transform_documents(arrived)
    assert {each.page_content for each in ordered} == {each.page_content for each in arrived}
    assert all("omlx_padding" not in each.metadata for each in arrived)
    context = "\n\n".join(format_document(each, ALIGNED) for each in ordered)
    chat = [{"role": "system", "content": f"Answer from these:\n\n{context}"}, {"role": "user", "content": "Which?"}]
    starts = engine.find_starts(chat, [each.page_content for each in ordered])
    assert [start % BLOCK_SIZE for start in starts] == [0, 0, 0]
    (PROMPT | llm).invoke({"context": context, "question": "Which?"})
    assert [each.id for each in reorder.transform_documents(ordered)] == [each.id for each in ordered]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (ChatPromptTemplate([("user", "{question}\n\n{context}")]), "'question' before 'context'"),
        (ChatPromptTemplate([("user", "{question}")]), "none is 'context'"),
        ("{question}", "none is 'context'"),
    ],
)
def test_a_prompt_in_which_nothing_could_be_reused_is_refused(llm, prompt, message):
    with pytest.raises(InvalidParameterError, match=message):
        CacheAwareReorder(llm=llm, prompt=prompt)


def test_a_placeholder_for_earlier_messages_stays_empty(llm):
    prompt = ChatPromptTemplate(
        [("system", "Answer:\n\n{context}"), MessagesPlaceholder("history"), ("user", "{question}")]
    )
    assert len(CacheAwareReorder(llm=llm, prompt=prompt).transform_documents(documents_of(0, 1))) == 2


def test_no_documents_are_no_documents(llm):
    assert CacheAwareReorder(llm=llm, prompt=PROMPT).transform_documents([]) == []


def test_a_missing_framework_is_named_with_its_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "omlx_plugins.rag.langchain_reorder")
    monkeypatch.setitem(sys.modules, "langchain_core.callbacks", None)
    with pytest.raises(MissingDependencyError, match=r"omlx-plugins\[langchain\]"):
        from omlx_plugins.rag.langchain import CacheAwareReorder  # noqa: F401
