"""What the cache's own operations cost, without a model: match, bookkeeping, restore, store.

    python benchmarks/cache_ops.py [--shape small|long|qwen3-8b] [--runs 7] [--only restore ...] [--directory DIR]

Each figure is set against its bar. Where another way does the same work, the figure is a ratio of medians taken in turn
in one run: against mlx-lm's own prompt cache, or against the *limit*, which is numpy, `os.preadv` or one file moving
the same bytes once. The keys and values are random.

- **match**: hashing a prompt and walking the index, everything in RAM.
- **pool**: one block allocated, touched, freed, evicted, in pools of 1,000 to 1,000,000.
- **hit**: a prefix restored from RAM, then 32 tokens appended, which forces every copy that a lazy restore puts off.
- **restore**: the same tokens from SSD in a process that has just started, the page cache warm, checksums verified; and
  the most memory that takes. With the page cache dropped, against reading the files one after the other, as `dd` does.
- **store**: time taken on the thread that computes, and until all is durable.
- **sessions**: bytes in RAM when eight sessions leave the same long prefix.

A table goes to standard error, JSON to standard output.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omlx_core.mlx_backend import mx

import numpy as np
from harness import CAN_DROP_PAGE_CACHE, Figure, drop_page_cache, medians_in_turn, print_report, print_table, seconds
from mlx_lm.models.cache import KVCache, LRUPromptCache, load_prompt_cache, save_prompt_cache

from omlx_core.cache.block_hash import BlockHash, hash_namespace
from omlx_core.cache.block_pool import BlockPool, CacheBlock
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.tiered_cache import CaptureBlock, CapturedBlock, TieredCache
from omlx_core.state.prompt_state import PromptCache, PromptStateCodec

BLOCK_SIZE = 256
APPENDED_TOKENS = 32
NAMESPACE_FACTS = {"benchmark": "cache_ops"}
NAMESPACE = hash_namespace(NAMESPACE_FACTS)
WAIT_S = 600.0
DROPPED_WAYS = ("cache, dropped", "dd, dropped") if CAN_DROP_PAGE_CACHE else ()
RESTORE_WAYS = ("cache", "cache, nothing kept", "mlx-lm", "limit", *DROPPED_WAYS)
_DD_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Shape:
    """The keys and values of a prompt."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    num_tokens: int

    @property
    def size_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.size * self.num_tokens


SHAPES = {
    "small": Shape(16, 4, 64, mx.float16, 4096),
    "long": Shape(16, 4, 64, mx.float16, 32768),
    "qwen3-8b": Shape(36, 8, 128, mx.bfloat16, 8192),
}
TINY = Shape(1, 1, 8, mx.float16, BLOCK_SIZE)


def make_rows(shape: Shape, num_tokens: int) -> list[mx.array]:
    """Keys and values, stacked, for each layer."""
    size = (2, 1, shape.num_kv_heads, num_tokens, shape.head_dim)
    rows = [mx.random.normal(size, dtype=shape.dtype) for _ in range(shape.num_layers)]
    mx.eval(rows)
    return rows


def append_rows(layers: PromptCache, rows: list[mx.array]) -> None:
    """What a model's step does to its cache."""
    for layer, (keys, values) in zip(layers, rows, strict=True):
        layer.update_and_fetch(keys, values)
    mx.eval([layer.state for layer in layers])


def make_layers(shape: Shape) -> PromptCache:
    layers = [KVCache() for _ in range(shape.num_layers)]
    append_rows(layers, make_rows(shape, shape.num_tokens))
    return layers


def make_tokens(num_tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 150_000, num_tokens).tolist()


def make_codec(shape: Shape) -> PromptStateCodec:
    return PromptStateCodec([KVCache() for _ in range(shape.num_layers)], BLOCK_SIZE)


@contextmanager
def open_cache(directory: Path | None = None, hot_max_bytes: int | None = None) -> Iterator[TieredCache]:
    """Both tiers, or RAM alone."""
    ssd = None
    if directory is not None:
        ssd = PagedSSDCacheManager(
            directory,
            max_size_bytes=10**15,
            namespace=NAMESPACE,
            description=NAMESPACE_FACTS,
            max_queued_bytes=10**15,
        )
    paged = PagedCacheManager(NAMESPACE, block_size=BLOCK_SIZE, hot_max_bytes=hot_max_bytes, cold=ssd)
    with closing(TieredCache(paged, ssd)) as cache:
        yield cache


def capture_from(codec: PromptStateCodec, layers: PromptCache) -> CaptureBlock:
    copies = codec.rows_of(layers, layers[0].offset)

    def capture(start: int, stop: int, has_rows: bool) -> CapturedBlock:
        return CapturedBlock(None if has_rows else copies.copy(start, stop))

    return capture


def store(cache: TieredCache, tokens: Sequence[int], capture: CaptureBlock) -> None:
    table = cache.match(tokens).table
    cache.append_tokens(table, tokens[table.num_tokens :])
    cache.store(table, capture)
    cache.release(table)


def restore(cache: TieredCache, codec: PromptStateCodec, tokens: Sequence[int], num_prompt_tokens: int) -> PromptCache:
    """What an engine does for a prompt of `tokens` and more."""
    allocate = partial(codec.allocate, capacity=num_prompt_tokens)
    pending = cache.match(tokens, max_tokens=len(tokens), allocate=allocate)
    content = cache.finish_restore(pending, num_prompt_tokens)
    if content is None or pending.table.num_tokens != len(tokens):
        raise RuntimeError(f"{pending.table.num_tokens} of {len(tokens)} tokens were found")
    layers, content = codec.restore(content, num_tokens=len(tokens), capacity=num_prompt_tokens)
    cache.promote(pending.table, content)
    cache.release(pending.table)
    return layers


# match


def bench_match(runs: int) -> list[Figure]:
    figures, match_s = [], {}
    payload = make_codec(TINY).rows_of(make_layers(TINY), BLOCK_SIZE).copy(0, BLOCK_SIZE)
    for num_tokens, bar_ms in ((32_768, 5.0), (1_048_576, 150.0)):
        tokens = make_tokens(num_tokens)
        raw = np.asarray(tokens, "<u4").tobytes()
        with open_cache() as cache:
            store(cache, tokens, lambda *_: CapturedBlock(payload))

            def match(tokens: list[int] = tokens, cache: TieredCache = cache) -> float:
                begin_s = time.perf_counter()
                pending = cache.match(tokens, max_tokens=len(tokens))
                elapsed_s = time.perf_counter() - begin_s
                if pending.table.num_tokens != len(tokens):
                    raise RuntimeError(f"{pending.table.num_tokens} of {len(tokens)} tokens matched")
                cache.release(pending.table)
                return elapsed_s

            medians = medians_in_turn(
                {"match": match, "limit": lambda raw=raw: seconds(hashlib.sha256(raw).digest)},
                runs,
                description=f"match {num_tokens}",
                warm_up=1,
            )
        match_s[num_tokens] = medians["match"]
        figures.append(Figure(f"match {num_tokens:,} tokens", 1e3 * medians["match"], "ms", bar_ms))
    small, large = sorted(match_s)
    growth = match_s[large] / match_s[small] / (large / small)
    return [*figures, Figure("match, time per token, longest / shortest", growth, "x", 1.5)]


# pool


def make_pool(num_blocks: int, payload: BlockPayload) -> tuple[BlockPool, list[CacheBlock]]:
    """A pool whose blocks are all cached, and in that order."""
    pool = BlockPool(num_blocks)
    blocks = [pool.allocate() for _ in range(num_blocks)]
    for number, block in enumerate(blocks):
        pool.register(block, BlockHash(number.to_bytes(32, "little")))
        pool.attach(block, payload)
        pool.release(block)
    return pool, blocks


def bench_pool(runs: int) -> list[Figure]:
    payload = make_codec(SHAPES["small"]).rows_of(make_layers(SHAPES["small"]), BLOCK_SIZE).copy(0, BLOCK_SIZE)
    worst_us: dict[str, dict[int, float]] = {}
    for num_blocks in (1_000, 10_000, 100_000, 1_000_000):
        pool, blocks = make_pool(num_blocks, payload)
        num_used = min(num_blocks // 2, 10_000)
        chosen = random.Random(0).sample(blocks[num_blocks // 2 :], num_used)

        def per_block_us(
            action: Callable[[CacheBlock], object], over: Sequence[CacheBlock], count: int = num_used
        ) -> float:
            return 1e6 * seconds(lambda: [action(block) for block in over]) / count

        samples: dict[str, list[float]] = {"touch": [], "free": [], "evict": [], "allocate": []}
        for _ in range(runs):
            samples["touch"].append(per_block_us(pool.acquire, chosen))
            samples["free"].append(per_block_us(pool.release, chosen))
            samples["evict"].append(per_block_us(lambda _, pool=pool: pool.evict_least_recently_used(), chosen))
            taken: list[CacheBlock] = []
            samples["allocate"].append(
                per_block_us(lambda _, pool=pool, taken=taken: taken.append(pool.allocate()), chosen)
            )
            # As they were: cached again, as the most recently used.
            for block in taken:
                pool.register(block, BlockHash(os.urandom(32)))
                pool.attach(block, payload)
                pool.release(block)
        for operation, values in samples.items():
            worst_us.setdefault(operation, {})[num_blocks] = float(np.median(values))
        del pool, blocks, chosen
        gc.collect()
    return [
        Figure(f"pool of {num_blocks:,}: {operation}", value, "us", 3.0)
        for operation, by_size in worst_us.items()
        for num_blocks, value in by_size.items()
    ]


# hit


def bench_hit(shape: Shape, runs: int) -> list[Figure]:
    layers, codec, tokens = make_layers(shape), make_codec(shape), make_tokens(shape.num_tokens)
    sources = [np.array(array.view(mx.uint16)) for layer in layers for array in layer.state[:2]]
    room, more = KVCache.step, make_rows(shape, APPENDED_TOKENS)

    def append(restored: PromptCache) -> PromptCache:
        append_rows(restored, more)
        return restored

    def limit() -> list[np.ndarray]:
        made = [np.empty((*s.shape[:2], s.shape[2] + room, s.shape[3]), s.dtype) for s in sources]
        for destination, source in zip(made, sources, strict=True):
            destination[:, :, : source.shape[2]] = source
        return made

    lru = LRUPromptCache()
    lru.insert_cache("model", tokens, layers)
    with open_cache() as cache:
        store(cache, tokens, capture_from(codec, layers))
        ours = lambda: append(restore(cache, codec, tokens, len(tokens) + APPENDED_TOKENS))  # noqa: E731
        theirs = lambda: append(lru.fetch_nearest_cache("model", [*tokens, 1])[0])  # noqa: E731
        for made in (ours(), theirs()):
            if any(layer.offset != len(tokens) + APPENDED_TOKENS for layer in made):
                raise RuntimeError("a restored cache has another length")
        medians = medians_in_turn(
            {"ours": partial(seconds, ours), "theirs": partial(seconds, theirs), "limit": partial(seconds, limit)},
            runs,
            description="hit",
            warm_up=1,
        )
    return [
        Figure("RAM hit + append 32 / mlx-lm LRUPromptCache", medians["ours"] / medians["theirs"], "x", 0.7),
        Figure("RAM hit + append 32 / limit (numpy copy)", medians["ours"] / medians["limit"], "x", 1.5),
    ]


# restore


def peak_rss_bytes() -> int:
    if sys.platform == "linux":  # where ru_maxrss begins with that of the process that started this one
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match is None:
            raise RuntimeError("/proc/self/status has no VmHWM")
        return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restore_in_this_process(way: str, shape: Shape, directory: Path) -> dict[str, float]:
    """Seconds of one restore, and by how much it raised the peak of this process."""
    tokens, codec, blocks = make_tokens(shape.num_tokens), make_codec(shape), directory / "kv"
    before_bytes = peak_rss_bytes()
    elapsed_s = 0.0
    if way == "mlx-lm":

        def load() -> PromptCache:
            layers = load_prompt_cache(str(directory / "whole.safetensors"))
            mx.eval([layer.state for layer in layers])  # reads what was only mapped out so far
            return layers

        elapsed_s = seconds(load)
    elif way == "limit":
        paths = sorted(blocks.glob("*/*/*.safetensors"))

        def read() -> np.ndarray:
            buffer, at = np.empty(sum(path.stat().st_size for path in paths), np.uint8), 0
            for path in paths:
                fd = os.open(path, os.O_RDONLY)
                at += os.preadv(fd, [buffer[at:]], 0)
                os.close(fd)
            return buffer

        elapsed_s = seconds(read)
    elif way == "dd, dropped":
        piece = bytearray(_DD_BYTES)

        def read_in_turn() -> None:
            for path in sorted(blocks.glob("*/*/*.safetensors")):
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(piece):
                        pass

        elapsed_s = seconds(read_in_turn)
    else:
        with open_cache(blocks, hot_max_bytes=1 if way == "cache, nothing kept" else None) as cache:
            before_bytes = peak_rss_bytes()
            elapsed_s = seconds(lambda: restore(cache, codec, tokens, len(tokens) + APPENDED_TOKENS))
    return {"elapsed_s": elapsed_s, "peak_bytes": peak_rss_bytes() - before_bytes}


def bench_restore(shape_name: str, runs: int, directory: Path) -> list[Figure]:
    shape = SHAPES[shape_name]
    layers = make_layers(shape)
    with open_cache(directory / "kv") as cache:
        store(cache, make_tokens(shape.num_tokens), capture_from(make_codec(shape), layers))
        if not cache.flush(WAIT_S):
            raise RuntimeError("not written in time")
    save_prompt_cache(str(directory / "whole.safetensors"), layers)
    for path in directory.rglob("*.safetensors"):
        path.read_bytes()
    peaks_bytes: dict[str, list[float]] = {way: [] for way in RESTORE_WAYS}

    def in_new_process(way: str) -> float:
        if way in DROPPED_WAYS:
            drop_page_cache(list((directory / "kv").rglob("*.safetensors")))
        command = [sys.executable, __file__, "--shape", shape_name, "--directory", str(directory), "--restore", way]
        result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        peaks_bytes[way].append(result["peak_bytes"])
        return float(result["elapsed_s"])

    medians = medians_in_turn({way: partial(in_new_process, way) for way in RESTORE_WAYS}, runs, description="restore")
    peaks = {way: float(np.median(values)) / shape.size_bytes for way, values in peaks_bytes.items()}
    figures = [
        Figure("restore, new process / mlx-lm load_prompt_cache", medians["cache"] / medians["mlx-lm"], "x", 0.6),
        Figure("restore, new process / limit (preadv)", medians["cache"] / medians["limit"], "x", 2.0),
        Figure(
            "restore, new process, nothing kept / limit", medians["cache, nothing kept"] / medians["limit"], "x", 2.0
        ),
        Figure("restore: peak memory / restored bytes, nothing kept", peaks["cache, nothing kept"], "x", 1.1),
        Figure("restore: peak memory / restored + kept bytes", peaks["cache"] / 2, "x", 1.1),
    ]
    if DROPPED_WAYS:
        cache_s, dd_s = (medians[way] for way in DROPPED_WAYS)
        figures.append(Figure("restore, page cache dropped / dd", cache_s / dd_s, "x", 1.15))
    return figures


# store


def bench_store(shape: Shape, runs: int, directory: Path) -> list[Figure]:
    layers, codec, tokens = make_layers(shape), make_codec(shape), make_tokens(shape.num_tokens)
    sources = [np.array(array.view(mx.uint16)) for layer in layers for array in layer.state[:2]]
    folder, plain = directory / "store", directory / "plain"
    durable_s: list[float] = []

    def on_mlx_thread() -> float:
        with open_cache(folder) as cache:
            cache.flush(WAIT_S)
            begin_s = time.perf_counter()
            store(cache, tokens, capture_from(codec, layers))
            elapsed_s = time.perf_counter() - begin_s
            if not cache.flush(WAIT_S):
                raise RuntimeError("not written in time")
            durable_s.append(time.perf_counter() - begin_s)
        shutil.rmtree(folder)
        return elapsed_s

    def write_plain() -> float:
        def write() -> None:
            with open(plain, "wb", buffering=0) as file:
                for source in sources:
                    file.write(source.data)
                os.fsync(file.fileno())

        elapsed_s = seconds(write)
        plain.unlink()
        return elapsed_s

    measures = {
        "store": on_mlx_thread,
        "memcpy": lambda: seconds(lambda: [source.copy() for source in sources]),
        "file": write_plain,
    }
    medians = medians_in_turn(measures, runs, description="store", warm_up=1)
    return [
        Figure("store: time on the MLX thread / memcpy", medians["store"] / medians["memcpy"], "x", 1.5),
        Figure(
            "store until durable / one file with fsync", float(np.median(durable_s[1:])) / medians["file"], "x", 1.5
        ),
    ]


# sessions


def bench_sessions() -> list[Figure]:
    prefix, num_sessions = make_tokens(32_768), 8
    codec, layers = make_codec(TINY), make_layers(Shape(1, 1, 8, mx.float16, len(prefix) + BLOCK_SIZE))
    with open_cache() as cache:
        for session in range(num_sessions):
            store(cache, [*prefix, *make_tokens(BLOCK_SIZE, seed=session + 1)], capture_from(codec, layers))
        hot_bytes = cache.stats().hot.hot_bytes
    least_bytes = (len(prefix) // BLOCK_SIZE + num_sessions) * (TINY.size_bytes)
    return [Figure("8 sessions after 32k tokens: hot bytes / prefix + 8 blocks", hot_bytes / least_bytes, "x", 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ("match", "pool", "hit", "restore", "store", "sessions")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of hit, restore and store")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", choices=groups, nargs="+", default=groups)
    parser.add_argument("--directory", type=Path, help="where to write, on the disk in question")
    parser.add_argument("--restore", choices=RESTORE_WAYS, help=argparse.SUPPRESS)  # in a process started here
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.restore:
        json.dump(restore_in_this_process(args.restore, shape, args.directory), sys.stdout)
        return
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        root = Path(folder)
        benchmarks = {
            "match": lambda: bench_match(args.runs),
            "pool": lambda: bench_pool(args.runs),
            "hit": lambda: bench_hit(shape, args.runs),
            "restore": lambda: bench_restore(args.shape, args.runs, root),
            "store": lambda: bench_store(shape, args.runs, root),
            "sessions": bench_sessions,
        }
        for group in args.only:
            figures += benchmarks[group]()
    print_table(figures)
    print_report(
        shape={"name": args.shape, "mib": round(shape.size_bytes / 2**20)},
        runs=args.runs,
        figures=[figure.as_dict() for figure in figures],
    )


if __name__ == "__main__":
    main()
