"""A judge of the SSD tier's folder that shares no code with it: the published format, read with other tools.

It knows the format from its description alone: SQLite's tables, safetensors files that the ``safetensors`` package can
open, a checksum over all other bytes of a file. Whatever `PagedSSDCacheManager` believes about itself, this is what a
stranger finds.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import xxhash

_TOP_LEVEL = {"index.sqlite3", "index.sqlite3-wal", "index.sqlite3-shm", "index.lock", "index.sqlite3.damaged"}


@dataclass(frozen=True)
class _Row:
    namespace: bytes
    hash: bytes
    parent: bytes | None
    depth: int
    size_bytes: int
    last_used: int
    part: str

    @property
    def name(self) -> str:
        return f"{self.namespace.hex()[:8]}/{self.hash.hex()[:8]}"


def audit_directory(
    directory: Path,
    *,
    max_size_bytes: int | None = None,
    checkpoint_share: float = 1.0,
    hashes_are_of_tokens: bool = False,
) -> list:
    """Find everything that is wrong in a cache folder which nobody is using at the moment.

    Args:
        directory: the cache's folder.
        max_size_bytes: its budget, if that is to be judged too.
        checkpoint_share: the largest part of it for checkpoints.
        hashes_are_of_tokens: also recompute each block's hash from its tokens and its parent, without extra keys.

    Returns:
        One sentence for each finding; an empty list for a clean folder.
    """
    rows, unpublished, totals = _read_index(directory / "index.sqlite3")
    by_key = {(row.namespace, row.hash): row for row in rows}
    paths = {_path_of(directory, row): row for row in rows}
    findings = [f"{name} is unpublished, and nobody is writing or removing it" for name in unpublished]
    for path, row in paths.items():
        if not path.is_file():
            findings.append(f"{row.name} has a row and no file")
            continue
        findings += [f"{row.name}: {finding}" for finding in _judge_file(path, row, hashes_are_of_tokens)]
    for row in rows:
        findings += [f"{row.name}: {finding}" for finding in _judge_chain(row, by_key)]
    checkpoint_bytes = sum(row.size_bytes for row in rows if row.part == "checkpoint")
    expected_totals = (len(rows), sum(row.size_bytes for row in rows), checkpoint_bytes)
    if not unpublished and totals != expected_totals:
        findings.append(f"the totals are {totals}, the rows add up to {expected_totals}")
    findings += _judge_folder(directory, set(paths))
    size_bytes = sum(path.stat().st_size for path in directory.glob("*/??/*"))
    if max_size_bytes is not None and size_bytes > max_size_bytes:
        findings.append(f"{size_bytes} bytes on disk exceed the budget of {max_size_bytes}")
    if max_size_bytes is not None and checkpoint_bytes > max_size_bytes * checkpoint_share:
        findings.append(f"{checkpoint_bytes} bytes of checkpoints exceed {checkpoint_share} of {max_size_bytes}")
    return sorted(findings)


def _read_index(path: Path) -> tuple[list[_Row], list[str], tuple[int, int, int]]:
    connection = sqlite3.connect(path)
    try:
        [(verdict,)] = connection.execute("PRAGMA integrity_check(1)").fetchall()
        if verdict != "ok":
            raise AssertionError(f"SQLite says about {path}: {verdict}")
        rows = [
            _Row(*values)
            for values in connection.execute(
                "SELECT namespace, hash, parent, depth, size_bytes, last_used, part FROM blocks"
            )
        ]
        unpublished = [
            f"{namespace.hex()[:8]}/{block_hash.hex()[:8]} of {owner or 'an eviction'}"
            for namespace, block_hash, owner in connection.execute("SELECT namespace, hash, owner FROM unpublished")
        ]
        [totals] = connection.execute("SELECT num_blocks, size_bytes, checkpoint_bytes FROM totals").fetchall()
    finally:
        connection.close()
    return rows, unpublished, totals


def _path_of(directory: Path, row: _Row) -> Path:
    name = row.hash.hex()
    return directory / row.namespace.hex() / name[:2] / f"{name}.safetensors"


def _judge_file(path: Path, row: _Row, hashes_are_of_tokens: bool) -> Iterator[str]:
    content = path.read_bytes()
    if len(content) != row.size_bytes:
        yield f"{len(content)} bytes on disk, {row.size_bytes} in the index"
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError as exc:
        yield f"safetensors can't open it: {exc}"
        return
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    digits_at = content.index(metadata["checksum"].encode())
    if xxhash.xxh3_128(content[:digits_at] + content[digits_at + 32 :]).hexdigest() != metadata["checksum"]:
        yield "the checksum doesn't match"
    parent = row.parent.hex() if row.parent is not None else ""
    said = {name: metadata[name] for name in ("namespace", "block_hash", "parent_hash", "depth", "part")}
    known = {
        "namespace": row.namespace.hex(),
        "block_hash": row.hash.hex(),
        "parent_hash": parent,
        "depth": str(row.depth),
        "part": row.part,
    }
    if said != known:
        yield f"the file says {said}, the index {known}"
    if not tensors:
        yield "no tensors in it"
    token_ids = base64.b64decode(metadata["token_ids"])
    if len(token_ids) != 4 * int(metadata["num_tokens"]):
        yield f"{len(token_ids)} bytes of token ids for {metadata['num_tokens']} tokens"
    chained = (row.parent or row.namespace) + (len(token_ids) // 4).to_bytes(4, "little") + token_ids
    if row.part != "rows":
        chained = (row.parent or b"") + b"/" + row.part.encode()
    if hashes_are_of_tokens and hashlib.sha256(chained).digest() != row.hash:
        yield "its hash is not that of its tokens"


def _judge_chain(row: _Row, by_key: dict[tuple[bytes, bytes], _Row]) -> Iterator[str]:
    if row.parent is None:
        if row.depth:
            yield f"depth {row.depth} without a parent"
        return
    parent = by_key.get((row.namespace, row.parent))
    if parent is None:
        yield "its parent is missing"
        return
    if parent.part != "rows":
        yield f"its parent is a {parent.part}"
    if parent.depth + 1 != row.depth:
        yield f"depth {row.depth} under a parent of depth {parent.depth}"
    if parent.last_used < row.last_used:
        yield f"used at {row.last_used}, its parent at {parent.last_used}: it would outlive it"


def _judge_folder(directory: Path, published: set[Path]) -> Iterator[str]:
    for path in [directory, *directory.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o700 if path.is_dir() else 0o600):
            yield f"{path.name} has mode {mode:o}"
        if path.is_dir() or path in published:
            continue
        relative = path.relative_to(directory)
        is_known = relative.name in _TOP_LEVEL if len(relative.parts) == 1 else relative.name == "namespace.json"
        if not is_known:
            yield f"{relative} belongs to nothing"
