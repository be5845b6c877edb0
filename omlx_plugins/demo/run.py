"""Asks, measures, compares, and prints the table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.llms import ChatMessage
from tqdm import tqdm

from omlx_core import CacheSettings
from omlx_core.engine.shared import close_shared_engines
from omlx_core.errors import EngineError, InvalidParameterError
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.demo.ask import INSTRUCTION, MAX_TOKENS, Answer, Question, ask
from omlx_plugins.demo.corpus import Bm25Index, LangChainBm25Retriever, LlamaIndexBm25Retriever, load_sections
from omlx_plugins.llama_index import OMLX

TOPIC = "How are keys and values cached in blocks, in RAM and on SSD, and how does a request reuse them?"
LANGCHAIN_QUESTIONS = (
    "What is a block's name made of?",
    "Which block does the hot tier evict first?",
    "What happens to the cold tier when the process restarts?",
)
LLAMA_INDEX_QUESTION = "Which two tiers does the cache have?"

_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: who asked what, and the answers with and without a cache."""

    asked_by: str
    question: str
    answer: Answer
    uncached: Answer

    @property
    def is_equal(self) -> bool:
        """Whether the cache changed nothing but the time."""
        return self.answer.text == self.uncached.text


def run(*, model: str | None, num_sections: int, cache_options: Mapping[str, Any]) -> int:
    """Run the demonstration.

    Args:
        model: a folder or a repository id; None is the sample model.
        num_sections: how many sections of the documentation are the context.
        cache_options: keyword arguments of `CacheSettings`. Without a folder for the SSD tier a temporary one is
            used, so that the demonstration starts cold.

    Returns:
        The exit status: 0 if every answer equals the one of an engine without a cache, else 1.

    Raises:
        InvalidParameterError: no section makes no context.
    """
    if num_sections < 1:
        raise InvalidParameterError(f"--sections {num_sections}: give at least 1")
    _say("Model")
    model = model or str(ensure_sample_model())
    print(f"  {Path(model).name}")
    with tempfile.TemporaryDirectory(prefix="omlx-demo-") as folder:
        options = {name: str(value) for name, value in {"paged_ssd_cache_dir": folder, **cache_options}.items()}
        try:
            rows = _ask_everywhere(model, num_sections, options)
        finally:
            close_shared_engines()
    _print_table(rows)
    return 0 if all(row.is_equal for row in rows) else 1


def _ask_everywhere(model: str, num_sections: int, options: Mapping[str, str]) -> list[Row]:
    _say(f"Retrieval: {TOPIC}")
    index = Bm25Index(load_sections())
    documents = LangChainBm25Retriever(index=index, count=num_sections).invoke(TOPIC)
    nodes = LlamaIndexBm25Retriever(index, num_sections).retrieve(TOPIC)
    context = "\n\n".join(document.page_content for document in documents)
    print(f"  {len(documents)} of {len(index.sections)} sections, {len(context):,} characters: the shared context")

    answers: list[tuple[str, str, Answer]] = []
    for number, text in enumerate(LANGCHAIN_QUESTIONS, start=1):
        _say(f"LangChain: {text}")
        answers.append((f"LangChain, question {number}", text, _ask_aloud(Question(model, options, context, text))))

    _say(f"LlamaIndex, same process, same context: {LLAMA_INDEX_QUESTION}")
    same_context = "\n\n".join(node.get_content() for node in nodes)
    question = Question(model, options, same_context, LLAMA_INDEX_QUESTION)
    answers.append(("LlamaIndex, same process", question.question, _ask_llama_index(question)))

    close_shared_engines()  # the RAM tier is gone; what is reused from here on comes from SSD
    _say(f"LangChain, new process: {LANGCHAIN_QUESTIONS[0]}")
    question = Question(model, options, context, LANGCHAIN_QUESTIONS[0])
    answers.append(("LangChain, new process", question.question, _ask_new_process(question)))

    _say("The same questions to an engine without a cache")
    uncached = {}
    for text in dict.fromkeys(text for _, text, _ in answers):
        print(f"  {text}")
        uncached[text] = _ask_aloud(Question(model, {"no_cache": "true"}, context, text))
    return [Row(asked_by, text, answer, uncached[text]) for asked_by, text, answer in answers]


def _ask_aloud(question: Question) -> Answer:
    with _answering() as on_text:
        return ask(question, on_text)


def _ask_llama_index(question: Question) -> Answer:
    llm = OMLX(model=question.model, kv_cache=CacheSettings(**question.cache_options), max_tokens=MAX_TOKENS)
    messages = [
        ChatMessage(role="system", content=INSTRUCTION.format(context=question.context)),
        ChatMessage(role="user", content=question.question),
    ]
    response = None
    with _answering() as on_text:
        for response in llm.stream_chat(messages):
            on_text(response.delta or "")
    if response is None or not isinstance(response.raw, dict):
        raise EngineError("LlamaIndex's stream ended without a response")
    usage = response.raw["usage"]
    return Answer.from_metadata(response.message.content or "", usage["prompt_tokens"], response.raw["omlx"])


def _ask_new_process(question: Question) -> Answer:
    with _answering() as on_text:
        done = subprocess.run(
            [sys.executable, "-m", "omlx_plugins.demo.ask"],
            input=json.dumps(dataclasses.asdict(question)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        answer = Answer(**json.loads(done.stdout))
        on_text(answer.text)
        return answer


@contextlib.contextmanager
def _answering() -> Iterator[Any]:
    """Show a running clock until the first text comes, then the text."""
    clock = tqdm(bar_format="  … {elapsed}", leave=False, disable=None)
    has_text = threading.Event()

    def tick() -> None:
        while not has_text.wait(_TICK_S):
            clock.refresh()

    def on_text(text: str) -> None:
        if not has_text.is_set():
            has_text.set()
            ticker.join()
            clock.close()
            print("  ", end="")
        print(text.replace("\n", " "), end="", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield on_text
    finally:
        has_text.set()
        ticker.join()
        clock.close()
        print(flush=True)


def _say(text: str) -> None:
    print(f"\n» {text}", flush=True)


def _print_table(rows: Sequence[Row]) -> None:
    header = (
        "asked by",
        "prompt tokens",
        "reused from RAM",
        "reused from SSD",
        "first token",
        "without cache",
        "equal",
    )
    table = [
        (
            row.asked_by,
            f"{row.answer.prompt_tokens:,}",
            f"{row.answer.cached_tokens_hot:,}",
            f"{row.answer.cached_tokens_cold:,}",
            f"{row.answer.ttft_s:.2f} s",
            f"{row.uncached.ttft_s:.2f} s",
            "yes" if row.is_equal else "NO",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (header, *table)) for column in range(len(header))]
    _say("Result")
    for line in (header, tuple("-" * width for width in widths), *table):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  " + "  ".join(cells))
    different = [row for row in rows if not row.is_equal]
    for row in different:
        print(f"\n  {row.asked_by} differs:\n    with cache: {row.answer.text}\n    without:    {row.uncached.text}")
    if not different:
        print("\n  Every answer equals the one without a cache.")
