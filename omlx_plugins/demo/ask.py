"""One question through LangChain: the way it is asked here is the way it is asked in the new process.

``python -m omlx_plugins.demo.ask`` reads a `Question` as JSON from standard input and prints its `Answer` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.prompts import ChatPromptTemplate

from omlx_core import CacheSettings
from omlx_core.errors import EngineError
from omlx_plugins.langchain import ChatOMLX

INSTRUCTION = "Answer in one short sentence, from these documents only.\n\n{context}"
MAX_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask whom: a model, its cache settings, the context and the question."""

    model: str
    cache_options: Mapping[str, Any]
    context: str
    question: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what it cost."""

    text: str
    prompt_tokens: int
    cached_tokens_hot: int
    cached_tokens_cold: int
    ttft_s: float

    @classmethod
    def from_metadata(cls, text: str, prompt_tokens: int, metadata: Mapping[str, Any]) -> Answer:
        """Of what an adapter says of an answer, that which is shown."""
        cost = {name: metadata[name] for name in ("cached_tokens_hot", "cached_tokens_cold", "ttft_s")}
        return cls(text, prompt_tokens, **cost)


def ask(question: Question, on_text: Callable[[str], None]) -> Answer:
    """Ask through a LangChain chain, passing on the text as it comes."""
    llm = ChatOMLX(
        model=question.model,
        kv_cache=CacheSettings(**question.cache_options),
        max_tokens=MAX_TOKENS,
    )
    chain = ChatPromptTemplate([("system", INSTRUCTION), ("user", "{question}")]) | llm
    text = ""
    for chunk in chain.stream({"context": question.context, "question": question.question}):
        on_text(chunk.text)
        text += chunk.text
    # The last chunk carries what the answer has cost.
    if not isinstance(chunk, AIMessageChunk) or chunk.usage_metadata is None:
        raise EngineError("LangChain's stream ended without usage")
    return Answer.from_metadata(text, chunk.usage_metadata["input_tokens"], chunk.response_metadata["omlx"])


def main() -> None:
    """Answer the question on standard input."""
    answer = ask(Question(**json.load(sys.stdin)), on_text=lambda _: None)
    print(json.dumps(dataclasses.asdict(answer)))


if __name__ == "__main__":
    main()
