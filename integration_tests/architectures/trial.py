"""One architecture, tried: without a cache, from RAM, and from SSD in a new process; and the answers compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from integration_tests.architectures.measure import describe
from integration_tests.architectures.page import Row
from integration_tests.architectures.situations import (
    BLOCK_SIZE,
    EXACT_REPEAT,
    FIRST,
    SHARED_TOKENS,
    Answer,
    Question,
    ask,
    ask_all,
    ask_twice,
    first_question,
    later_questions,
    open_tiny_engine,
    promised_tokens,
)
from integration_tests.architectures.table import CUT_DEPENDENT, CUT_TOLERANCE, UNKNOWN_CACHE, UNLIKE_ALONE_IN_BATCH
from omlx_core.cache.parts import CHECKPOINT, WINDOW
from omlx_core.state.handlers import find_handler, leaves_of
from omlx_core.state.protocols import CheckpointHandler

ROWS = "rows"


@dataclass(frozen=True)
class Trial:
    """What this process found, and what it left for the new one.

    Attributes:
        name: the architecture.
        caches: what ``describe`` says of its prompt cache.
        parts: of a block, as its layers fill them; none if it runs uncached.
        is_batched: whether answers that are decoded together are in mlx-lm's batch.
        together: the tokens of two answers to the first prompt that were.
        questions: what was asked after the first prompt, by situation.
        cold: the answers without a cache, the first prompt's too.
        from_ram: the answers of one engine that was asked them all.
        while_filling: the answer to the first prompt of the engine that filled ``folder``.
        folder: the SSD tier's.
    """

    name: str
    caches: str
    parts: tuple[str, ...]
    is_batched: bool
    together: list[list[int]]
    questions: dict[str, Question]
    cold: dict[str, Answer]
    from_ram: dict[str, Answer]
    while_filling: Answer
    folder: Path

    def job(self) -> dict[str, Any]:
        """What the new process is to do; see ``restore``."""
        questions = {situation: asdict(question) for situation, question in self.questions.items()}
        return {"folder": str(self.folder), "questions": questions}

    def row(self) -> Row:
        """What the page says of it, once ``compare`` finds nothing wrong."""
        reused = {situation: self.from_ram[situation].reused for situation in self.questions}
        return Row(caches=self.caches, parts=list(self.parts), is_batched=self.is_batched, reused=reused)


def run_trial(name: str, folder: Path) -> Trial:
    """Ask everything that is asked in this process, and fill ``folder`` with the first prompt and its answer."""
    first = first_question()
    prompt_cache: list[Any] = []
    with open_tiny_engine(
        name, no_cache=True, inspect=lambda model: prompt_cache.extend(make_prompt_cache(model))
    ) as engine:
        cold = {FIRST: ask(engine, first)}
        questions = later_questions(cold[FIRST].token_ids)
        cold[EXACT_REPEAT] = cold[FIRST]
        cold.update(ask_all(engine, {key: question for key, question in questions.items() if key not in cold}))
        together = ask_twice(engine, first)
        is_batched = engine._scheduler._answers._generator is not None
    with open_tiny_engine(name, block_size=BLOCK_SIZE) as engine:
        from_ram = ask_all(engine, {FIRST: first, **questions})
        engine.cache.check()
    with open_tiny_engine(name, block_size=BLOCK_SIZE, paged_ssd_cache_dir=folder) as engine:
        while_filling = ask(engine, first)
    return Trial(
        name,
        describe(prompt_cache),
        () if name in CUT_DEPENDENT else _parts(prompt_cache),
        is_batched,
        together,
        questions,
        cold,
        from_ram,
        while_filling,
        folder,
    )


def compare(trial: Trial, restored: Mapping[str, Any]) -> list[str]:
    """What is wrong, a line each.

    Args:
        trial: what this process found.
        restored: what the new one answered; see ``restore``.
    """
    name = trial.name
    if "error" in restored:
        return [f"{name}, new process: {restored['error']}"]
    from_ssd = {situation: Answer(**answer) for situation, answer in restored.items()}
    problems = []
    if bool(trial.parts) == (name in CUT_DEPENDENT.keys() | UNKNOWN_CACHE.keys()):
        problems.append(f"{name}: the table says otherwise, but its blocks have the parts {trial.parts}")
    if trial.is_batched == (name in UNLIKE_ALONE_IN_BATCH):
        problems.append(f"{name}: the table says otherwise, but is_batched={trial.is_batched}")
    if any(token_ids != trial.cold[FIRST].token_ids for token_ids in trial.together):
        problems.append(f"{name}: two answers at once are {trial.together}, alone it is {trial.cold[FIRST].token_ids}")
    tolerance = CUT_TOLERANCE.get(name, 0.0)
    answers = [
        ("RAM", FIRST, trial.from_ram[FIRST]),
        ("while the SSD tier was filled", FIRST, trial.while_filling),
        *(("RAM", situation, trial.from_ram[situation]) for situation in trial.questions),
        *(("new process from SSD", situation, from_ssd[situation]) for situation in trial.questions),
    ]
    for tier, situation, answer in answers:
        found = _differences(answer, trial.cold[situation], tolerance)
        problems += [f"{name}, {situation}, {tier}: {difference}" for difference in found]
    promised = promised_tokens(trial.parts)
    for situation in trial.questions:
        most = SHARED_TOKENS[situation] if trial.parts else 0
        ram, ssd = trial.from_ram[situation], from_ssd[situation]
        for tier, reused in (("RAM", ram.from_ram), ("new process from SSD", ssd.from_ssd)):
            if not promised[situation] <= reused <= most:
                expected = f"{promised[situation]} to {most}"
                problems.append(f"{name}, {situation}, {tier}: {reused} tokens reused, {expected} expected")
        if (ram.reused, ram.from_ssd, ssd.from_ram) != (ssd.reused, 0, 0):
            problems.append(f"{name}, {situation}: reused {ram.reused} in RAM, {ssd.reused} in the new process")
    return problems


def _differences(answer: Answer, cold: Answer, tolerance: float) -> list[str]:
    if answer.token_ids != cold.token_ids:
        return [f"tokens {answer.token_ids} instead of {cold.token_ids}"]
    differences = [abs(a - b) for a, b in zip(answer.logprobs, cold.logprobs, strict=True)]
    # Not those that are greater: NaN is neither.
    excessive = [difference for difference in differences if not difference <= tolerance]
    if not excessive:
        return []
    allowed = f"{tolerance:.0e} is" if tolerance else "none"
    return [f"log-probabilities differ by up to {max(excessive):.1e}, {allowed} allowed"]


def _parts(prompt_cache: list[Any]) -> tuple[str, ...]:
    """The parts of a block that such a cache fills, in the order of their names; none if a class is unknown."""
    parts: set[str] = set()
    for leaf in leaves_of(prompt_cache).values():
        handler = find_handler(leaf)
        if handler is None:
            return ()
        if isinstance(handler, CheckpointHandler):
            parts.add(CHECKPOINT)
        else:
            parts.add(ROWS if handler.window(leaf) is None else WINDOW)
    return tuple(part for part in (ROWS, WINDOW, CHECKPOINT) if part in parts)
