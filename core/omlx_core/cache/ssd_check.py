"""The judge of the cold tier's folder: everything in it is checked, to the last byte.

Looking changes nothing and takes no lock, so it works on a folder that can't be written, and beside processes that
write. What looks wrong is looked at again: a row that names a missing file is a finding only if the same row is still
there afterwards, because eviction takes the row first; a file without a row only if it was there before and after the
index knew nothing of it, because a file that is about to be published or removed is known as unpublished.
"""

from __future__ import annotations

import contextlib
import enum
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from omlx_core.cache.block_file import read_block
from omlx_core.cache.block_header import BlockIdentity
from omlx_core.cache.ssd_budget import DiskLimits
from omlx_core.cache.ssd_index_view import INDEX_NAME, IndexView, is_damage, read_snapshot
from omlx_core.cache.ssd_layout import (
    IndexEntry,
    abandoned_descriptions,
    block_key,
    block_path,
    block_paths,
    temporary_paths,
)
from omlx_core.cache.ssd_owner import is_abandoned
from omlx_core.cache.ssd_publisher import file_version
from omlx_core.errors import BlockFileError, CorruptBlockError


class FindingKind(enum.StrEnum):
    """What can be wrong."""

    DAMAGED_INDEX = "damaged index"
    """SQLite can't read its own structures. Repair makes the index anew from the files."""
    WRONG_TOTALS = "wrong totals"
    """The totals that are kept differ from the sums of the rows. Repair counts again."""
    STRAY_FILE = "stray file"
    """A temporary file of nobody's, or a damaged file without a row. Repair removes it."""
    UNLISTED_BLOCK = "unlisted block"
    """A valid block without a row. Repair enters it."""
    CORRUPT_FILE = "corrupt file"
    """The file isn't what was written under that name. Repair removes it and its row."""
    MISSING_FILE = "missing file"
    """A row without its file. Repair removes the row."""
    WRONG_ROW = "wrong row"
    """The row differs from its valid file. Repair corrects the row."""
    UNREADABLE_FILE = "unreadable file"
    """The file can't be read, or is none of this version: neither proves anything, so repair leaves it alone."""
    MISSING_PARENT = "missing parent"
    """The block before it isn't published. It can't be reached until that one is computed again, or it is evicted in
    its turn; it is valid, so repair leaves it alone."""
    WRONG_ORDER = "wrong order"
    """Eviction would take the block before this one first. Repair puts both last."""
    PERMISSIONS = "permissions"
    """Others than its owner have access. Repair takes it from them."""
    OVER_BUDGET = "over budget"
    """More bytes than `max_size_bytes`, or more of checkpoints than their share. Repair evicts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what it is.
        path: the file or folder in question.
        detail: more about it.
        is_repaired: whether it was put right.
    """

    kind: FindingKind
    path: Path
    detail: str
    is_repaired: bool = False


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The verdict on a cache folder.

    Attributes:
        num_blocks: published blocks, over all namespaces.
        size_bytes: bytes that count towards the budget.
        findings: what was found to be wrong, by kind.
    """

    num_blocks: int
    size_bytes: int
    findings: tuple[Finding, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was wrong. After a repair, check again."""
        return not self.findings


class Examination:
    """Looks at everything in a cache folder, once.

    Args:
        directory: the folder.
        limits: what it may take.
    """

    def __init__(self, directory: Path, limits: DiskLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._findings: list[Finding] = []

    def run(self) -> CheckReport:
        """Read everything.

        Raises:
            OSError: the folder can't be read.
        """
        try:
            with read_snapshot(self._directory) as view:
                damage = view.damage()
                rows = list(view.entries())
                totals = view.current_totals()
                self._examine_sums(view)
        except BlockFileError as exc:
            # A table or a column that isn't there is damage too.
            cause = exc.__cause__
            if not is_damage(cause) and getattr(cause, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR:
                raise
            damage, rows, totals = str(exc), [], None
        if damage is not None or totals is None:
            # What such an index says is no measure for anything else.
            finding = Finding(FindingKind.DAMAGED_INDEX, self._directory / INDEX_NAME, str(damage))
            return CheckReport(0, 0, (finding,))
        known = set()
        for row in tqdm(rows, desc="Checking the cache", unit="block", disable=None):
            known.add(block_path(self._directory, row.namespace, row.block_hash))
            self._examine_row(row)
        for path in block_paths(self._directory):
            if path not in known:
                self._examine_unlisted(path)
        self._examine_temporaries()
        self._examine_permissions()
        findings = sorted(self._findings, key=lambda finding: (list(FindingKind).index(finding.kind), finding.path))
        return CheckReport(totals.num_blocks, totals.size_bytes, tuple(findings))

    def _find(self, kind: FindingKind, path: Path, detail: str) -> None:
        self._findings.append(Finding(kind, path, detail))

    def _examine_sums(self, view: IndexView) -> None:
        path = self._directory / INDEX_NAME
        totals, counted, limits = view.current_totals(), view.counted_totals(), self._limits
        noted = totals.num_blocks, totals.size_bytes, totals.checkpoint_bytes
        if noted != counted:
            detail = f"blocks, bytes, bytes of checkpoints: {noted} are noted, {counted} are listed"
            self._find(FindingKind.WRONG_TOTALS, path, detail)
        _, size_bytes, checkpoint_bytes = counted
        if size_bytes > limits.max_size_bytes:
            self._find(FindingKind.OVER_BUDGET, path, f"{size_bytes} bytes of {limits.max_size_bytes}")
        if checkpoint_bytes > limits.max_checkpoint_bytes:
            detail = f"{checkpoint_bytes} bytes of checkpoints of {limits.max_checkpoint_bytes}"
            self._find(FindingKind.OVER_BUDGET, path, detail)
        for entry in view.without_parent():
            path = block_path(self._directory, entry.namespace, entry.block_hash)
            self._find(FindingKind.MISSING_PARENT, path, f"its parent is {(entry.parent_hash or b'').hex()}")
        for entry in view.outliving_parent():
            path = block_path(self._directory, entry.namespace, entry.block_hash)
            self._find(FindingKind.WRONG_ORDER, path, f"used at {entry.last_used}, at depth {entry.depth}")

    def _examine_row(self, row: IndexEntry) -> None:
        while (finding := judge_row(self._directory, row)) is not None:
            with read_snapshot(self._directory) as view:
                current = view.get(row.namespace, row.block_hash)
            if current is None:
                return
            if replace(current, last_used=row.last_used) == row:
                self._findings.append(finding)
                return
            row = current  # evicted and published anew

    def _examine_unlisted(self, path: Path) -> None:
        key = block_key(path)
        version = file_version(path)
        if key is None or version is None:
            return
        with read_snapshot(self._directory) as view:
            if view.get(*key) is not None or view.is_unpublished(*key):
                return
        finding = judge_unlisted(path)
        if finding is not None and file_version(path) == version:
            self._findings.append(finding)

    def _examine_temporaries(self) -> None:
        for path, _, owner in temporary_paths(self._directory):
            if is_abandoned(owner, path) and path.exists():
                self._find(FindingKind.STRAY_FILE, path, "left by a process that is gone")
        for folder in _namespace_folders(self._directory):
            for path in abandoned_descriptions(folder):
                self._find(FindingKind.STRAY_FILE, path, "left by a process that is gone")

    def _examine_permissions(self) -> None:
        for path in _own_paths(self._directory):
            with contextlib.suppress(FileNotFoundError):
                mode = stat.S_IMODE(path.stat().st_mode)
                if mode & 0o077:
                    self._find(FindingKind.PERMISSIONS, path, f"mode {mode:o}")


def judge_row(directory: Path, row: IndexEntry) -> Finding | None:
    """Compare a row with its file, to the last byte."""
    path = block_path(directory, row.namespace, row.block_hash)
    try:
        identity, size_bytes = read_verified(path)
    except FileNotFoundError:
        return Finding(FindingKind.MISSING_FILE, path, "no such file")
    except CorruptBlockError as exc:
        return Finding(FindingKind.CORRUPT_FILE, path, str(exc))
    except OSError as exc:
        return Finding(FindingKind.UNREADABLE_FILE, path, str(exc))
    in_file = size_bytes, identity.parent_hash, identity.depth, identity.part
    in_row = row.size_bytes, row.parent_hash, row.depth, row.part
    if in_file != in_row:
        detail = f"size, parent, depth, part: {in_file} in the file, {in_row} in the row"
        return Finding(FindingKind.WRONG_ROW, path, detail)
    return None


def judge_unlisted(path: Path) -> Finding | None:
    """What a file without a row is; None if it isn't this version's business."""
    try:
        identity, _ = read_verified(path)
    except CorruptBlockError as exc:
        return Finding(FindingKind.STRAY_FILE, path, str(exc))
    except OSError:
        return None
    return Finding(FindingKind.UNLISTED_BLOCK, path, f"depth {identity.depth}")


def read_verified(path: Path) -> tuple[BlockIdentity, int]:
    """Verify the block that should be at `path`; its identity and the size of its file in bytes.

    Raises:
        CorruptBlockError: it isn't what was written under that name.
        OSError: it can't be read, or is no block of this version.
    """
    with open(path, "rb", buffering=0) as file:
        identity, _ = read_block(file)
        size_bytes = file.tell()
    if (identity.namespace, identity.block_hash) != block_key(path):
        raise CorruptBlockError(f"the file holds block {identity.block_hash.hex()}")
    return identity, size_bytes


def _namespace_folders(directory: Path) -> Iterator[Path]:
    return directory.glob("[0-9a-f]" * 64)


def _own_paths(directory: Path) -> Iterator[Path]:
    """The folder, and all folders and files in it that this project made."""
    yield directory
    yield from directory.glob("index.*")
    for folder in _namespace_folders(directory):
        yield folder
        yield from folder.glob("namespace.json*")
        yield from folder.glob("[0-9a-f][0-9a-f]")
    yield from block_paths(directory)
    for path, _, _ in temporary_paths(directory):
        yield path
