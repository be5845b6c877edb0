"""Where a prompt leaves what the cache knows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine
from omlx_core.engine.divergence import RecentSequences
from omlx_core.engine.results import Divergence


def remembering(*sequences, **options):
    recent = RecentSequences(**options)
    for sequence in sequences:
        recent.add(sequence)
    return recent


def test_first_differing_tokens_of_the_nearest_sequence_are_shown():
    recent = remembering([1, 2, 3, 4, 5], [1, 2, 9, 9], [7])
    assert recent.find_divergence([1, 2, 3, 8, 8, 8]) == Divergence(3, (8, 8, 8), (4, 5))


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1, 2, 3], [1, 2], [8, 2, 3], []])
def test_continuation_beginning_and_stranger_leave_nothing(prompt):
    assert remembering([1, 2, 3]).find_divergence(prompt) is None


def test_of_two_that_share_as_much_the_newer_counts():
    found = remembering([1, 2, 3], [1, 2, 4]).find_divergence([1, 2, 5])
    assert found.cached_ids == (4,)


def test_continued_sequence_replaces_its_beginning():
    recent = remembering([1, 2], [1, 2, 3], [1, 2, 3, 4], max_sequences=1)
    assert recent.find_divergence([1, 2, 3, 5]).position == 3


def test_oldest_leave_when_there_are_too_many_or_too_long():
    by_number = remembering([1, 1], [2, 2], [3, 3], max_sequences=2)
    by_tokens = remembering([1, 1], [2, 2], [3, 3], max_tokens=5)
    for recent in (by_number, by_tokens):
        assert recent.find_divergence([1, 9]) is None
        assert recent.find_divergence([2, 9]).position == 1


def test_other_salts_are_no_neighbours():
    recent = RecentSequences()
    recent.add([1, 2, 3], ("salt:a",))
    assert recent.find_divergence([1, 2, 4], ("salt:b",)) is None
    assert recent.find_divergence([1, 2, 4], ("salt:a",)).position == 2


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6), st.lists(st.integers(0, 2), max_size=12))
def test_position_is_the_longest_common_beginning(sequences, prompt):
    def shared(sequence):
        return next(
            (i for i, (a, b) in enumerate(zip(sequence, prompt, strict=False)) if a != b),
            min(len(sequence), len(prompt)),
        )

    found = remembering(*sequences).find_divergence(prompt)
    longest = max(map(shared, sequences), default=0)
    if found is not None:
        assert found.position == longest
    else:
        assert longest == 0 or any(shared(s) == longest and longest in (len(prompt), len(s)) for s in sequences)


def test_long_sequences_that_differ_late_are_compared_to_the_end():
    known = random.Random(0).choices(range(1000), k=10_000)
    prompt = [*known[:9000], 5000, *known[9001:]]
    assert remembering(known).find_divergence(prompt).position == 9000


def test_result_says_where_the_prompt_left_the_last_one(model):
    with Engine(model, tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        trunk = tokens(100)
        first = engine.generate(trunk, max_tokens=5)
        assert first.divergence is None
        assert engine.generate(trunk + first.token_ids + [1], max_tokens=1).divergence is None
        changed = [*trunk[:50], (trunk[50] + 1) % 512, *trunk[51:]]
        result = engine.generate(changed, max_tokens=1)
        assert (result.divergence.position, result.usage.cached_tokens) == (50, 48)
        assert result.divergence.prompt_ids == tuple(changed[50:58])
        assert result.divergence.cached_ids == tuple(trunk[50:58])
        assert result.divergence.prompt_text is None
        shown = engine.generate([*trunk[:70], *changed[:9]], max_tokens=1, divergence_text=True).divergence
        assert shown.prompt_text == engine.tokenizer.decode(changed[:8])


def test_request_that_is_not_stored_is_not_compared_with(model):
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate(tokens(50), max_tokens=1, store=False)
        assert engine.generate([*tokens(20), 1, 1], max_tokens=1).divergence is None
