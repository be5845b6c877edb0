"""A new process that asks what another one has left on SSD.

``python -m omlx_plugins.bench.child`` reads a `Job` from standard input and prints a line for each `Timing`, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from omlx_core import CacheSettings, Engine
from omlx_core.request_timing import Conversation, time_from_ssd, warm_up
from omlx_plugins.plugins import register_state_handlers


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask.

    Attributes:
        model: a folder or a repository id.
        cache_options: keyword arguments of `CacheSettings`, among them the folder.
        vocab_size: of the model.
        conversations: the seed and the number of context tokens of each conversation.
    """

    model: str
    cache_options: dict[str, Any]
    vocab_size: int
    conversations: list[tuple[int, int]]


def main() -> None:
    """Do the job on standard input."""
    job = Job(**json.load(sys.stdin))
    register_state_handlers()
    with Engine.from_pretrained(job.model, cache=CacheSettings(**job.cache_options)) as engine:
        warm_up(engine)
        for seed, num_tokens in job.conversations:
            timing = time_from_ssd(engine, Conversation.draw(seed, num_tokens, job.vocab_size))
            print(json.dumps(dataclasses.asdict(timing)), flush=True)


if __name__ == "__main__":
    main()
