"""Prompts that are computed without an answer, and prefixes that stay in RAM whatever else passes through it."""

import pytest
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, Usage
from omlx_core.errors import EngineClosedError, InvalidParameterError, InvalidPromptError

SYSTEM = {"role": "system", "content": "A long handbook that many questions are about. " * 4}


def user(text):
    return {"role": "user", "content": text}


def size_of_block(model):
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.prefill(tokens(BLOCK_SIZE + 1))
        return engine.cache.stats().hot.hot_bytes


def open_engine(model, *, hot_blocks=None, tokenizer=None, **settings):
    size = None if hot_blocks is None else hot_blocks * size_of_block(model)
    settings = CacheSettings(block_size=BLOCK_SIZE, hot_cache_max_size=size, **settings)
    return Engine(model, tokenizer, cache=settings)


# Prefill


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_lfm2])
def test_prefilled_prompt_is_found_by_what_begins_like_it_and_changes_no_answer(make):
    model = make()
    prefix, rest = tokens(5 * BLOCK_SIZE + 3), tokens(9, seed=1)
    with open_engine(model) as engine:
        assert engine.prefill(prefix) == Usage(prompt_tokens=len(prefix))
        warm = engine.generate([*prefix, *rest], max_tokens=8, logprobs=True)
        assert engine.cache.stats().hot.blocks_in_use == 0
        engine.cache.check()
    with open_engine(model, no_cache=True) as engine:
        cold = engine.generate([*prefix, *rest], max_tokens=8, logprobs=True)
    assert warm.usage.cached_tokens == 5 * BLOCK_SIZE
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_second_prefill_computes_nothing_anew(model):
    with open_engine(model) as engine:
        engine.prefill(tokens(100))
        assert engine.prefill(tokens(100)).cached_tokens == 99 // BLOCK_SIZE * BLOCK_SIZE
        assert engine.num_active_requests == 0


async def test_prefill_on_an_event_loop_does_the_same(model):
    with open_engine(model) as engine:
        assert (await engine.aprefill(tokens(100))).cached_tokens == 0
        assert (await engine.aprefill(tokens(100))).cached_tokens == 96


def test_prefill_reports_its_progress_and_keeps_to_the_salt(model):
    seen = []
    with open_engine(model) as engine:
        engine.prefill(tokens(100), on_prefill=lambda *of: seen.append(of), cache_salt="a")
        assert seen[-1] == (99, 99)
        assert engine.generate(tokens(100), max_tokens=1).usage.cached_tokens == 0
        assert engine.generate(tokens(100), max_tokens=1, cache_salt="a").usage.cached_tokens == 96


def test_system_messages_can_be_prefilled_by_themselves():
    template = (
        "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user') }}{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    with open_engine(tiny_llama(), tokenizer=tiny_tokenizer(512, chat_template=template)) as engine:
        engine.prefill([SYSTEM])
        usage = engine.generate([SYSTEM, user("Hi")], max_tokens=1).usage
        assert usage.cached_tokens >= len(SYSTEM["content"]) // BLOCK_SIZE * BLOCK_SIZE


def test_prefill_of_a_closed_engine_and_of_a_bad_prompt_are_errors(model):
    with open_engine(model) as engine, pytest.raises(InvalidPromptError, match="empty"):
        engine.prefill([])
    with pytest.raises(EngineClosedError):
        engine.prefill([1, 2])


def test_tools_count(model):
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    with open_engine(model, tokenizer=tiny_tokenizer(512)) as engine:
        chat = [user("Hi")]
        counted = engine.count_tokens(chat, tools=[tool])
        assert counted == engine.generate(chat, tools=[tool], max_tokens=1).usage.prompt_tokens
        assert counted > engine.count_tokens(chat)


# Pins


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_lfm2])
@pytest.mark.parametrize("pin", [True, False])
def test_pinned_prefix_outlives_traffic_that_evicts_everything_else(make, pin):
    prefix = tokens(4 * BLOCK_SIZE + 1)
    with open_engine(make(), hot_blocks=20) as engine:
        engine.prefill(prefix, pin=pin)
        for seed in range(1, 6):
            engine.prefill(tokens(9 * BLOCK_SIZE, seed=seed))
        usage = engine.generate([*prefix, 1, 2], max_tokens=1).usage
        assert usage.cached_tokens_hot == (4 * BLOCK_SIZE if pin else 0)
        assert [pinned.num_tokens for pinned in engine.pins()] == ([4 * BLOCK_SIZE] if pin else [])
        engine.cache.check()


def test_unpinned_prefix_can_be_evicted_again(model):
    prefix = tokens(4 * BLOCK_SIZE + 1)
    with open_engine(model, hot_blocks=12) as engine:
        engine.prefill(prefix, pin=True)
        assert engine.unpin(tokens(40, seed=9)) == 0
        assert engine.unpin(prefix, cache_salt="other") == 0
        assert engine.unpin([*prefix, 5]) == 1
        assert engine.pins() == []
        assert engine.cache.stats().hot.blocks_in_use == 0
        for seed in range(1, 4):
            engine.prefill(tokens(9 * BLOCK_SIZE, seed=seed))
        assert engine.generate(prefix, max_tokens=1).usage.cached_tokens == 0


def test_only_the_messages_that_are_named_are_pinned(model):
    with open_engine(model, tokenizer=tiny_tokenizer(512)) as engine:
        chat = [SYSTEM, user("Here is the text. And here is a question that is different each time, and long.")]
        engine.generate(chat, max_tokens=1, pin=[SYSTEM])
        whole = engine.count_tokens(chat)
        [pinned] = engine.pins()
        assert len(SYSTEM["content"]) // BLOCK_SIZE * BLOCK_SIZE <= pinned.num_tokens < whole - 4 * BLOCK_SIZE
        engine.unpin()
        engine.generate(chat, max_tokens=1, pin=[SYSTEM, user("Here is the text.")])
        longer = [SYSTEM, user("Here is the text. Another one?")]
        assert engine.unpin(longer) == 1


def test_pin_that_an_earlier_one_is_the_beginning_of_replaces_it(model):
    prompt = tokens(6 * BLOCK_SIZE + 1)
    with open_engine(model) as engine:
        engine.prefill(prompt[: 2 * BLOCK_SIZE + 1], pin=True)
        engine.prefill(prompt, pin=True)
        engine.prefill(prompt[: 3 * BLOCK_SIZE + 1], pin=True)
        assert [pinned.num_tokens for pinned in engine.pins()] == [6 * BLOCK_SIZE]


def test_pins_keep_to_their_share_and_the_least_recently_used_makes_room(model):
    with open_engine(model, hot_blocks=16, pin_share=0.5) as engine:
        first, second, third = (tokens(4 * BLOCK_SIZE + 1, seed=seed) for seed in range(3))
        for prompt in (first, second, first, third):
            engine.prefill(prompt, pin=True)
        assert [engine.unpin(prompt) for prompt in (first, second, third)] == [1, 0, 1]
        engine.prefill(tokens(12 * BLOCK_SIZE + 1, seed=4), pin=True)  # more than the share: its trunk is pinned
        [pinned] = engine.pins()
        assert pinned.num_tokens == 8 * BLOCK_SIZE
        engine.cache.check()


def test_what_pins_share_counts_once(model):
    trunk = tokens(3 * BLOCK_SIZE)
    with open_engine(model, hot_blocks=16, pin_share=0.5) as engine:
        for seed in range(1, 6):
            engine.prefill([*trunk, *tokens(BLOCK_SIZE + 1, seed=seed)], pin=True)
        assert len(engine.pins()) == 5


def test_pin_is_kept_though_the_request_is_cancelled_and_goes_with_the_engine(model):
    with open_engine(model) as engine:
        stream = engine.stream(tokens(100), max_tokens=500, pin=True)
        next(stream)
        stream.close()
        assert len(engine.pins()) == 1
    assert engine.pins() == []


def test_a_model_without_a_cache_pins_nothing_and_says_so_once(model, caplog):
    with open_engine(model, no_cache=True) as engine:
        engine.generate(tokens(100), max_tokens=1)
        assert not caplog.messages
        for _ in range(2):
            engine.prefill(tokens(100), pin=True)
        assert engine.pins() == []
    [message] = caplog.messages
    assert "runs without a prefix cache: nothing is kept" in message


@pytest.mark.parametrize("pin", ["all", 3, [1], None])
def test_other_values_are_refused(model, pin):
    with open_engine(model) as engine, pytest.raises(InvalidParameterError, match="pin="):
        engine.generate([1, 2], pin=pin)


def test_prefix_found_on_ssd_is_pinned_at_once(model, tmp_path):
    with open_engine(model, paged_ssd_cache_dir=tmp_path) as engine:
        engine.prefill(tokens(6 * BLOCK_SIZE + 1))
    with open_engine(model, paged_ssd_cache_dir=tmp_path) as engine:
        assert engine.prefill(tokens(6 * BLOCK_SIZE + 1), pin=True).cached_tokens_cold == 6 * BLOCK_SIZE
        assert [pin.num_tokens for pin in engine.pins()] == [6 * BLOCK_SIZE]
