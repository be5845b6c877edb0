"""The new process: restores prefixes that another one has left on SSD.

python -m integration_tests.architectures.restore < jobs.json

``jobs.json`` maps architectures to ``{"folder": …, "questions": {situation: {"prompt": […], "max_tokens": …}}}``; on
standard output comes ``{architecture: {situation: answer}}``, or in place of the answers ``{"error": traceback}``.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from typing import Any

from integration_tests.architectures.situations import BLOCK_SIZE, Question, ask, open_tiny_engine


def main() -> None:
    json.dump({name: _restore_or_explain(name, job) for name, job in json.load(sys.stdin).items()}, sys.stdout)


def _restore_or_explain(name: str, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {
            situation: _restore(name, job["folder"], Question(**question))
            for situation, question in job["questions"].items()
        }
    except Exception:  # the others of the batch are tried all the same
        return {"error": traceback.format_exc()}


def _restore(name: str, folder: str, question: Question) -> dict[str, Any]:
    """The answer of an engine of its own, which has nothing in RAM."""
    with open_tiny_engine(name, block_size=BLOCK_SIZE, paged_ssd_cache_dir=folder) as engine:
        answer = ask(engine, question)
        engine.cache.check()
    return asdict(answer)


if __name__ == "__main__":
    main()
