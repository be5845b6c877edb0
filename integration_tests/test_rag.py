"""Retrieved documents on the real model, through both frameworks: another order, the same answer, and less to read."""

import runpy
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from omlx_core import CacheSettings
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.rag.langchain import CacheAwareReorder

BLOCK_SIZE = 16
EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = ChatPromptTemplate([("system", "Answer from these.\n\n{context}"), ("user", "{question}")])
FACTS = [
    "Paris lies on the Seine. Its towers and museums draw more visitors than those of most cities.",
    "Rome lies on the Tiber. Its ruins and fountains are two thousand years of history side by side.",
    "Vienna lies on the Danube. Its palaces and coffee houses are known all over the world…",
    "Cairo lies on the Nile.\n\nThe pyramids stand at its edge; they are older than all of the others.",
]

pytestmark = pytest.mark.usefixtures("shared_engines", "llama_index_leaves_nothing")


def ask(llm, documents, question):
    context = "\n\n".join(document.page_content for document in documents)
    return (PROMPT | llm).invoke({"context": context, "question": question})


def test_documents_in_any_order_are_read_once_and_the_answer_is_that_of_their_new_order(sample_model):
    llm = ChatOMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=6)
    uncached = ChatOMLX(model=sample_model, kv_cache=CacheSettings(no_cache=True), max_tokens=6)
    plans = []
    reorder = CacheAwareReorder(llm=llm, prompt=PROMPT, on_reorder=plans.append)
    first = reorder.transform_documents([Document(fact) for fact in FACTS[:3]])
    ask(llm, first, "Where does Rome lie?")
    for retrieved in ([2, 1, 0], [1, 3, 0, 2]):
        documents = reorder.transform_documents([Document(FACTS[i]) for i in retrieved])
        answer = ask(llm, documents, "Where does Vienna lie?")
        assert sorted(document.page_content for document in documents) == sorted(FACTS[i] for i in retrieved)
        assert documents[:3] == first
        read = answer.usage_metadata["input_token_details"]["cache_read"]
        assert 0 <= read - plans[-1].expected.cached_tokens <= BLOCK_SIZE
        assert read >= 4 * BLOCK_SIZE
    assert answer.text == ask(uncached, documents, "Where does Vienna lie?").text


def test_moved_documents_save_most_of_the_prompt_and_leave_nothing_to_exact_requests(sample_model):
    llm = ChatOMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=6)
    moving = llm.model_copy(update={"document_reuse": "approximate", "document_recompute_tokens": 4})
    for order in ([0, 1, 2], [2, 1, 0]):
        documents = [Document(FACTS[i]) for i in order]
        answer = ask(moving.bind(documents=[FACTS[i] for i in order]), documents, "Where does Rome lie?")
    assert answer.response_metadata["omlx"]["approximate_tokens"] > answer.usage_metadata["input_tokens"] / 3
    exact = ask(llm, documents, "Where does Rome lie?")
    assert exact.usage_metadata["input_token_details"]["cache_read"] <= BLOCK_SIZE
    assert exact.text == ask(llm.bind(cache_salt="cold"), documents, "Where does Rome lie?").text


@pytest.mark.parametrize("example", ["langchain/reorder_documents.py", "llama_index/reorder_nodes.py"])
def test_the_examples_reuse_most_of_their_second_prompt(example, sample_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [example, sample_model])
    runpy.run_path(str(EXAMPLES / example))
    output = capsys.readouterr().out
    reused = [int(word) for line in output.splitlines() if "reused" in line for word in line.split() if word.isdigit()]
    assert reused[-1] >= 5 * BLOCK_SIZE
