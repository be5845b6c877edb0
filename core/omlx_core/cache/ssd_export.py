"""A warmed prefix as one file, to be shared or moved: written from the cold tier's blocks, and read into another's.

::

    8 bytes   length of the header, little-endian
    header    JSON: "__metadata__" with format, namespace and what that stands for; one U8 tensor per block
    data      the block files, byte for byte, each after the one before it in its chain

It's a safetensors file whose tensors are block files, which are safetensors files themselves: any reader takes it
apart. Each block proves its own bytes, the header is proven by a checksum of its own, and importing recomputes every
hash from the tokens. Extra keys, such as a cache salt, are no part of it: who imports must know them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omlx_core.cache.block_file import read_block, read_block_identity, read_sealed_header, sync_directory, sync_file
from omlx_core.cache.block_hash import BlockHash, NamespaceHash, hash_block, iter_block_hashes
from omlx_core.cache.block_header import BlockIdentity, encode_header
from omlx_core.cache.parts import PARTS, ROWS, hash_part
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_budget import SaveOutcome
from omlx_core.cache.ssd_index_view import read_snapshot
from omlx_core.cache.ssd_layout import IndexEntry, block_path, read_description
from omlx_core.cache.ssd_owner import new_owner, retire_owner
from omlx_core.cache.ssd_publisher import BlockPublisher, NewBlock
from omlx_core.errors import CorruptBlockError, ForeignExportError, InvalidRequestError, MissingBlocksError

FORMAT_NAME = "omlx-kv-prefix"
FORMAT_VERSION = 1

_SAVE_REMEDY = "run the prompt once more, wait for the cache to be flushed, and export again"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of an exported prefix.

    Attributes:
        num_blocks: blocks in the file.
        blocks_written: those written now.
        bytes_written: size of their files.
        blocks_present: those that were there already.
        refusal: why the rest was not written; None if everything is on disk.
    """

    num_blocks: int
    blocks_written: int
    bytes_written: int
    blocks_present: int
    refusal: SaveOutcome | None


@dataclass(frozen=True, slots=True)
class _Part:
    """A block's place in an export: where its file starts there, and how long it is."""

    block_hash: BlockHash
    start: int
    size_bytes: int


def find_chain(
    directory: Path, namespace: NamespaceHash, token_ids: Sequence[int], extra_keys: Sequence[str]
) -> list[BlockHash]:
    """The hashes of a prompt's full blocks, of the size that the namespace's blocks have.

    Raises:
        MissingBlocksError: there are no blocks in the namespace.
        OSError: one of them can't be read.
    """
    with read_snapshot(directory) as view:
        for entry in view.entries(namespace):
            if entry.part != ROWS:
                continue
            # All have as many tokens; this one may just have been evicted.
            with (
                contextlib.suppress(FileNotFoundError),
                open(block_path(directory, namespace, entry.block_hash), "rb", buffering=0) as file,
            ):
                block_size = read_block_identity(file).num_tokens
                if block_size:
                    return list(iter_block_hashes(namespace, token_ids, block_size, extra_keys))
    raise MissingBlocksError(f"no block of this model is on disk: {_SAVE_REMEDY}")


def export_blocks(
    directory: Path,
    namespace: NamespaceHash,
    block_hashes: Sequence[BlockHash],
    path: Path,
    extra_keys: Sequence[str],
) -> int:
    """Write blocks and all before them to one file; see `PagedSSDCacheManager.export`.

    Raises:
        InvalidRequestError: there is nothing to export, or the blocks were stored under other extra keys.
        MissingBlocksError: some aren't on disk.
        CorruptBlockError: one is damaged.
        OSError: the file can't be written; the one that was there stays.
    """
    entries = _with_ancestors_and_parts(directory, namespace, block_hashes)
    if not entries:
        raise InvalidRequestError("there is nothing to export: the prompt doesn't fill a block")
    tensors: dict[str, Any] = {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size_bytes
        tensors[entry.block_hash.hex()] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    metadata = {
        "format": FORMAT_NAME,
        "format_version": str(FORMAT_VERSION),
        "namespace": namespace.hex(),
        "description": json.dumps(read_description(directory, namespace)),
    }
    owner = new_owner()
    temporary = path.with_name(f".{path.name}.{owner}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as target:
            target.write(encode_header(metadata, tensors, []))
            for number, entry in enumerate(entries):
                try:
                    target.write(_read_whole(directory, entry, extra_keys))
                except FileNotFoundError as exc:
                    raise MissingBlocksError(
                        f"block {number + 1} of {len(entries)} was evicted meanwhile: {_SAVE_REMEDY}"
                    ) from exc
            target.flush()
            sync_file(target.fileno())
        temporary.replace(path)
        sync_directory(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
        retire_owner(owner)
    return len(entries)


def import_blocks(
    path: Path,
    namespace: NamespaceHash,
    description: Mapping[str, Any],
    publisher: BlockPublisher,
    extra_keys: Sequence[str],
) -> ImportReport:
    """Read an export, verify all of it, then publish its blocks; see `PagedSSDCacheManager.import_`.

    Raises:
        ForeignExportError: it belongs to another namespace.
        CorruptBlockError: it isn't what was exported.
        InvalidRequestError: it was stored under other extra keys.
        OSError: it can't be read, is no export of this version, or the cache can't be written.
    """
    with open(path, "rb", buffering=0) as file:
        parts = _read_parts(file, namespace, description)
        for _ in _read_blocks(file, parts, namespace, extra_keys):
            pass
        written = bytes_written = present = 0
        for identity, payload in _read_blocks(file, parts, namespace, extra_keys):
            token_ids = np.frombuffer(identity.token_ids, "<u4").tolist()
            block = NewBlock(identity.block_hash, identity.parent_hash, token_ids, payload, identity.part)
            [result] = publisher.save([block])
            if result.error is not None:
                raise result.error
            if not result.outcome.is_on_disk:
                return ImportReport(len(parts), written, bytes_written, present, result.outcome)
            if result.outcome is SaveOutcome.WRITTEN:
                written += 1
                bytes_written += result.size_bytes
            else:
                present += 1
        return ImportReport(len(parts), written, bytes_written, present, None)


def _with_ancestors_and_parts(
    directory: Path, namespace: NamespaceHash, block_hashes: Sequence[BlockHash]
) -> list[IndexEntry]:
    """The rows of blocks, of all before them, and of the windows and checkpoints that these have, parents first."""
    found: dict[BlockHash, IndexEntry] = {}
    missing: set[BlockHash] = set()
    with read_snapshot(directory) as view:
        for block_hash in block_hashes:
            walked: BlockHash | None = block_hash
            while walked is not None and walked not in found and walked not in missing:
                entry = view.get(namespace, walked)
                if entry is None:
                    missing.add(walked)
                    break
                found[walked] = entry
                walked = entry.parent_hash
        part_hashes = [hash_part(block_hash, part) for block_hash in found for part in PARTS]
        rows = [view.get(namespace, part_hash) for part_hash in part_hashes]
        parts = [row for row in rows if row is not None]
    if missing:
        raise MissingBlocksError(
            f"{len(missing)} of {len(missing) + len(found)} blocks are not on disk: {_SAVE_REMEDY}"
        )
    return sorted([*found.values(), *parts], key=lambda entry: entry.depth)


def _read_whole(directory: Path, entry: IndexEntry, extra_keys: Sequence[str]) -> bytes:
    """A block's file, verified."""
    path = block_path(directory, entry.namespace, entry.block_hash)
    with open(path, "rb", buffering=0) as file:
        identity, _ = read_block(file)
        size_bytes = file.tell()
        if (identity.namespace, identity.block_hash, size_bytes) != (
            entry.namespace,
            entry.block_hash,
            entry.size_bytes,
        ):
            raise CorruptBlockError(f"{path} holds block {identity.block_hash.hex()} in {size_bytes} bytes")
        _verify_hash(identity, extra_keys)
        file.seek(0)
        return file.read()


def _read_parts(file: io.FileIO, namespace: NamespaceHash, description: Mapping[str, Any]) -> list[_Part]:
    """Where the blocks of an export are."""
    metadata, tensors = read_sealed_header(file, FORMAT_NAME, FORMAT_VERSION)
    data_start = file.tell()
    if metadata.get("namespace") != namespace.hex():
        raise ForeignExportError(_explain_foreign(str(file.name), metadata, namespace, description))
    parts, end = [], 0
    try:
        for name, entry in tensors.items():
            start, stop = entry["data_offsets"]
            if start != end or stop < start:
                raise ValueError(f"{name} is at {start}:{stop}, not at {end}")
            parts.append(_Part(BlockHash(bytes.fromhex(name)), data_start + start, stop - start))
            end = stop
    except (ValueError, TypeError, KeyError) as exc:
        raise CorruptBlockError(f"the header of {str(file.name)!r} is malformed: {exc!r}") from exc
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != data_start + end:
        raise CorruptBlockError(f"{str(file.name)!r} has {size_bytes} bytes, its header says {data_start + end}")
    return parts


def _read_blocks(
    file: io.FileIO, parts: Sequence[_Part], namespace: NamespaceHash, extra_keys: Sequence[str]
) -> Iterator[tuple[BlockIdentity, BlockPayload]]:
    """The blocks of an export, each verified, and each after the one before it in its chain."""
    depths: dict[BlockHash | None, int] = {None: -1}
    for part in parts:
        file.seek(part.start)
        identity, payload = read_block(file, part.size_bytes)
        if (identity.namespace, identity.block_hash) != (namespace, part.block_hash):
            raise CorruptBlockError(f"block {identity.block_hash.hex()} is where {part.block_hash.hex()} should be")
        if depths.get(identity.parent_hash) != identity.depth - 1:
            raise CorruptBlockError(f"block {identity.block_hash.hex()} doesn't follow the one before it")
        _verify_hash(identity, extra_keys)
        if identity.part == ROWS:
            depths[identity.block_hash] = identity.depth
        yield identity, payload


def _verify_hash(identity: BlockIdentity, extra_keys: Sequence[str]) -> None:
    tokens = np.frombuffer(identity.token_ids, dtype="<u4")
    parent = identity.parent_hash
    if identity.part != ROWS:
        if parent is None or len(tokens) or hash_part(parent, identity.part) != identity.block_hash:
            raise CorruptBlockError(f"block {identity.block_hash.hex()} is not the {identity.part} of its parent")
        return
    if hash_block(identity.parent_hash or identity.namespace, tokens, extra_keys) != identity.block_hash:
        raise InvalidRequestError(
            f"block {identity.block_hash.hex()} isn't named after its tokens and extra_keys={tuple(extra_keys)!r}: "
            "name the extra keys, such as the cache salt, that it was stored under"
        )


def _explain_foreign(
    path: str, metadata: Mapping[str, Any], namespace: NamespaceHash, description: Mapping[str, Any]
) -> str:
    try:
        theirs = json.loads(metadata.get("description", "{}"))
    except ValueError:
        theirs = {}
    text = (
        f"{path!r} belongs to model {theirs.get('model')!r} (namespace {str(metadata.get('namespace'))[:16]}), "
        f"this cache to {description.get('model')!r} ({namespace.hex()[:16]}): import it where that model runs"
    )
    different = [key for key in description if key in theirs and theirs[key] != description[key]]
    return f"{text}. They differ in {', '.join(different)}" if different else text
