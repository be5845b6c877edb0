"""An engine that answers prompts of a small pool for as long as its standard input is open, and counts what it reuses.

    python soak_child.py DIRECTORY SEED

Every answer is compared with that of an engine without a cache. Prints, at the end and about every second, one JSON
line: how many answers, blocks reused, and blocks among those that another process must have written.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time

from tiny_models import tiny_llama

from omlx_core import CacheSettings, Engine

BLOCK_SIZE = 16
MAX_SIZE_BYTES = 400_000  # about two fifths of all blocks of the pool
NUM_TREES, NUM_BRANCHES, BLOCKS_EACH = 4, 8, 3


def make_prompts() -> list[list[int]]:
    """Trees of prompts: trunks of some blocks that several prompts share, and branches of their own."""
    prompts = []
    for tree in range(NUM_TREES):
        trunk = random.Random(tree).choices(range(512), k=BLOCKS_EACH * BLOCK_SIZE)
        for branch in range(NUM_BRANCHES):
            own = random.Random(1000 + tree * NUM_BRANCHES + branch).choices(range(512), k=BLOCKS_EACH * BLOCK_SIZE + 1)
            prompts.append([*trunk, *own])
    return prompts


def main() -> None:
    directory, seed = sys.argv[1], int(sys.argv[2])
    generator = random.Random(seed)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    model, prompts = tiny_llama(), make_prompts()
    with Engine(model, name="tiny", cache=CacheSettings(no_cache=True)) as engine:
        expected = [engine.generate(prompt, max_tokens=2).token_ids for prompt in prompts]
    settings = CacheSettings(
        block_size=BLOCK_SIZE,
        hot_cache_max_size=1,
        paged_ssd_cache_dir=directory,
        paged_ssd_cache_max_size=MAX_SIZE_BYTES,
        ssd_min_free=0,
    )
    counts = {"answers": 0, "reused": 0, "reused_of_others": 0}
    computed: set[tuple[int, ...]] = set()  # the ends of prefixes that this process has had
    reported_s = time.monotonic()
    with Engine(model, name="tiny", cache=settings) as engine:
        while not ended.is_set():
            number = generator.randrange(len(prompts))
            prompt = prompts[number]
            result = engine.generate(prompt, max_tokens=2)
            if result.token_ids != expected[number]:
                raise RuntimeError(f"prompt {number}: {result.token_ids} instead of {expected[number]}")
            num_cached = result.usage.cached_tokens // BLOCK_SIZE
            prefixes = [tuple(prompt[: count * BLOCK_SIZE]) for count in range(1, len(prompt) // BLOCK_SIZE + 1)]
            counts["answers"] += 1
            counts["reused"] += num_cached
            counts["reused_of_others"] += sum(prefix not in computed for prefix in prefixes[:num_cached])
            computed.update(prefixes)
            if time.monotonic() - reported_s > 1.0:
                reported_s = time.monotonic()
                print(json.dumps(counts), flush=True)
        stats = engine.cache.stats().cold
    counts |= {"evictions": stats.evictions, "corrupt": stats.corrupt_blocks, "write_errors": stats.write_errors}
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
