"""Where a prompt leaves what the cache knows."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_prompts import BLOCK_SIZE, tokens
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine
from omlx_core.cache.neighbour import Neighbour
from omlx_core.engine.divergence import RecentSequences, find_divergence
from omlx_core.engine.results import Divergence


def remembering(*sequences, **options):
    recent = RecentSequences(**options)
    for sequence in sequences:
        recent.add(sequence)
    return recent


def diverge(recent, prompt, extra_keys=()):
    return find_divergence(prompt, recent.find_neighbour(prompt, extra_keys), lambda: None)


def test_first_differing_tokens_of_the_nearest_sequence_are_shown():
    recent = remembering([1, 2, 3, 4, 5], [1, 2, 9, 9], [7])
    assert diverge(recent, [1, 2, 3, 8, 8, 8]) == Divergence(3, (8, 8, 8), (4, 5))


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1, 2, 3], [1, 2], [8, 2, 3], []])
def test_continuation_beginning_and_stranger_leave_nothing(prompt):
    assert diverge(remembering([1, 2, 3]), prompt) is None


def test_of_two_that_share_as_much_the_newer_counts():
    found = diverge(remembering([1, 2, 3], [1, 2, 4]), [1, 2, 5])
    assert found.cached_ids == (4,)


def test_continued_sequence_replaces_its_beginning():
    recent = remembering([1, 2], [1, 2, 3], [1, 2, 3, 4], max_sequences=1)
    assert diverge(recent, [1, 2, 3, 5]).position == 3


def test_oldest_leave_when_there_are_too_many_or_too_long():
    by_number = remembering([1, 1], [2, 2], [3, 3], max_sequences=2)
    by_tokens = remembering([1, 1], [2, 2], [3, 3], max_tokens=5)
    for recent in (by_number, by_tokens):
        assert diverge(recent, [1, 9]) is None
        assert diverge(recent, [2, 9]).position == 1


def test_other_salts_are_no_neighbours():
    recent = RecentSequences()
    recent.add([1, 2, 3], ("salt:a",))
    assert diverge(recent, [1, 2, 4], ("salt:b",)) is None
    assert diverge(recent, [1, 2, 4], ("salt:a",)).position == 2


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6), st.lists(st.integers(0, 2), max_size=12))
def test_position_is_the_longest_common_beginning(sequences, prompt):
    def shared(sequence):
        return next(
            (i for i, (a, b) in enumerate(zip(sequence, prompt, strict=False)) if a != b),
            min(len(sequence), len(prompt)),
        )

    found = diverge(remembering(*sequences), prompt)
    longest = max(map(shared, sequences), default=0)
    if found is not None:
        assert found.position == longest
    else:
        assert longest == 0 or any(shared(s) == longest and longest in (len(prompt), len(s)) for s in sequences)


def test_long_sequences_that_differ_late_are_compared_to_the_end():
    known = random.Random(0).choices(range(1000), k=10_000)
    prompt = [*known[:9000], 5000, *known[9001:]]
    assert diverge(remembering(known), prompt).position == 9000


@pytest.mark.parametrize(("stored_position", "expected"), [(1, (2, (3,))), (2, (2, (3,))), (3, (3, (9,)))])
def test_stored_sequence_counts_if_it_shares_more(stored_position, expected):
    prompt = [1, 2, 7, 8]
    recent = remembering([1, 2, 3]).find_neighbour(prompt)
    stored = Neighbour(stored_position, np.array([9], np.uint32))
    found = find_divergence(prompt, recent, lambda: stored)
    assert (found.position, found.cached_ids) == expected


@pytest.mark.parametrize("prompt", [[1, 2], [1, 2, 3], [1, 2, 3, 4]])
def test_disk_is_left_alone_where_the_prompt_goes_with_a_remembered_sequence(prompt):
    def find_stored():
        raise AssertionError("asked the disk")

    assert find_divergence(prompt, remembering([1, 2, 3]).find_neighbour(prompt), find_stored) is None


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


@pytest.fixture
def reopened(model, tmp_path):
    """Makes engines over one folder in which a trunk of 100 tokens is stored, and another under a salt."""
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path, paged_ssd_cache_max_size="1GB")
    with Engine(model, cache=settings) as engine:
        engine.generate(tokens(100), max_tokens=1)
        engine.generate([*tokens(10), *range(100, 190)], max_tokens=1, cache_salt="theirs")

    def reopen(**changes):
        return Engine(model, cache=settings.model_copy(update=changes))

    return reopen


@pytest.mark.parametrize("position", [0, 7, 48, 50, 95])
@pytest.mark.parametrize("is_read_only", [False, True])
def test_new_engine_says_where_the_prompt_left_what_is_on_disk(reopened, position, is_read_only):
    trunk = tokens(100)
    changed = [*trunk[:position], *((token_id + 1) % 512 for token_id in trunk[position:])]
    with reopened(ssd_read_only=is_read_only) as engine:
        found = engine.generate(changed, max_tokens=1).divergence
    if position == 0:
        assert found is None
        return
    end = position + min(8, -position % BLOCK_SIZE or BLOCK_SIZE)  # of the disk's sequences the next block is known
    assert (found.position, found.cached_ids) == (position, tuple(trunk[position:end]))
    assert found.prompt_ids == tuple(changed[position : position + 8])


def test_sequence_of_another_salt_is_never_shown(reopened):
    theirs = [*tokens(10), *range(100, 190)]
    with reopened() as engine:
        found = engine.generate([*theirs[:14], 1, 1], max_tokens=1).divergence
        assert found.position == 10  # where it left the trunk, which has no salt
        shown = engine.generate([*theirs[:14], 1, 1], max_tokens=1, cache_salt="theirs").divergence
        assert (shown.position, shown.cached_ids[0]) == (14, theirs[14])
        assert engine.generate([*theirs[:14], 1, 1], max_tokens=1, cache_salt="mine").divergence is None


def test_continuation_of_what_is_on_disk_leaves_nothing(reopened):
    with reopened() as engine:
        assert engine.generate([*tokens(96), 1, 2, 3], max_tokens=1).divergence is None
        assert engine.generate(tokens(40), max_tokens=1).divergence is None


def test_damaged_neighbour_is_not_shown(reopened, tmp_path):
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with reopened() as engine:
        assert engine.generate([*tokens(50), 1, 1], max_tokens=1).divergence is None
