"""What each architecture is asked: a first prompt, and then prompts that begin like it in one way or another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from integration_tests.architectures.build import build_tiny
from integration_tests.architectures.shared import VOCAB_SIZE
from omlx_core import CacheSettings, Engine
from omlx_core.cache.parts import CHECKPOINT
from omlx_core.model.loading import LoadedModel

BLOCK_SIZE = 16
TRUNK_TOKENS = 150
FIRST_ANSWER_TOKENS = 16  # fills the block in which it begins
ANSWER_TOKENS = 8

FIRST = "first prompt"
EXACT_REPEAT = "exact repeat"
NEXT_TURN = "next turn"
BRANCH_IN_BLOCK = "branch in a block"
BRANCH_AT_BOUNDARY = "branch at a boundary"
SECOND_BRANCH = "second branch there"

# The tokens that each has in common with the first prompt and its answer, in the order in which they are asked.
SHARED_TOKENS = {
    EXACT_REPEAT: TRUNK_TOKENS,
    NEXT_TURN: TRUNK_TOKENS + FIRST_ANSWER_TOKENS,
    BRANCH_IN_BLOCK: 100,
    BRANCH_AT_BOUNDARY: 64,
    SECOND_BRANCH: 64,
}

# And those that follow.
TAIL_TOKENS = {NEXT_TURN: 20, BRANCH_IN_BLOCK: 30, BRANCH_AT_BOUNDARY: 30, SECOND_BRANCH: 30}


@dataclass(frozen=True)
class Question:
    """A prompt, and how many tokens to answer."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What an engine gave: tokens, their log-probabilities, and the prompt tokens that came from RAM and from SSD."""

    token_ids: list[int]
    logprobs: list[float]
    from_ram: int
    from_ssd: int

    @property
    def reused(self) -> int:
        """Prompt tokens that were not computed."""
        return self.from_ram + self.from_ssd


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids, the same ones in every process."""
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def first_question() -> Question:
    """The prompt that fills the cache."""
    return Question(tokens(TRUNK_TOKENS, seed=1), FIRST_ANSWER_TOKENS)


def later_questions(answer: Sequence[int]) -> dict[str, Question]:
    """What is asked once the first prompt got ``answer``, by situation, in order."""
    first = first_question()
    conversation = [*first.prompt, *answer]
    later = {
        situation: Question(conversation[: SHARED_TOKENS[situation]] + tokens(count, seed=seed), ANSWER_TOKENS)
        for seed, (situation, count) in enumerate(TAIL_TOKENS.items(), start=2)
    }
    return {EXACT_REPEAT: first, **later}


def promised_tokens(parts: Iterable[str]) -> dict[str, int]:
    """How many prompt tokens each situation must reuse at the least.

    Args:
        parts: of a block, as the model fills them; none if it runs uncached.
    """
    if not parts:
        return dict.fromkeys(SHARED_TOKENS, 0)
    promised = {situation: shared // BLOCK_SIZE * BLOCK_SIZE for situation, shared in SHARED_TOKENS.items()}
    # Of a prompt's last tokens one at least is computed; an answer's blocks are reused where that changes no bit.
    promised[EXACT_REPEAT] = promised[NEXT_TURN] = (TRUNK_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
    if CHECKPOINT in parts:
        # A recurrent state is restored only where it was kept, and the first prompt to branch off keeps it there.
        promised[BRANCH_IN_BLOCK] = promised[BRANCH_AT_BOUNDARY] = 0
    return promised


def open_tiny_engine(name: str, *, inspect: Callable[[Any], None] | None = None, **cache: Any) -> Engine:
    """An engine with the tiny model of an architecture.

    Args:
        name: the architecture.
        inspect: called with the model, on the engine's thread.
        **cache: settings of the cache.
    """

    def load() -> LoadedModel:
        # On the engine's own thread, as a model from files is: some keep arrays that can't leave it.
        model = build_tiny(name)
        if inspect is not None:
            inspect(model)
        return LoadedModel(model, None, name, {}, None)

    engine = Engine.__new__(Engine)
    engine._start(name, load, CacheSettings(**cache), None, owns_model=True)
    return engine


def ask(engine: Engine, question: Question) -> Answer:
    """Ask, and wait for the answer."""
    result = engine.generate(question.prompt, max_tokens=question.max_tokens, logprobs=True)
    usage = result.usage
    return Answer(result.token_ids, result.logprobs or [], usage.cached_tokens_hot, usage.cached_tokens_cold)


def ask_twice(engine: Engine, question: Question) -> list[list[int]]:
    """The tokens of two answers that are decoded together."""
    results = engine.sample(question.prompt, 2, max_tokens=question.max_tokens)
    return [result.token_ids for result in results]


def ask_all(engine: Engine, questions: Mapping[str, Question]) -> dict[str, Answer]:
    """Ask one after the other."""
    return {situation: ask(engine, question) for situation, question in questions.items()}
