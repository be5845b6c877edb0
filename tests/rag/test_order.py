"""Documents in the order that the cache knows best: the same documents, and the longest chain that there is."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rag_engine import BLOCK_SIZE, SEPARATOR, ask, chat, document, make_engine
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama

from omlx_core.engine.prompt_lookup import PromptLookup
from omlx_core.errors import InvalidParameterError, InvalidPromptError
from omlx_plugins.rag.reorder import canonical_key, reorder

# Of some a block holds several; two are equal, and two begin alike.
DOCUMENTS = [*(document(number) for number in range(4)), "tiny", "so is this", document(2), document(3) + " and more"]
ASKED = [[0, 1, 2], [0, 2, 4, 5], [1, 7, 3], [3, 0], [5, 4, 1, 2], [4, 5, 0, 3]]


@pytest.fixture(scope="module")
def engine():
    with make_engine() as engine:
        for number, numbers in enumerate(ASKED):
            ask(engine, [DOCUMENTS[i] for i in numbers], f"Question {number}?")
        yield engine


def plan(engine, documents, **options):
    return reorder(engine, documents, render=chat, separator=SEPARATOR, **options)


def count(engine, documents, **options):
    return engine.count_cached_tokens(chat(SEPARATOR.join(documents)), **options).cached_tokens


few_examples = settings(max_examples=40, deadline=None)
numbers = st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=6)


@few_examples
@given(numbers)
def test_the_order_is_a_permutation_and_the_context_has_every_document_as_it_was(engine, numbers):
    documents = [DOCUMENTS[i] for i in numbers]
    found = plan(engine, documents)
    assert sorted(found.order) == list(range(len(documents)))
    assert found.context == SEPARATOR.join(documents[i] for i in found.order)
    assert found.num_chained <= len(documents)


@few_examples
@given(st.lists(st.text(), max_size=5))
def test_any_texts_are_permuted_and_none_is_changed(engine, documents):
    found = plan(engine, documents)
    assert sorted(found.order) == list(range(len(documents)))
    assert found.context == SEPARATOR.join(documents[i] for i in found.order)


@few_examples
@given(numbers, st.randoms())
def test_equal_sets_give_equal_prompts_however_they_arrive(engine, numbers, draw):
    documents = [DOCUMENTS[i] for i in numbers]
    shuffled = draw.sample(documents, len(documents))
    assert plan(engine, documents) == plan(engine, documents)
    assert plan(engine, shuffled).context == plan(engine, documents).context


@few_examples
@given(numbers)
def test_equal_documents_keep_their_order(engine, numbers):
    documents = [DOCUMENTS[i] for i in numbers]
    order = plan(engine, documents).order
    for text in set(documents):
        same = [index for index in order if documents[index] == text]
        assert same == sorted(same)


@few_examples
@given(st.lists(st.integers(0, len(DOCUMENTS) - 1), min_size=1, max_size=4))
def test_no_other_order_is_cached_further(engine, numbers):
    documents = [DOCUMENTS[i] for i in numbers]
    found = plan(engine, documents)
    best = max(count(engine, order) for order in itertools.permutations(documents))
    assert found.expected.cached_tokens == count(engine, [documents[i] for i in found.order]) == best


@pytest.mark.parametrize("asked", ASKED)
def test_what_was_asked_is_found_again_in_its_order(engine, asked):
    documents = [DOCUMENTS[i] for i in asked]
    found = plan(engine, sorted(documents))
    assert found.num_chained == len(documents)
    assert found.context == SEPARATOR.join(documents)


def test_each_block_is_looked_at_once_however_many_orders_there_are(monkeypatch):
    looked_at = []
    read = PromptLookup._text_of
    monkeypatch.setattr(
        PromptLookup, "_text_of", lambda self, name, *args: looked_at.append(name) or read(self, name, *args)
    )
    texts = [document(number) for number in range(7)]
    with make_engine() as engine:
        for seed in range(12):
            ask(engine, random.Random(seed).sample(texts, 7), f"Question {seed}?")
        num_blocks = engine.cache.stats().hot.hot_blocks
        looked_at.clear()
        assert plan(engine, texts).num_chained == 7
    # Those of the prompt's own head are decoded beside the tree's.
    assert len(looked_at) <= num_blocks + 3
    assert num_blocks > 100


@pytest.mark.parametrize("model", [tiny_llama, tiny_gemma3, tiny_lfm2])
@pytest.mark.parametrize("restarts", [False, True])
def test_what_is_expected_is_what_a_request_reuses(model, restarts, tmp_path):
    texts = [document(number) for number in range(5)]
    options = {"paged_ssd_cache_dir": tmp_path, "ssd_min_free": 0}
    draw = random.Random(1)
    engine = make_engine(model(), **options)
    saved = 0
    for number in range(8):
        documents = draw.sample(texts, 3)
        found = plan(engine, documents)
        usage = ask(engine, [documents[i] for i in found.order], f"{number}: which?").usage
        # What stands between the documents and the question is shared as well.
        assert 0 <= usage.cached_tokens_hot - found.expected.cached_tokens_hot <= (0 if restarts else BLOCK_SIZE)
        assert 0 <= usage.cached_tokens_cold - found.expected.cached_tokens_cold <= (BLOCK_SIZE if restarts else 0)
        saved += usage.cached_tokens
        if restarts:
            engine.close()
            engine = make_engine(model(), **options)
    engine.close()
    assert saved > 0


def test_a_chain_that_can_not_be_restored_comes_after_one_that_can():
    first, second, third = (document(number) for number in range(3))

    def text(context, question=""):
        return f"Answer:\n\n{context}\n\n{question}"

    with make_engine(tiny_lfm2()) as engine:
        # Of recurrent layers a state is kept at a prompt's end, and where a second one was seen to leave a first one.
        for documents, question in (([third, first], "Which of them?"), ([third, first], "How many?")):
            engine.generate(text(SEPARATOR.join(documents), question * 4), max_tokens=1)
        engine.generate(text(SEPARATOR.join([first, second, third]), "Which of them?" * 4), max_tokens=1)
        found = reorder(engine, [first, second, third], render=text)
    assert found.order[:2] == (2, 0)
    assert found.expected.cached_tokens >= 6 * BLOCK_SIZE


def test_the_chain_of_another_salt_is_not_found():
    documents = sorted((document(number) for number in range(3)), key=canonical_key, reverse=True)
    with make_engine() as engine:
        ask(engine, documents, cache_salt="a")
        assert plan(engine, documents, options={"cache_salt": "a"}).num_chained == 3
        assert plan(engine, documents, options={"cache_salt": "b"}).num_chained == 0
        assert plan(engine, documents).order == (2, 1, 0)


def test_a_chain_that_was_evicted_is_not_found():
    documents = sorted((document(number) for number in range(3)), key=canonical_key, reverse=True)
    with make_engine(hot_cache_max_size=100 * 1024) as engine:
        ask(engine, documents)
        assert plan(engine, documents).num_chained == 3
        for number in range(10, 20):
            ask(engine, [document(number, 30)])
        found = plan(engine, documents)
        assert (found.num_chained, found.expected.cached_tokens) == (0, count(engine, [*reversed(documents)]))
        engine.cache.check()


def test_documents_with_keys_of_their_own_follow_these(engine):
    documents = [document(number) for number in (30, 31, 32)]
    assert plan(engine, documents, keys=[2, 3, 1]).order == (2, 0, 1)


def test_a_document_that_the_prompt_lacks_is_named():
    with make_engine() as engine:
        with pytest.raises(InvalidPromptError, match=r"documents\[1\]='absent'"):
            engine.find_cached_order(chat("present"), ["present", "absent"])
        with pytest.raises(InvalidPromptError, match="token ids"):
            engine.find_cached_order([1, 2, 3], ["present"])


def test_aligned_documents_begin_blocks_and_are_reused_whatever_follows():
    first, second, third = sorted((document(number) for number in range(3)), key=canonical_key)
    with make_engine() as engine:
        found = plan(engine, [second, third], align=True)
        assert found.order == (0, 1)
        assert all(not space.strip() for space in found.padding)
        starts = engine.find_starts(chat(found.context), [second, third])
        assert [start % BLOCK_SIZE for start in starts] == [0, 0]
        engine.generate(chat(found.context, "Which?"), max_tokens=1)
        # The one that stands first is reused with another one behind it, to its last full block and no token less.
        again = plan(engine, [first, second], align=True)
        assert (again.order, again.num_chained) == ((1, 0), 1)
        assert again.expected.cached_tokens >= starts[1] - BLOCK_SIZE
        assert plan(engine, [third, second], align=True).context == found.context


@few_examples
@given(st.lists(st.sampled_from([document(40, n) for n in range(1, 7)]), max_size=4))
def test_aligning_changes_no_document(engine, documents):
    found = plan(engine, documents, align=True)
    assert sorted(found.order) == list(range(len(documents)))
    pieces = (space + documents[i] for space, i in zip(found.padding, found.order, strict=True))
    assert found.context == SEPARATOR.join(pieces)
    assert not "".join(found.padding).strip()


def test_documents_are_aligned_by_white_space_only(engine):
    with pytest.raises(InvalidParameterError, match="separator='---'"):
        reorder(engine, ["a", "b"], render=chat, separator="---", align=True)


def test_an_order_that_is_cached_gives_the_answer_of_that_order_to_the_last_bit():
    documents = [document(number) for number in range(4)]
    with make_engine() as warm, make_engine(no_cache=True) as cold:
        ask(warm, documents[:3], "First?")
        found = plan(warm, documents)
        assert found.num_chained >= 3
        prompt = chat(found.context, "Second?")
        answers = [each.generate(prompt, max_tokens=8, logprobs=True) for each in (warm, cold)]
    assert answers[0].usage.cached_tokens >= 4 * BLOCK_SIZE
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs
