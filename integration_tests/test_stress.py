"""Threads and tasks ask three engines for thousands of things at once; every answer is the one given alone.

`STRESS_REQUESTS` says how many; `make stress` asks for 2,000.
"""

import os

# Before anything imports MLX: on the reference BLAS equal work gives equal bits.
os.environ["OMLX_OPENBLAS"] = "0"

import asyncio
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest

from integration_tests.architectures import build_tiny
from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import InvalidRequestError, RequestTimeoutError

NUM_REQUESTS = int(os.environ.get("STRESS_REQUESTS", "400"))
NUM_THREADS = NUM_TASKS = 64
MODELS = ("qwen3", "gemma3_text", "qwen3_next")  # full attention, windows, recurrent layers beside full attention
BLOCK_SIZE = 16


def tokens(count, seed):
    return random.Random(seed).choices(range(512), k=count)


def make_specs(count):
    """Prompts that share prefixes of all lengths, and how they are to be answered."""
    rng = random.Random(0)
    specs = []
    for i in range(count):
        prompt = tokens(rng.choice([3, 40, 96, 150]), seed=rng.randrange(3)) + tokens(
            rng.randrange(1, 50), seed=100 + i
        )
        options = {"max_tokens": rng.choice([1, 5, 12, 20])}
        if rng.random() < 0.5:
            options |= {"temperature": 1.0, "seed": i}
        if rng.random() < 0.2:
            options |= {"repetition_penalty": 1.2}
        specs.append((prompt, options))
    return specs


SPECS = make_specs(40)


class Client:
    """Asks one engine for one thing, in one of several ways, and checks what comes."""

    def __init__(self, engines, solo, seed):
        self._rng = random.Random(seed)
        name = self._rng.choice(MODELS)
        self._engine, self._solo = engines[name], solo[name]
        self._spec = self._rng.randrange(len(SPECS))
        self.prompt, self.options = SPECS[self._spec]
        self.way = self._rng.choices(["whole", "stream", "cancel", "time out", "bad"], [8, 6, 3, 2, 1])[0]

    def check(self, token_ids):
        assert token_ids == self._solo[self._spec]

    def check_part(self, token_ids):
        assert token_ids == self._solo[self._spec][: len(token_ids)]

    def ask(self):
        match self.way:
            case "whole":
                self.check(self._engine.generate(self.prompt, **self.options).token_ids)
            case "stream":
                self.check(
                    [token for chunk in self._engine.stream(self.prompt, **self.options) for token in chunk.token_ids]
                )
            case "cancel":
                stream = self._engine.stream(self.prompt, **self.options)
                seen = [
                    token
                    for chunk, _ in zip(stream, range(self._rng.randrange(3)), strict=False)
                    for token in chunk.token_ids
                ]
                stream.close()
                self.check_part(seen)
            case "time out":
                with pytest.raises(RequestTimeoutError):
                    self._engine.generate(self.prompt, max_tokens=3000, timeout_s=self._rng.random() / 10 + 1e-6)
            case "bad":
                with pytest.raises(InvalidRequestError):
                    self._engine.generate([*self.prompt, 10**6], **self.options)

    async def ask_on_loop(self):
        match self.way:
            case "whole" | "stream":
                self.check((await self._engine.agenerate(self.prompt, **self.options)).token_ids)
            case "cancel":
                task = asyncio.ensure_future(self._engine.agenerate(self.prompt, **self.options))
                await asyncio.sleep(self._rng.random() / 20)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            case "time out":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(
                        self._engine.agenerate(self.prompt, max_tokens=3000), self._rng.random() / 10
                    )
            case "bad":
                with pytest.raises(InvalidRequestError):
                    await self._engine.agenerate([], **self.options)


async def run_tasks(clients):
    gate = asyncio.Semaphore(NUM_TASKS)

    async def run(client):
        async with gate:
            await client.ask_on_loop()

    await asyncio.gather(*map(run, clients))


def num_open_files():
    return len(os.listdir("/dev/fd"))


def test_every_answer_is_the_one_given_alone_and_nothing_is_left_behind(tmp_path: Path):
    models = {name: build_tiny(name) for name in MODELS}
    solo = {}
    for name, model in models.items():
        with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
            solo[name] = [engine.generate(prompt, **options).token_ids for prompt, options in SPECS]
    gc.collect()
    mx.clear_cache()
    threads, files, memory_bytes = set(threading.enumerate()), num_open_files(), mx.get_active_memory()

    settings = EngineSettings(prefill_step_size=64, max_batch_size=8)
    hot = 3_000_000  # small enough to evict
    engines = {
        name: Engine(
            model,
            name=name,
            cache=CacheSettings(block_size=BLOCK_SIZE, hot_cache_max_size=hot, paged_ssd_cache_dir=tmp_path / "kv"),
            settings=settings,
        )
        for name, model in models.items()
    }
    clients = [Client(engines, solo, seed) for seed in range(NUM_REQUESTS)]
    with ThreadPoolExecutor(NUM_THREADS) as callers:
        answers = [callers.submit(client.ask) for client in clients[::2]]
        asyncio.run(run_tasks(clients[1::2]))
        for answer in answers:
            answer.result()
    for engine in engines.values():
        engine._scheduler.thread.call(lambda: None)
        engine.cache.flush()
        engine._scheduler.thread.call(lambda: None)
        engine.cache.check()
        assert engine.num_active_requests == engine._scheduler.occupancy.num_waiting == 0
        assert engine.cache.stats().hot.blocks_in_use == 0
        assert engine.cache.stats().matched_tokens > 0
        engine.close()
    del engine, engines, clients
    gc.collect()
    mx.clear_cache()
    assert {thread.name for thread in threading.enumerate()} - {thread.name for thread in threads} <= {"tqdm_monitor"}
    assert num_open_files() <= files
    assert mx.get_active_memory() <= memory_bytes * 1.01
