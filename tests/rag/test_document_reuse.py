"""Documents put in place approximately: close to the exact answer, and never in the way of one."""

from __future__ import annotations

import random
import threading

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.models.cache import make_prompt_cache
from rag_engine import BLOCK_SIZE, SEPARATOR, ask, chat, document, make_engine
from tiny_models import tiny_gemma3, tiny_llama
from tiny_prompts import tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.cache.tiered_cache import TieredCache
from omlx_core.engine.document_reuse import DocumentReuse
from omlx_core.errors import InvalidParameterError, InvalidPromptError, RequestCancelledError
from omlx_core.model.text_places import TokenPlaces, locate
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.llama_index import OMLX

TEXTS = [document(number, 20) for number in range(4)]


def approximate(engine, texts, question="Which?", **options):
    given = {"document_reuse": "approximate", "documents": texts, "logprobs": True, **options}
    return ask(engine, texts, question, **given)


@pytest.fixture
def engine():
    with make_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def cold():
    with make_engine(no_cache=True) as cold:
        yield cold


def exact_logprobs(cold, texts, **options):
    return ask(cold, texts, logprobs=True, **options).logprobs


@pytest.mark.parametrize("recompute", [0, 16])
def test_in_a_model_of_one_layer_moved_documents_are_exact(recompute):
    # There keys and values depend on nothing but their token and its position.
    model = tiny_llama(num_hidden_layers=1)
    with make_engine(model) as engine, make_engine(model, no_cache=True) as cold:
        for order in ([0, 1, 2], [2, 0, 1], [3, 1]):
            texts = [TEXTS[i] for i in order]
            result = approximate(engine, texts, max_tokens=6, document_recompute_tokens=recompute)
            expected = ask(cold, texts, max_tokens=6, logprobs=True)
            assert result.usage.approximate_tokens > 100
            assert result.token_ids == expected.token_ids
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("recompute", [0, 16, 50])
@pytest.mark.parametrize("options", [{}, {"rope_traditional": True, "rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_the_answer_is_that_of_documents_put_together_by_hand(recompute, options):
    model = tiny_llama(num_hidden_layers=3, **options)
    with make_engine(model) as engine:
        for order in ([0, 1, 2], [2, 3, 0]):
            texts = [TEXTS[i] for i in order]
            prompt = chat(SEPARATOR.join(texts), "Which?")
            found = approximate(engine, texts, document_recompute_tokens=recompute)
            token_ids = engine.encode(prompt)
            text = engine.tokenizer.decode(token_ids)
            places = TokenPlaces(engine.tokenizer.decode, text, token_ids)
            spans = [
                places.tokens_within(at, at + len(each)) for at, each in zip(locate(text, texts), texts, strict=True)
            ]
            [logprob] = by_hand(model, token_ids, spans, recompute)
            assert found.logprobs == pytest.approx([logprob], abs=1e-4)


def by_hand(model, token_ids, spans, recompute):
    """The log-probability of the likeliest next token, with mlx-lm alone."""
    cache, at = make_prompt_cache(model), 0
    for start, stop in spans:
        alone = make_prompt_cache(model)
        model(mx.array([token_ids[start:stop]]), cache=alone)
        model(mx.array([token_ids[at : start + recompute]]), cache=cache)
        for layer, leaf, source in zip(model.layers, cache, alone, strict=True):
            keys = source.keys[..., recompute : stop - start, :]
            # One token at a time, each by the same distance.
            turned = [layer.self_attn.rope(keys[..., i : i + 1, :], offset=start) for i in range(keys.shape[2])]
            values = source.values[..., recompute : stop - start, :]
            leaf.update_and_fetch(mx.concatenate(turned, axis=2), values)
        at = stop
    logits = model(mx.array([token_ids[at:]]), cache=cache)[0, -1]
    return [(logits - mx.logsumexp(logits)).max().item()]


def test_the_tokens_computed_in_place_bring_the_answer_closer(engine, cold):
    texts = [TEXTS[i] for i in (2, 0, 1)]
    [expected] = exact_logprobs(cold, texts)
    [moved] = approximate(engine, texts, document_recompute_tokens=0).logprobs
    [repaired] = approximate(engine, texts).logprobs
    [whole] = approximate(engine, texts, document_recompute_tokens=1000).logprobs
    assert abs(repaired - expected) < abs(moved - expected)
    assert whole == expected


def test_documents_are_computed_once_and_found_in_any_order(engine, monkeypatch):
    store, stored = DocumentReuse._store, []
    monkeypatch.setattr(
        DocumentReuse, "_store", lambda self, ids, keys, cache: stored.append(ids) or store(self, ids, keys, cache)
    )
    approximate(engine, TEXTS)
    assert len(stored) == len(TEXTS)
    for seed in range(3):
        texts = random.Random(seed).sample(TEXTS, 3)
        usage = approximate(engine, texts, f"{seed}: which?").usage
        assert usage.prompt_tokens - usage.cached_tokens - usage.approximate_tokens < 150 < usage.prompt_tokens
    assert len(stored) == len(TEXTS)


@pytest.mark.parametrize("store", [True, False])
def test_nothing_of_an_approximate_prompt_serves_an_exact_request(engine, cold, store):
    texts = [TEXTS[i] for i in (2, 0, 1)]
    approximate(engine, texts, max_tokens=40, store=True)
    approximate(engine, texts, "Another?", max_tokens=40, store=store)
    prompt = chat(SEPARATOR.join(texts), "Which?")
    token_ids = engine.encode(prompt)
    starts = engine.find_starts(prompt, texts)
    exact_tokens = (starts[0] + 16) // BLOCK_SIZE * BLOCK_SIZE
    # Nor may what was computed in place be found as a sequence of its own, with the documents' rest left out.
    places = TokenPlaces(engine.tokenizer.decode, engine.tokenizer.decode(token_ids), token_ids)
    ends = [places.tokens_within(0, engine.tokenizer.decode(token_ids).index(each) + len(each))[1] for each in texts]
    pieces = zip([0, *ends], [start + 16 for start in starts] + [None], strict=True)
    in_place = [token_id for start, stop in pieces for token_id in token_ids[start:stop]]
    assert engine.count_cached_tokens(in_place).cached_tokens <= exact_tokens
    assert ask(engine, texts, "Other?", store=False).divergence is None

    result = ask(engine, texts, max_tokens=40, logprobs=True)
    expected = ask(cold, texts, max_tokens=40, logprobs=True)
    assert result.usage.cached_tokens <= exact_tokens
    assert result.token_ids == expected.token_ids
    assert result.logprobs == expected.logprobs
    engine.cache.check()
    assert engine.cache.stats().hot.blocks_in_use == 0


def test_a_document_is_not_found_as_a_prompt(engine):
    approximate(engine, TEXTS)
    token_ids = engine.tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert engine.count_cached_tokens([*token_ids, 1]).cached_tokens == 0
    assert engine.generate([*token_ids, 1], max_tokens=1).usage.cached_tokens == 0


def test_an_exact_prefix_is_used_as_it_is_and_only_the_rest_is_moved(engine, cold):
    ask(engine, TEXTS[:2], "First?")
    result = approximate(engine, TEXTS)
    prompt = chat(SEPARATOR.join(TEXTS), "Which?")
    third = engine.find_starts(prompt, TEXTS)[2]
    assert third - BLOCK_SIZE < result.usage.cached_tokens <= third + BLOCK_SIZE
    assert 0 < result.usage.approximate_tokens < len(engine.encode(prompt)) - third
    assert result.logprobs == pytest.approx(exact_logprobs(cold, TEXTS), abs=0.2)


def test_documents_too_short_to_gain_by_it_are_exact(engine, cold):
    texts = ["tiny", "short too", "ζ"]
    result = approximate(engine, texts)
    assert result.usage.approximate_tokens == 0
    assert result.logprobs == exact_logprobs(cold, texts)


def test_white_space_around_documents_does_not_count(engine):
    spaced = [f"  {text}\n" for text in TEXTS]
    found = approximate(engine, TEXTS, documents=spaced)
    assert found.usage.approximate_tokens == approximate(engine, TEXTS).usage.approximate_tokens > 100


def test_a_document_that_continues_another_is_kept_apart_from_it():
    # Both fill their last block up; the longer one with the token that the shorter one is filled up with.
    model = tiny_llama(num_hidden_layers=1)
    with make_engine(model) as engine, make_engine(model, no_cache=True) as cold:
        filler = engine.tokenizer.decode([0])
        shorter = "".join(chr(ord("a") + number % 26) for number in range(40))
        for text in (shorter, shorter + filler):
            result = approximate(engine, [text])
            assert result.usage.approximate_tokens > 20
            assert result.logprobs == pytest.approx(exact_logprobs(cold, [text]), abs=1e-4)


def test_documents_are_found_after_a_restart(tmp_path):
    options = {"paged_ssd_cache_dir": tmp_path, "ssd_min_free": 0}
    with make_engine(**options) as engine:
        [expected] = approximate(engine, TEXTS).logprobs
        engine.cache.flush()
        assert engine.cache.stats().cold.blocks_written > 4 * 100 // BLOCK_SIZE
    with make_engine(**options) as engine:
        result = approximate(engine, TEXTS)
        assert result.logprobs == [expected]
        assert engine.cache.stats().hot.blocks_in_use == 0
        engine.cache.flush()
        assert engine.cache.stats().cold.blocks_written == 0


def test_another_salt_does_not_find_them(engine):
    approximate(engine, TEXTS, cache_salt="a")
    blocks = engine.cache.stats().hot.hot_blocks
    approximate(engine, TEXTS, cache_salt="b")
    assert engine.cache.stats().hot.hot_blocks == 2 * blocks


def test_without_documents_and_by_default_nothing_is_approximate(engine, cold):
    expected = exact_logprobs(cold, TEXTS)
    for options in ({"document_reuse": "approximate"}, {"documents": TEXTS}, {}):
        result = ask(engine, TEXTS, logprobs=True, store=False, **options)
        assert result.usage.approximate_tokens == 0
        assert result.logprobs == expected


async def test_samples_streams_and_tasks_are_approximate_too(engine):
    options = {"document_reuse": "approximate", "documents": TEXTS, "max_tokens": 3}
    prompt = chat(SEPARATOR.join(TEXTS), "Which?")
    expected = engine.generate(prompt, **options)
    sampled = engine.sample(prompt, 2, **options)
    *_, last = engine.stream(prompt, **options)
    for result in (*sampled, last.result, await engine.agenerate(prompt, **options)):
        assert result.token_ids == expected.token_ids
        assert result.usage.approximate_tokens == expected.usage.approximate_tokens > 0
    assert engine.cache.stats().hot.blocks_in_use == 0


def test_beside_others_an_approximate_request_changes_nothing_for_them(cold):
    prompts = [tokens(150, seed=seed) for seed in range(4)]
    with make_engine(settings=EngineSettings(prefill_step_size=32)) as engine:
        results = {}

        def generate(number):
            results[number] = engine.generate(prompts[number], max_tokens=8)

        threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        approximate(engine, TEXTS, max_tokens=8)
        for thread in threads:
            thread.join()
        engine.cache.check()
    for number, prompt in enumerate(prompts):
        assert results[number].token_ids == cold.generate(prompt, max_tokens=8).token_ids


def test_a_request_that_ends_while_a_document_is_computed_holds_nothing(monkeypatch):
    advance = DocumentReuse._advance_document
    steps = []

    def cancel_at_third(self, request, span, step_size):
        steps.append(span)
        if len(steps) == 3:
            request.cancel()
        return advance(self, request, span, step_size)

    monkeypatch.setattr(DocumentReuse, "_advance_document", cancel_at_third)
    with make_engine(settings=EngineSettings(prefill_step_size=8)) as engine:
        with pytest.raises(RequestCancelledError):
            approximate(engine, TEXTS)
        assert steps == [steps[0]] * 3
        assert engine.cache.stats().hot.blocks_in_use == 0
        assert approximate(engine, TEXTS).usage.approximate_tokens > 0


def test_a_document_that_can_not_be_stored_costs_its_reuse_and_not_the_answer(monkeypatch, caplog):
    with make_engine() as engine:
        expected = approximate(engine, TEXTS).logprobs
    store = TieredCache.store

    def store_no_documents(self, table, capture):
        if "document" in table.extra_keys:
            raise OSError("no room")
        store(self, table, capture)

    monkeypatch.setattr(TieredCache, "store", store_no_documents)
    with make_engine() as engine:
        assert approximate(engine, TEXTS).logprobs == expected
        assert engine.cache.stats().hot.blocks_in_use == 0
    assert caplog.text.count("could not be stored") == len(TEXTS)


@pytest.mark.parametrize(
    ("model", "settings", "cache", "why"),
    [
        (tiny_gemma3, {}, {}, "RotatingKVCache"),
        (tiny_llama, {"kv_bits": 8, "kv_group_size": 16}, {}, "quantized"),
        (tiny_llama, {"max_kv_size": 64}, {}, "RotatingKVCache"),
        (tiny_llama, {}, {"no_cache": True}, "without a prefix cache"),
    ],
)
def test_models_whose_keys_can_not_be_moved_are_refused(model, settings, cache, why):
    if "kv_group_size" in settings:
        model = lambda: tiny_llama(head_dim=32)  # noqa: E731 - groups of 32 are the smallest
        settings = {**settings, "kv_group_size": 32}
    if "max_kv_size" in settings:
        from tiny_models import tiny_qwen3 as model
    with (
        make_engine(model(), EngineSettings(**settings), **cache) as engine,
        pytest.raises(InvalidParameterError, match=f"document_reuse='approximate' is not for model: .*{why}"),
    ):
        approximate(engine, TEXTS)


def test_a_model_with_a_draft_is_refused():
    with (
        Engine(
            tiny_llama(), tiny_tokenizer(), cache=CacheSettings(block_size=16), draft_model=tiny_llama(seed=1)
        ) as engine,
        pytest.raises(InvalidParameterError, match="document_reuse='approximate' is not for"),
    ):
        approximate(engine, TEXTS)


def test_what_can_not_be_meant_is_refused(engine):
    with pytest.raises(InvalidParameterError, match="document_reuse='near'"):
        ask(engine, TEXTS, document_reuse="near")
    with pytest.raises(InvalidParameterError, match="documents='text'"):
        ask(engine, TEXTS, documents="text")
    with pytest.raises(InvalidParameterError, match="pin"):
        approximate(engine, TEXTS, pin=True)
    with pytest.raises(InvalidPromptError, match=r"documents\[0\]='absent'"):
        approximate(engine, TEXTS, documents=["absent"])
    with pytest.raises(InvalidPromptError, match="token ids"):
        engine.generate([1, 2, 3], document_reuse="approximate", documents=["text"])


def test_langchain_and_llama_index_ask_for_it_alike(engine):
    text = f"Answer:\n\n{SEPARATOR.join(TEXTS)}\n\nWhich?"
    chat_omlx = ChatOMLX(engine=engine, max_tokens=4, document_reuse="approximate")
    message = chat_omlx.invoke(text, documents=TEXTS)
    bound = chat_omlx.bind(documents=TEXTS).invoke(text)
    response = OMLX(engine=engine, max_tokens=4, document_reuse="approximate").complete(text, documents=TEXTS)
    assert message.response_metadata["omlx"]["approximate_tokens"] > 100
    assert bound.response_metadata["omlx"]["approximate_tokens"] > 100
    assert response.raw["omlx"]["approximate_tokens"] > 100
    assert message.text == bound.text == response.text
    exact = ChatOMLX(engine=engine, max_tokens=4).invoke(text, documents=TEXTS)
    assert "approximate_tokens" not in exact.response_metadata["omlx"]
