from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rag.py"


@pytest.fixture(scope="module")
def rag() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # it imports what the benchmarks share
    try:
        spec = importlib.util.spec_from_file_location("rag_benchmark", SCRIPT)
        module = sys.modules["rag_benchmark"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


def test_a_section_of_the_page_is_replaced_and_the_rest_stays(rag):
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n<!-- y: begin -->\nkept\n<!-- y: end -->\n"
    assert rag.with_section(page, "x", "new\n") == page.replace("old", "new")


def test_hit_rates_weigh_documents_by_their_tokens(rag):
    way = rag.Way(sizes=[[10, 20], [30, 20]], hits=[[10, 0], [0, 20]])
    assert way.hit_rates() == [0.25, 0.5]


def test_the_corpus_and_the_questions_are_the_same_each_time(rag):
    documents = rag.corpus(20)
    shortest, longest = rag.PIECE_CHARS
    assert len({document.text for document in documents}) == 20
    assert all(shortest <= len(document.text) <= longest for document in documents)
    assert not {document.source for document in documents} & rag.NOT_IN_THE_CORPUS
    asked = rag.questions(documents, 50, random.Random(1))
    assert asked == rag.questions(documents, 50, random.Random(1))
    assert len(set(asked)) > 30
