"""What the SSD tier costs: opening, looking up, writing until durable, reading with verification.

    python benchmarks/cold_tier.py [--blocks 20000] [--rows 1000000] [--runs 7] [--block-mib 4] [--directory DIR]

- **opening** a folder of `--blocks` block files, and one whose index has `--rows` rows (entered directly, without
  files: opening never looks at those). What is timed ends with the answer to the first look-up.
- **has_block**, half of the look-ups hits, in random order.
- **rebuilding** the index of the first folder from its files.
- **writing** blocks until they are durable, against writing the same bytes to files, one fsync each.
- **reading** with verification, against reading the same files only; all from the page cache.

Alternatives are measured in turn, so that a busy machine is equally bad for each; medians are printed as JSON.
"""

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from harness import median_s
from tqdm import tqdm, trange

from omlx_core.cache.block_file import encode_block
from omlx_core.cache.block_hash import BlockHash, hash_block, hash_namespace
from omlx_core.cache.block_header import BlockIdentity, encode_token_ids
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import block_path

NAMESPACE = hash_namespace({"benchmark": "cold_tier"})
CHAIN_LENGTH = 100
NUM_LOOKUPS = 20_000
WAIT_S = 600.0


def open_cache(directory: Path) -> PagedSSDCacheManager:
    return PagedSSDCacheManager(
        directory, max_size_bytes=10**15, namespace=NAMESPACE, description={"benchmark": "cold_tier"}
    )


def make_payload(size_bytes: int, seed: int = 0) -> BlockPayload:
    data = np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)
    half = size_bytes // 2
    return BlockPayload(
        {
            "layers.0.keys": BlockTensor("U8", (half,), data[:half].data.toreadonly()),
            "layers.0.values": BlockTensor("U8", (size_bytes - half,), data[half:].data.toreadonly()),
        }
    )


def chains(num_blocks: int) -> Iterator[tuple[BlockHash, BlockHash | None, int]]:
    """Hash, parent and depth of blocks in chains."""
    parent = None
    for number in range(num_blocks):
        depth = number % CHAIN_LENGTH
        parent = parent if depth else None
        block_hash = hash_block(parent or NAMESPACE, [number])
        yield block_hash, parent, depth
        parent = block_hash


def fill_with_files(directory: Path, num_blocks: int) -> None:
    """Block files without an index."""
    open_cache(directory).close()
    for path in directory.glob("index.sqlite3*"):
        path.unlink()
    payload = make_payload(1000)
    for number, (block_hash, parent, depth) in enumerate(tqdm(chains(num_blocks), "block files", num_blocks)):
        identity = BlockIdentity(NAMESPACE, block_hash, parent, depth, encode_token_ids([number]))
        path = block_path(directory, NAMESPACE, block_hash)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(b"".join(encode_block(identity, payload).buffers))
        path.chmod(0o600)


def fill_with_rows(directory: Path, num_rows: int) -> None:
    """An index without block files."""
    open_cache(directory).close()
    with closing(sqlite3.connect(directory / "index.sqlite3")) as connection, connection:
        connection.executemany(
            "INSERT INTO blocks (namespace, hash, parent, depth, size_bytes, created_s, last_used)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (NAMESPACE, block_hash, parent, depth, 4_000_000, 0.0, number // CHAIN_LENGTH + 1)
                for number, (block_hash, parent, depth) in enumerate(tqdm(chains(num_rows), "rows", num_rows))
            ),
        )


def measure_opening(directory: Path, runs: int) -> float:
    """Median of the seconds until a new cache has answered its first look-up."""
    durations_s = []
    for _ in range(runs):
        begin_s = time.perf_counter()
        cache = open_cache(directory)
        cache.has_block(BlockHash(bytes(32)))
        durations_s.append(time.perf_counter() - begin_s)
        cache.close()
    return statistics.median(durations_s)


def measure_lookups(directory: Path, num_blocks: int, runs: int) -> float:
    """Median over the runs of the seconds that one look-up takes."""
    generator = random.Random(0)
    hits = [block_hash for block_hash, _, _ in chains(num_blocks)]
    lookups = [
        *generator.choices(hits, k=NUM_LOOKUPS // 2),
        *(generator.randbytes(32) for _ in range(NUM_LOOKUPS // 2)),
    ]
    generator.shuffle(lookups)
    with closing(open_cache(directory)) as cache:
        found = sum(map(cache.has_block, lookups))
        if found != NUM_LOOKUPS // 2:
            raise RuntimeError(f"{found} of {NUM_LOOKUPS // 2} blocks found")

        def look_up_all() -> None:
            for block_hash in lookups:
                cache.has_block(block_hash)

        return median_s(look_up_all, runs) / NUM_LOOKUPS


def measure_transfer(directory: Path, block_bytes: int, runs: int, num_blocks: int = 16) -> dict[str, float]:
    """Median bytes per second of writing and of reading, with the cache and without."""
    durations_s: dict[str, list[float]] = {}
    payloads = [make_payload(block_bytes, seed) for seed in range(num_blocks)]
    parts = [[tensor.data for tensor in payload.tensors.values()] for payload in payloads]

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begin_s = time.perf_counter()
        yield
        durations_s.setdefault(what, []).append(time.perf_counter() - begin_s)

    with closing(open_cache(directory)) as cache:
        for run in trange(runs, desc="transfer"):
            hashes = [hash_block(NAMESPACE, [run, number]) for number in range(num_blocks)]
            paths = [directory.parent / f"plain-{number}" for number in range(num_blocks)]
            with timed("write plain"):
                for path, buffers in zip(paths, parts, strict=True):
                    with open(path, "wb", buffering=0) as file:
                        for buffer in buffers:
                            file.write(buffer)
                        os.fsync(file.fileno())
            with timed("write"):
                for block_hash, payload in zip(hashes, payloads, strict=True):
                    cache.save_block(block_hash, None, [1], payload)
                if not cache.flush(WAIT_S):
                    raise RuntimeError("not written in time")
            files = [block_path(directory, NAMESPACE, block_hash) for block_hash in hashes]
            with timed("read plain"):
                for path in files:
                    path.read_bytes()
            with timed("read"):
                for block_hash in hashes:
                    if cache.load_block(block_hash, [1]) is None:
                        raise RuntimeError("a block that was written is not there")
            for path in paths:
                path.unlink()
            cache.clear()
    total_bytes = block_bytes * num_blocks
    return {what: total_bytes / statistics.median(values) for what, values in durations_s.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--block-mib", type=float, default=4.0)
    parser.add_argument("--directory", help="where to work, on the disk in question")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        small, large = Path(root, "small"), Path(root, "large")
        fill_with_files(small, args.blocks)
        begin_s = time.perf_counter()
        open_cache(small).close()
        rebuild_s = time.perf_counter() - begin_s
        fill_with_rows(large, args.rows)
        sizes = {"small": (small, args.blocks), "large": (large, args.rows)}
        open_s = {name: measure_opening(path, args.runs) for name, (path, _) in sizes.items()}
        lookup_s = {name: measure_lookups(path, count, args.runs) for name, (path, count) in sizes.items()}
        rates = measure_transfer(Path(root, "transfer"), round(args.block_mib * 1024**2), args.runs)
    json.dump(
        {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "omlx-plugins": version("omlx-plugins"),
                "python": platform.python_version(),
                "sqlite": sqlite3.sqlite_version,
            },
            "runs": args.runs,
            "blocks": {name: count for name, (_, count) in sizes.items()},
            "open_ms": {name: round(1e3 * value, 2) for name, value in open_s.items()},
            "has_block_us": {name: round(1e6 * value, 2) for name, value in lookup_s.items()},
            "rebuild_s": round(rebuild_s, 2),
            "block_mib": args.block_mib,
            "write_mb_per_s": {"cache": round(rates["write"] / 1e6), "plain": round(rates["write plain"] / 1e6)},
            "read_mb_per_s": {"cache": round(rates["read"] / 1e6), "plain": round(rates["read plain"] / 1e6)},
        },
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    main()
