"""An engine with a tiny model that answers a few prompts, and may kill itself at a step of I/O.

    python engine_child.py '{"directory": …, "kill_at": 17}'

Prints one JSON line for each answer that was flushed, and at the end ``{"num_steps": …}``. No directory, no cache.
"""

from __future__ import annotations

import json
import sys

from io_steps import IOSteps
from tiny_models import tiny_llama

from omlx_core import CacheSettings, Engine

BLOCK_SIZE = 16
SHARED = [(31 * i) % 500 for i in range(4 * BLOCK_SIZE)]
PROMPTS = (
    SHARED[:40],
    [*SHARED, 1, 2, 3],
    [*SHARED[:32], *range(100, 130)],
    [*range(200, 260), 7],
    [*SHARED, 1, 2, 3, *range(300, 330)],
)
# Room for about two thirds of the blocks.
MAX_SIZE_BYTES = 70_000


def main() -> None:
    request = json.loads(sys.argv[1])
    model = tiny_llama()
    steps = IOSteps(request.get("kill_at", 0))
    steps.install()
    directory = request["directory"]
    settings = (
        CacheSettings(
            block_size=BLOCK_SIZE,
            paged_ssd_cache_dir=directory,
            paged_ssd_cache_max_size=MAX_SIZE_BYTES,
            ssd_min_free=0,
        )
        if directory
        else CacheSettings(no_cache=True)
    )
    with Engine(model, name="tiny", cache=settings) as engine:
        for prompt in PROMPTS:
            result = engine.generate(prompt, max_tokens=6, logprobs=True)
            engine.cache.flush(60)
            answer = {
                "token_ids": result.token_ids,
                "logprobs": result.logprobs,
                "cached_tokens_cold": result.usage.cached_tokens_cold,
            }
            print(json.dumps(answer), flush=True)
        stats = engine.cache.stats().cold
    print(json.dumps({"num_steps": len(steps.trace), "evictions": stats.evictions if stats else 0}), flush=True)


if __name__ == "__main__":
    main()
