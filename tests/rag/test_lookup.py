"""What the engine says that the cache has, before a request asks for it."""

from __future__ import annotations

import threading

import pytest
from rag_engine import BLOCK_SIZE, ask, chat, document, make_engine
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import tokens

from omlx_core import EngineSettings
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.block_tree import BlockTree

ROOT = NamespaceHash(b"n" * 32)
A, B, C = (BlockHash(bytes([number]) * 32) for number in range(3))


@pytest.mark.parametrize("model", [tiny_llama, tiny_gemma3, tiny_lfm2])
def test_a_request_finds_as_many_tokens_as_were_counted(model):
    with make_engine(model(), EngineSettings(prefill_step_size=48)) as engine:
        engine.generate(tokens(200, seed=1), max_tokens=20)
        for num_shared in (0, 5, 16, 17, 100, 160, 161, 162, 200):
            prompt = [*tokens(num_shared, seed=1), *tokens(60, seed=2)]
            counted = engine.count_cached_tokens(prompt)
            found = engine.generate(prompt, max_tokens=1, store=False).usage
            assert counted.prompt_tokens == found.prompt_tokens
            assert counted.cached_tokens_hot == found.cached_tokens_hot <= num_shared
            assert counted.cached_tokens_cold == found.cached_tokens_cold == 0


def test_the_last_token_is_never_counted():
    with make_engine() as engine:
        engine.generate(tokens(5 * BLOCK_SIZE), max_tokens=BLOCK_SIZE)
        assert engine.count_cached_tokens(tokens(4 * BLOCK_SIZE)).cached_tokens == 3 * BLOCK_SIZE
        assert engine.count_cached_tokens(tokens(4 * BLOCK_SIZE + 1)).cached_tokens == 4 * BLOCK_SIZE


def test_tiers_are_told_apart(tmp_path):
    prompt = tokens(100)
    with make_engine(paged_ssd_cache_dir=tmp_path, ssd_min_free=0) as engine:
        engine.generate(prompt, max_tokens=1)
        assert engine.count_cached_tokens(prompt).cached_tokens_hot == 96
    with make_engine(paged_ssd_cache_dir=tmp_path, ssd_min_free=0) as engine:
        counted = engine.count_cached_tokens(prompt)
        assert (counted.cached_tokens_hot, counted.cached_tokens_cold) == (0, 96)
        assert engine.cache.stats().cold.blocks_read == 0


def test_counting_changes_nothing():
    with make_engine() as engine:
        engine.generate(tokens(100), max_tokens=1)
        before = engine.cache.stats()
        assert engine.count_cached_tokens(tokens(100)).cached_tokens == 96
        assert engine.cache.stats() == before
        engine.cache.check()


def test_another_salt_has_nothing():
    with make_engine() as engine:
        engine.generate(tokens(100), max_tokens=1, cache_salt="a")
        assert engine.count_cached_tokens(tokens(100), cache_salt="a").cached_tokens == 96
        assert engine.count_cached_tokens(tokens(100), cache_salt="b").cached_tokens == 0


def test_an_uncached_model_has_nothing():
    documents = [document(1), document(2)]
    with make_engine(no_cache=True) as engine:
        ask(engine, documents)
        assert engine.count_cached_tokens(tokens(100)).cached_tokens == 0
        assert engine.find_cached_order(chat("\n\n".join(documents)), documents) == []


def test_others_may_look_while_the_engine_computes():
    is_computing, may_go_on = threading.Event(), threading.Event()

    def on_prefill(done, total):
        is_computing.set()
        may_go_on.wait(30)

    with make_engine() as engine:
        engine.generate(tokens(100), max_tokens=1)
        asking = threading.Thread(
            target=engine.generate, args=(tokens(100, seed=3),), kwargs={"max_tokens": 1, "on_prefill": on_prefill}
        )
        asking.start()
        assert is_computing.wait(30)
        counted = engine.count_cached_tokens(tokens(100))
        may_go_on.set()
        asking.join()
    assert counted.cached_tokens == 96


def test_the_tree_lists_the_latest_children_first():
    tree = BlockTree()
    for block_hash, token_ids in ((A, [1, 2]), (B, [3, 4]), (C, [5, 6])):
        tree.add(ROOT, (), block_hash, token_ids)
    assert [child.block_hash for child in tree.children(ROOT, (), limit=2)] == [C, B]
    assert tree.children(ROOT, (), limit=1)[0].token_ids.tolist() == [5, 6]


def test_the_tree_keeps_extra_keys_apart_and_forgets_to_the_last():
    tree = BlockTree()
    tree.add(ROOT, ("salt:a",), A, [1])
    tree.add(A, ("salt:a",), B, [2])
    assert tree.children(ROOT, (), limit=9) == []
    tree.discard(A)
    tree.discard(A)
    assert tree.children(ROOT, ("salt:a",), limit=9) == []
    assert [child.block_hash for child in tree.children(A, ("salt:a",), limit=9)] == [B]
    tree.discard(B)
    assert len(tree) == 0
    assert not tree._children
