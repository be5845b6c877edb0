"""An answer that is alone is decoded without the batch, and moves there when a second one comes."""

from omlx_core.mlx_backend import mx

import pytest
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, EngineSettings, Regex
from omlx_core.engine.decoding import DecodingBatches
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.request import Request

NUM_TOKENS = 40
FAMILIES = {"full": tiny_llama, "windowed": lambda: tiny_gemma3(window=21), "recurrent": tiny_lfm2}
OPTIONS = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    "penalised": {"repetition_penalty": 1.3},
    "constrained": {"constraint": Regex("[a-z ]{10,60}")},
}


@pytest.fixture
def engine(model):
    with Engine(model, tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine
        engine.generate(tokens(5), max_tokens=1)  # by then, what was cancelled has been let go of
        engine.cache.check()
        assert engine.cache.stats().hot.blocks_in_use == 0


def answers_of(engine):
    return engine._scheduler._answers


def take(stream, count=None):
    """The next tokens of a stream and their log-probabilities; all that are left, if it isn't said how many."""
    token_ids, logprobs = [], []
    for chunk in stream:
        token_ids += chunk.token_ids
        logprobs += chunk.logprobs or []
        if count is not None and len(token_ids) >= count:
            break
    return token_ids, logprobs


def ask(engine, prompt_seed=1, **options):
    return engine.stream(tokens(50, seed=prompt_seed), **{"max_tokens": NUM_TOKENS, "logprobs": True, **options})


def test_an_answer_that_is_alone_does_without_the_batch(engine):
    take(ask(engine))
    assert answers_of(engine)._generator is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_alone", [1, 17])
def test_what_moves_goes_on_as_if_it_were_alone(engine, options, num_alone):
    first_alone, second_alone = (take(ask(engine, number, **options)) for number in (1, 2))
    first = ask(engine, 1, **options)
    begun = take(first, num_alone)
    second = ask(engine, 2, **options)
    begun_second = take(second, 1)
    assert answers_of(engine)._generator is not None
    rest, rest_second = take(first), take(second)
    assert (begun[0] + rest[0], begun[1] + rest[1]) == first_alone
    assert (begun_second[0] + rest_second[0], begun_second[1] + rest_second[1]) == second_alone


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_moves(family):
    with Engine(family(), tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        alone = take(ask(engine))
        first = ask(engine)
        begun = take(first, 5)
        second = ask(engine, 2)
        take(second, 1)
        rest = take(first)
        list(second)
        assert begun[0] + rest[0] == alone[0]
        # What a window holds is in another order in a batch, and summed in it.
        assert begun[1] + rest[1] == pytest.approx(alone[1], abs=1e-5)
        engine.cache.check()


def on_mlx_thread(engine, test):
    """Run a test where the batches belong, with batches of its own and a way to add prompts to them."""

    def run():
        scheduler = engine._scheduler
        batches = DecodingBatches(scheduler._model, [], [], scheduler._caches, EngineSettings())

        def add(prompt_seed, max_tokens):
            prompt = tokens(50, seed=prompt_seed)
            params = GenerationParams(max_tokens=max_tokens)
            request = Request(prompt, params, lambda _: None, OutputAssembler(None, params))
            request.prompt_cache = scheduler._caches.make()
            scheduler._model(mx.array(prompt[:-1])[None], cache=request.prompt_cache)
            [uid] = batches.add(request)
            return uid

        try:
            test(batches, add)
        finally:
            batches.close()

    engine._scheduler.thread.call(run)


@pytest.mark.parametrize("num_given", range(5))
def test_it_moves_unless_its_next_token_is_its_last(engine, num_given):
    alone = engine.generate(tokens(50, seed=1), max_tokens=5).token_ids

    def test(batches, add):
        first = add(1, 5)
        given = [response.token for _ in range(num_given) for response in batches.step()]
        second = add(2, 5)
        assert (batches._places[first][0] is batches._generator) == (num_given < 4)
        assert batches._places[second][0] is batches._generator
        for _ in range(8):
            given += [response.token for response in batches.step() if response.uid == first]
        assert given == alone
        assert not batches._places

    on_mlx_thread(engine, test)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_the_first_token_is_announced_once_and_before_the_model_reads_it(engine, max_tokens):
    alone = engine.generate(tokens(50, seed=1), max_tokens=max_tokens, logprobs=True)
    announced = []

    def test(batches, add):
        def announce(response):
            token, logprobs = response.token, response.logprobs
            num_read = batches._sequential_batch._sequences[0].prompt_cache[0].offset
            announced.append((response.uid, token, logprobs[token].item(), response.finish_reason, num_read))

        batches._announce = announce
        uid = add(1, max_tokens)
        [first] = batches.step()
        reason = "length" if max_tokens == 1 else None
        assert announced == [(uid, alone.token_ids[0], alone.logprobs[0], reason, 50)]
        assert (first.token, first.finish_reason) == (alone.token_ids[0], reason)
        for _ in range(max_tokens - 1):
            batches.step()
        assert len(announced) == 1

    on_mlx_thread(engine, test)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_first_token_is_passed_on_once(engine, options):
    for chunk in ask(engine, max_tokens=1, **options):
        if chunk.result is None:
            assert len(chunk.token_ids) == 1
        else:
            assert len(chunk.result.token_ids) == len(chunk.result.logprobs) == 1


def test_what_moved_and_is_removed_gives_no_token_any_more(engine):
    def test(batches, add):
        first = add(1, 5)
        batches.step()
        second = add(2, 5)
        batches.remove(first)
        assert {response.uid for _ in range(8) for response in batches.step()} == {second}

    on_mlx_thread(engine, test)


def test_one_that_moved_can_be_cancelled_at_once(engine):
    first = ask(engine, max_tokens=3000)
    take(first, 3)
    second = ask(engine, 2)
    first.close()
    assert take(second) == take(ask(engine, 2))


def test_an_answer_that_comes_after_a_batch_is_alone_again(engine):
    first, second = ask(engine), ask(engine, 2)
    list(first), list(second)
    answers = answers_of(engine)
    third = ask(engine, 3, max_tokens=3000)
    take(third, 2)
    assert answers._lone is not None
    third.close()


def test_its_cache_has_room_for_the_answers_first_tokens(engine):
    """Or the first of them would cost a copy of all keys and values."""
    stream = ask(engine, max_tokens=3000)
    take(stream, 1)
    [prompt_cache] = engine._scheduler.thread.call(
        lambda: [s.prompt_cache for s in answers_of(engine)._sequential_batch._sequences.values()]
    )
    assert prompt_cache[0].keys.shape[2] >= 50 + 256
    stream.close()
