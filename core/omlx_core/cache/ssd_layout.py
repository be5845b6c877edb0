"""Where the files of the cold tier are, and how to find them all again without the index.

::

    index.sqlite3                    the catalogue of everything below
    <namespace>/namespace.json       what the namespace stands for, for people
    <namespace>/<hh>/<hash>.safetensors       one block; hh are the first two digits of its hash
    <namespace>/<hh>/<hash>.<owner>.tmp       a block that <owner> is writing
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omlx_core.cache.block_file import BLOCK_SUFFIX, read_block_identity, sync_directory
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import ROWS, Part
from omlx_core.cache.ssd_owner import OWNER_PATTERN, is_abandoned, new_owner, retire_owner
from omlx_core.errors import CacheDirectoryError

logger = logging.getLogger(__name__)

DESCRIPTION_NAME = "namespace.json"
EVICTED = ""  # the owner of an evicted file that waits for its removal

_HASH_NAME = re.compile("[0-9a-f]{64}")
_TEMPORARY_NAME = re.compile(rf"(?P<hash>[0-9a-f]{{64}})\.(?P<owner>{OWNER_PATTERN})\.tmp")
_DESCRIPTION_TEMPORARY_NAME = re.compile(rf"namespace\.json\.(?P<owner>{OWNER_PATTERN})\.tmp")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One published block.

    Attributes:
        depth: number of blocks before it in its chain.
        size_bytes: size of its file.
        created_s: when it was written, in seconds since the epoch; for people only.
        last_used: value of the logical clock when it was last used.
        part: what of a block it is.
    """

    namespace: NamespaceHash
    block_hash: BlockHash
    parent_hash: BlockHash | None
    depth: int
    size_bytes: int
    created_s: float
    last_used: int
    part: Part = ROWS


@dataclass(frozen=True, slots=True)
class UnpublishedFile:
    """A file that counts towards the budget without being a block.

    Attributes:
        owner: who is writing it; empty for an evicted block that waits for its removal.
        part: what of a block it is.
    """

    namespace: NamespaceHash
    block_hash: BlockHash
    owner: str
    size_bytes: int
    part: Part = ROWS


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """All files of a cache folder: what its index would hold, had it not been lost."""

    entries: list[IndexEntry]
    unpublished: list[UnpublishedFile]


def namespace_folder(directory: Path, namespace: NamespaceHash) -> Path:
    """The folder of one namespace."""
    return directory / namespace.hex()


def block_path(directory: Path, namespace: NamespaceHash, block_hash: BlockHash) -> Path:
    """Where a block's file is; 256 folders per namespace keep each of them short."""
    name = block_hash.hex()
    return namespace_folder(directory, namespace) / name[:2] / f"{name}{BLOCK_SUFFIX}"


def temporary_path(directory: Path, namespace: NamespaceHash, block_hash: BlockHash, owner: str) -> Path:
    """Where a block's file is while `owner` writes it: beside its final place, for an atomic rename."""
    return block_path(directory, namespace, block_hash).with_name(f"{block_hash.hex()}.{owner}.tmp")


def make_folder(path: Path) -> bool:
    """Create a folder for the owner's eyes only; False if it is there already."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def prepare_directory(directory: Path, namespace: NamespaceHash, description: Mapping[str, Any]) -> None:
    """Create the cache's folder and a namespace's in it, for their owner only.

    Raises:
        CacheDirectoryError: that isn't possible, or others may write to one of them.
    """
    folder = namespace_folder(directory, namespace)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if make_folder(folder):
            sync_directory(directory)
        refuse_open_folders(directory, namespace)
        for path in abandoned_descriptions(folder):
            path.unlink(missing_ok=True)
        if not (folder / DESCRIPTION_NAME).exists():
            write_description(directory, namespace, description)
    except CacheDirectoryError:
        raise
    except OSError as exc:
        raise CacheDirectoryError(
            f"the cache folder {str(directory)!r} can't be used ({exc.strerror or exc}): name a folder that you may "
            "write to, or leave out paged_ssd_cache_dir to cache in RAM only"
        ) from exc


def refuse_open_folders(directory: Path, namespace: NamespaceHash) -> None:
    """Check that only their owner may write to the cache's folder and to a namespace's, as far as they are there.

    Raises:
        CacheDirectoryError: others could plant blocks in them, or they can't be looked at.
    """
    for path in (directory, namespace_folder(directory, namespace)):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise CacheDirectoryError(f"the cache folder {str(path)!r} can't be read ({exc.strerror or exc})") from exc
        if mode & 0o022:
            raise CacheDirectoryError(
                f"the cache folder {str(path)!r} has mode {mode & 0o7777:o}: others could plant blocks in it. "
                f"Use a folder of your own, or run: chmod go-w {str(path)!r}"
            )


def write_description(directory: Path, namespace: NamespaceHash, description: Mapping[str, Any]) -> None:
    """Say in a namespace's folder what it stands for, for people.

    Raises:
        OSError: that isn't possible; the text that was there stays.
    """
    path = namespace_folder(directory, namespace) / DESCRIPTION_NAME
    owner = new_owner()
    temporary = path.with_name(f"{DESCRIPTION_NAME}.{owner}.tmp")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        retire_owner(owner)


def read_description(directory: Path, namespace: NamespaceHash) -> dict[str, Any]:
    """What a namespace's folder says that it stands for; empty if it doesn't say."""
    path = namespace_folder(directory, namespace) / DESCRIPTION_NAME
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) else {}


def abandoned_descriptions(folder: Path) -> Iterator[Path]:
    """What processes that were killed in `write_description` left in a namespace's folder."""
    for path in folder.glob(f"{DESCRIPTION_NAME}.*.tmp"):
        match = _DESCRIPTION_TEMPORARY_NAME.fullmatch(path.name)
        if match is not None and is_abandoned(match["owner"], path):
            yield path


def scan_directory(directory: Path) -> DirectoryFiles:
    """Find every block and every temporary file by the headers and names of the files, with a progress bar.

    When a block was last used went with the index; when it was written is the next best. No parent is stamped older
    than its descendants, so leaves still leave first. What isn't a block of this version is left alone.
    """
    paths = list(block_paths(directory))
    found = {}
    for path in tqdm(paths, desc="Rebuilding the cache index", unit="block", disable=None):
        entry = _entry_from_file(path)
        if entry is not None:
            found[entry.namespace, entry.block_hash] = entry
    if len(found) < len(paths):
        logger.warning("%d files in %s are not blocks and left alone", len(paths) - len(found), directory)
    return DirectoryFiles(_stamped(found.values()), list(_temporary_files(directory)))


def block_paths(directory: Path) -> Iterator[Path]:
    """All files that are named and placed as a block's file would be, whatever is in them."""
    return (path for path in _paths_like(directory, f"*{BLOCK_SUFFIX}") if block_key(path) is not None)


def temporary_paths(directory: Path) -> Iterator[tuple[Path, BlockHash, str]]:
    """All temporary files, each with the block that was being written, and by whom."""
    for path in _paths_like(directory, "*.tmp"):
        match = _TEMPORARY_NAME.fullmatch(path.name)
        if match is not None:
            yield path, BlockHash(bytes.fromhex(match["hash"])), match["owner"]


def block_key(path: Path) -> tuple[NamespaceHash, BlockHash] | None:
    """Namespace and hash of the block whose file is at `path`; None if no block's file would be there."""
    if path.suffix != BLOCK_SUFFIX or not _HASH_NAME.fullmatch(path.stem) or path.parts[-2] != path.stem[:2]:
        return None
    return NamespaceHash(bytes.fromhex(path.parts[-3])), BlockHash(bytes.fromhex(path.stem))


def _paths_like(directory: Path, pattern: str) -> Iterator[Path]:
    return (path for path in directory.glob(f"*/??/{pattern}") if _HASH_NAME.fullmatch(path.parts[-3]))


def _entry_from_file(path: Path) -> IndexEntry | None:
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            identity = read_block_identity(file)
    except OSError as exc:
        logger.debug("%s: %s", path, exc)
        return None
    if (identity.namespace, identity.block_hash) != block_key(path):
        return None
    return IndexEntry(
        identity.namespace,
        identity.block_hash,
        identity.parent_hash,
        identity.depth,
        size_bytes=status.st_size,
        created_s=status.st_mtime,
        last_used=0,
        part=identity.part,
    )


def _stamped(entries: Iterable[IndexEntry]) -> list[IndexEntry]:
    deepest_first = sorted(entries, key=lambda entry: -entry.depth)
    used_s = {(entry.namespace, entry.block_hash): entry.created_s for entry in deepest_first}
    for entry in deepest_first:
        if entry.parent_hash is not None and (entry.namespace, entry.parent_hash) in used_s:
            parent = (entry.namespace, entry.parent_hash)
            used_s[parent] = max(used_s[parent], used_s[entry.namespace, entry.block_hash])
    rank = {seconds: number for number, seconds in enumerate(sorted(set(used_s.values())), start=1)}
    return [
        replace(entry, last_used=rank[used_s[entry.namespace, entry.block_hash]]) for entry in reversed(deepest_first)
    ]


def _temporary_files(directory: Path) -> Iterator[UnpublishedFile]:
    for path, block_hash, owner in temporary_paths(directory):
        # Its header may not be written yet; that it could be a checkpoint matters only until it is gone or published.
        with contextlib.suppress(FileNotFoundError):
            yield UnpublishedFile(NamespaceHash(bytes.fromhex(path.parts[-3])), block_hash, owner, path.stat().st_size)
