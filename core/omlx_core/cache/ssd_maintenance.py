"""The broom of the cold tier's folder: repairs what `ssd_check` finds, lists blocks, clears them.

All of it works as another process would, on connections of its own, so it may run beside everything else. Repair judges
each finding once more under the folder's write lock before it acts.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.ssd_budget import DiskBudget, DiskLimits
from omlx_core.cache.ssd_check import (
    CheckReport,
    Examination,
    Finding,
    FindingKind,
    judge_row,
    judge_unlisted,
    read_verified,
)
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_index_view import read_snapshot
from omlx_core.cache.ssd_layout import IndexEntry, block_key, block_path
from omlx_core.cache.ssd_stats import StatsKeeper
from omlx_core.errors import BlockFileError


def check(directory: Path, limits: DiskLimits, *, repair: bool = False) -> CheckReport:
    """Judge everything in a cache folder, and put right what can be; see `PagedSSDCacheManager.check`.

    Raises:
        OSError: the folder can't be read, or in repairing, not written.
    """
    report = Examination(directory, limits).run()
    if not repair or report.is_clean:
        return report
    repaired: list[Finding] = []
    if report.findings[0].kind is FindingKind.DAMAGED_INDEX:
        _rebuild_index(directory, limits)
        repaired.append(replace(report.findings[0], is_repaired=True))
        report = Examination(directory, limits).run()
    with open_for_writing(directory, limits) as (index, budget):
        repaired += _Repair(directory, index, budget).run(report.findings)
        totals = index.totals()
    return CheckReport(totals.num_blocks, totals.size_bytes, tuple(repaired))


def entries(directory: Path, namespace: NamespaceHash | None = None) -> Iterator[IndexEntry]:
    """The published blocks of a cache folder, in the order in which they would be evicted.

    Raises:
        BlockFileError: the index can't be read.
    """
    with read_snapshot(directory) as view:
        yield from view.entries(namespace)


def clear(directory: Path, limits: DiskLimits, *, namespace: NamespaceHash | None, older_than_s: float | None) -> int:
    """Remove blocks from a cache folder, children before their parents; see `PagedSSDCacheManager.clear`.

    Raises:
        OSError: the folder can't be written.
    """
    latest_s = None if older_than_s is None else time.time() - older_than_s
    with open_for_writing(directory, limits) as (index, budget):
        with index.transaction():
            victims = _older_than(latest_s, index.entries(namespace))
            budget.withdraw(victims)
        budget.trim()
    return len(victims)


def _older_than(latest_s: float | None, candidates: Iterable[IndexEntry]) -> list[IndexEntry]:
    victims = []
    kept: set[tuple[NamespaceHash, BlockHash | None]] = set()
    for entry in sorted(candidates, key=lambda entry: -entry.depth):
        if (entry.namespace, entry.block_hash) in kept or (latest_s is not None and entry.created_s > latest_s):
            kept.add((entry.namespace, entry.parent_hash))
        else:
            victims.append(entry)
    return victims


@contextlib.contextmanager
def open_for_writing(directory: Path, limits: DiskLimits) -> Iterator[tuple[SSDIndex, DiskBudget]]:
    """The index of a cache folder and a writer's budget, for this thread and as long as the context lasts.

    Raises:
        CacheDirectoryError: the index can't be opened.
    """
    index = SSDIndex(directory)
    budget = DiskBudget(directory, index, limits, StatsKeeper())
    try:
        yield index, budget
    finally:
        budget.close()
        index.close()


def _rebuild_index(directory: Path, limits: DiskLimits) -> None:
    # Opening alone has made it anew, if the damage can be seen at a glance.
    with open_for_writing(directory, limits) as (index, _):
        try:
            with index.transaction():
                is_damaged = index.damage() is not None
        except BlockFileError:
            is_damaged = True
        if is_damaged:
            index.give_up_damaged()
            with index.transaction():
                pass


class _Repair:
    """Puts findings right, one transaction each."""

    def __init__(self, directory: Path, index: SSDIndex, budget: DiskBudget) -> None:
        self._directory = directory
        self._index = index
        self._budget = budget

    def run(self, findings: Iterable[Finding]) -> list[Finding]:
        ordered = list(findings)
        self._budget.trim()
        for finding in ordered:
            with self._index.transaction():
                self._repair(finding)
        self._budget.trim()
        with self._index.transaction():
            remaining = {
                FindingKind.MISSING_PARENT: self._paths(self._index.without_parent()),
                FindingKind.WRONG_ORDER: self._paths(self._index.outliving_parent()),
            }
        return [
            replace(
                finding,
                is_repaired=finding.kind is not FindingKind.UNREADABLE_FILE
                and finding.path not in remaining.get(finding.kind, ()),
            )
            for finding in ordered
        ]

    def _repair(self, finding: Finding) -> None:
        path = finding.path
        key = block_key(path)
        if finding.kind is FindingKind.PERMISSIONS:
            with contextlib.suppress(FileNotFoundError):
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o077)
        elif finding.kind is FindingKind.WRONG_TOTALS:
            self._index.recount()
        elif key is None:
            if finding.kind is FindingKind.STRAY_FILE:
                path.unlink(missing_ok=True)
        elif finding.kind is FindingKind.WRONG_ORDER:
            self._index.stamp(key[0], [key[1]])
        elif finding.kind in (FindingKind.MISSING_FILE, FindingKind.CORRUPT_FILE, FindingKind.WRONG_ROW):
            row = self._index.get(*key)
            if row is not None:
                self._repair_row(row, path)
        elif finding.kind in (FindingKind.UNLISTED_BLOCK, FindingKind.STRAY_FILE):
            is_unlisted = self._index.get(*key) is None and not self._index.is_unpublished(*key)
            finding_now = judge_unlisted(path) if is_unlisted and path.exists() else None
            if finding_now is not None and finding_now.kind is FindingKind.STRAY_FILE:
                path.unlink()
            elif finding_now is not None:
                self._enter(path, created_s=path.stat().st_mtime)

    def _repair_row(self, row: IndexEntry, path: Path) -> None:
        finding = judge_row(self._directory, row)
        if finding is None or finding.kind is FindingKind.UNREADABLE_FILE:
            return
        if finding.kind is FindingKind.WRONG_ROW:
            self._index.remove(row.namespace, row.block_hash)
            self._enter(path, created_s=row.created_s)
        else:
            self._budget.withdraw([row])

    def _enter(self, path: Path, *, created_s: float) -> None:
        """Publish a valid file as if it had just been written; its parent, if entered later, is then newer still."""
        identity, size_bytes = read_verified(path)
        namespace, parent_hash = identity.namespace, identity.parent_hash
        parent = None if parent_hash is None else self._index.get(namespace, parent_hash)
        last_used = self._index.stamp_for_child(parent, namespace)
        self._index.insert(
            IndexEntry(
                namespace=namespace,
                block_hash=identity.block_hash,
                parent_hash=parent_hash,
                depth=identity.depth,
                size_bytes=size_bytes,
                created_s=created_s,
                last_used=last_used,
                part=identity.part,
            )
        )

    def _paths(self, rows: Iterable[IndexEntry]) -> set[Path]:
        return {block_path(self._directory, row.namespace, row.block_hash) for row in rows}
