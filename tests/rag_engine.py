"""A tiny engine that is asked about documents, and the documents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, EngineSettings

BLOCK_SIZE = 16
SEPARATOR = "\n\n"
_WORDS = ("alpha", "beta", "gamma", "delta", "épsilon", "ζ")


def document(number: int, num_words: int = 8) -> str:
    words = random.Random(number).choices(_WORDS, k=num_words)
    return f"Document {number}: {' '.join(words)}"


def make_engine(model: Any = None, settings: EngineSettings | None = None, **cache: Any) -> Engine:
    options = {"block_size": BLOCK_SIZE, **cache}
    return Engine(
        tiny_llama() if model is None else model, tiny_tokenizer(), cache=CacheSettings(**options), settings=settings
    )


def chat(context: str, question: str = "") -> list[dict[str, str]]:
    return [{"role": "system", "content": f"Answer:\n\n{context}"}, {"role": "user", "content": question}]


def ask(engine: Engine, texts: Sequence[str], question: str = "Which?", **options: Any) -> Any:
    """A request about documents in this order."""
    return engine.generate(chat(SEPARATOR.join(texts), question), **{"max_tokens": 1, **options})
