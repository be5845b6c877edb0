"""How long requests take, by what the cache has of them.

`omlx-plugins bench` and the scripts in ``benchmarks/`` measure with what is here, so that their figures mean the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from omlx_core.engine.engine import Engine
from omlx_core.engine.results import GenerationResult

QUESTION_TOKENS = 32
ANSWER_TOKENS = 8
_WARM_UP_TOKENS = 8


class Situation(StrEnum):
    """What the cache has of a prompt when it is asked."""

    COLD = "cold"
    RAM = "RAM-warm"
    BRANCH = "branch"
    NEXT_TURN = "next turn"
    SSD = "SSD-warm"
    SSD_DROPPED = "SSD-warm, page cache dropped"


MEANINGS = {
    Situation.COLD: "nothing of the prompt is cached",
    Situation.RAM: "the same prompt again",
    Situation.BRANCH: "the same context, another question",
    Situation.NEXT_TURN: "the prompt, its answer, and another question",
    Situation.SSD: "the same prompt, to an engine that has just started; its files are in the page cache",
    Situation.SSD_DROPPED: "likewise, and its files have to come from the disk",
}


@dataclass(frozen=True, slots=True)
class Timing:
    """One measured request.

    Attributes:
        situation: what the cache had of it.
        ttft_s: seconds from the call to the first token.
        prompt_tokens: tokens of its prompt.
        reused_tokens: of these, how many came from the cache.
    """

    situation: Situation
    ttft_s: float
    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A long context with questions about it, as random token ids: what they mean makes no difference to the time.

    Attributes:
        context: what all of its prompts begin with.
        question: ends the first prompt.
        other_question: ends a prompt that branches off from it.
        reply: what the next turn adds after the answer.
    """

    context: list[int]
    question: list[int]
    other_question: list[int]
    reply: list[int]

    @classmethod
    def draw(cls, seed: int, num_context_tokens: int, vocab_size: int) -> Conversation:
        """A conversation that shares no beginning with those of other seeds."""
        tokens = draw_tokens(seed, num_context_tokens + 3 * QUESTION_TOKENS, vocab_size)
        context, rest = tokens[:num_context_tokens], tokens[num_context_tokens:]
        question, other, reply = (rest[at : at + QUESTION_TOKENS] for at in range(0, len(rest), QUESTION_TOKENS))
        return cls(context, question, other, reply)

    @property
    def prompt(self) -> list[int]:
        """The first prompt."""
        return self.context + self.question


def draw_tokens(seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Random token ids from the middle of a vocabulary, since special tokens stand at its ends."""
    ids: list[int] = np.random.default_rng(seed).integers(vocab_size // 8, vocab_size // 2, num_tokens).tolist()
    return ids


def warm_up(engine: Engine) -> None:
    """Have the engine do once what only the first request pays for: kernels, buffers, threads."""
    prompt = list(range(_WARM_UP_TOKENS))
    engine.generate(prompt, max_tokens=2, store=False)


def time_in_process(engine: Engine, conversation: Conversation) -> list[Timing]:
    """Ask all that one process can: cold, RAM-warm, the branch, and the next turn.

    Args:
        engine: warmed up; it must not know the conversation.
        conversation: what to ask.
    """
    prompt = conversation.prompt
    first = engine.generate(prompt, max_tokens=ANSWER_TOKENS)
    asked = {
        Situation.RAM: prompt,
        Situation.BRANCH: conversation.context + conversation.other_question,
        Situation.NEXT_TURN: [*prompt, *first.token_ids, *conversation.reply],
    }
    timings = [_timing(Situation.COLD, first)]
    return timings + [_timing(situation, engine.generate(ids, max_tokens=1)) for situation, ids in asked.items()]


def time_from_ssd(engine: Engine, conversation: Conversation, situation: Situation = Situation.SSD) -> Timing:
    """Ask the first prompt of a conversation that another engine has left on SSD.

    Args:
        engine: one that has just started, warmed up.
        conversation: what to ask.
        situation: what to call it.
    """
    return _timing(situation, engine.generate(conversation.prompt, max_tokens=1))


def _timing(situation: Situation, result: GenerationResult) -> Timing:
    return Timing(situation, result.ttft_s, result.usage.prompt_tokens, result.usage.cached_tokens)


def stream_at_once(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
    """Answer prompts at once, each on a thread of its own.

    Returns:
        For each answer, when each of its tokens came, by `time.perf_counter`.
    """

    def arrivals_s(prompt: Sequence[int]) -> list[float]:
        return [time.perf_counter() for chunk in engine.stream(prompt, max_tokens=num_tokens) if chunk.token_ids]

    with ThreadPoolExecutor(len(prompts)) as callers:
        return list(callers.map(arrivals_s, prompts))


def decode_tokens_per_s(arrivals_s: Sequence[Sequence[float]]) -> float | None:
    """The speed of all streams together, while all of them run: no prefill counts.

    Args:
        arrivals_s: for each stream, when each of its tokens came.

    Returns:
        None if the streams were never all running, because one ended before another had begun.
    """
    begin_s = max(stream[0] for stream in arrivals_s)
    end_s = min(stream[-1] for stream in arrivals_s)
    if end_s <= begin_s:
        return None
    return sum(begin_s < at_s <= end_s for stream in arrivals_s for at_s in stream) / (end_s - begin_s)
