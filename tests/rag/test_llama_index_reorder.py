"""LlamaIndex's nodes in the order that the cache knows best."""

from __future__ import annotations

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.response.schema import Response
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from rag_engine import BLOCK_SIZE, document
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine
from omlx_core.errors import InvalidParameterError
from omlx_plugins.llama_index import OMLX
from omlx_plugins.rag.llama_index import CacheAwareReorder

pytestmark = pytest.mark.usefixtures("llama_index_leaves_nothing")

TEMPLATE = PromptTemplate("Answer from these.\n\n{context_str}\n\n{query_str}")


@pytest.fixture(params=["chat", "completion"])
def engine(request):
    template = {} if request.param == "chat" else {"chat_template": None}
    with Engine(tiny_llama(), tiny_tokenizer(**template), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine


@pytest.fixture
def llm(engine):
    return OMLX(engine=engine, max_tokens=1)


def nodes_of(*numbers):
    return [
        NodeWithScore(node=TextNode(id_=str(number), text=document(number), metadata={"source": f"{number}.md"}))
        for number in numbers
    ]


def ids(nodes):
    return [each.node.node_id for each in nodes]


class Retriever(BaseRetriever):
    """Finds nodes by the numbers in a question."""

    def _retrieve(self, query_bundle):
        return nodes_of(*query_bundle.query_str.split())


def query_engine(llm, **options):
    reorder = CacheAwareReorder(llm=llm, text_qa_template=options.get("text_qa_template"), **options.pop("reorder", {}))
    synthesizer = get_response_synthesizer(llm=llm, response_mode="compact", **options)
    return RetrieverQueryEngine(Retriever(), response_synthesizer=synthesizer, node_postprocessors=[reorder])


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_query_engine_reuses_what_was_expected_with_any_template(engine, llm, template):
    plans = []
    options = {} if template is None else {"text_qa_template": template}
    asking = query_engine(llm, reorder={"on_reorder": plans.append}, **options)
    for question in ("0 1 2", "2 1 0", "0 1 2 3", "1 4 0 2"):
        before = engine.cache.stats().matched_tokens
        response = asking.query(question)
        read = engine.cache.stats().matched_tokens - before
        assert isinstance(response, Response)
        assert sorted(ids(response.source_nodes)) == sorted(question.split())
        assert 0 <= read - plans[-1].expected.cached_tokens <= 4 * BLOCK_SIZE  # the template's words after the nodes
    assert [plan.num_chained >= 3 for plan in plans] == [False, True, True, True]


def test_nodes_of_the_longest_cached_chain_come_first_and_are_the_same_objects(llm):
    reorder = CacheAwareReorder(llm=llm, text_qa_template=TEMPLATE)
    context = reorder.plan(nodes_of(3, 1, 2)).context
    llm.predict(TEMPLATE, context_str=context, query_str="Which?")
    arrived = nodes_of(2, 5, 1, 4, 3)
    ordered = reorder.postprocess_nodes(arrived)
    assert set(ids(ordered[:3])) == {"1", "2", "3"}
    assert sorted(map(id, ordered)) == sorted(map(id, arrived))


async def test_asynchronous_form_gives_the_same(llm):
    reorder = CacheAwareReorder(llm=llm)
    nodes = nodes_of(0, 1, 2)
    assert ids(await reorder.apostprocess_nodes(nodes)) == ids(reorder.postprocess_nodes(nodes))


def test_what_the_cache_does_not_order_is_sorted_by_a_key_of_ones_own(llm):
    reorder = CacheAwareReorder(llm=llm, key=lambda each: each.node.node_id)
    assert ids(reorder.postprocess_nodes(nodes_of(2, 0, 1))) == ["0", "1", "2"]


def test_aligned_nodes_begin_a_block_in_the_context_of_the_plan(engine, llm):
    reorder = CacheAwareReorder(llm=llm, text_qa_template=TEMPLATE, align=True)
    nodes = nodes_of(0, 1)
    plan = reorder.plan(nodes)
    text = TEMPLATE.format(context_str=plan.context, query_str="Which?")
    prompt = [{"role": "user", "content": text}] if engine.has_chat_template else text
    order = [nodes[i].node.get_content("llm") for i in plan.order]
    assert [start % BLOCK_SIZE for start in engine.find_starts(prompt, order)] == [0, 0]


def test_a_template_without_a_place_for_documents_is_refused(llm):
    with pytest.raises(InvalidParameterError, match="none is 'context_str'"):
        CacheAwareReorder(llm=llm, text_qa_template="{query_str}")


def test_it_is_written_down_by_its_own_name(llm):
    assert CacheAwareReorder.class_name() == "OMLXCacheAwareReorder"
    assert CacheAwareReorder(llm=llm).postprocess_nodes([]) == []
