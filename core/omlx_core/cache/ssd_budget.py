"""Keeps what is in the cold tier's folder, and what is written to it, within their limits, over all processes.

Bytes are reserved before a temporary file is written, and an evicted block counts until its file is gone: what the
index adds up is therefore never less than what is on disk. Counted are the files' lengths; the index itself and the
file system's rounding to its own blocks come on top.

Checkpoints have a share of the budget. One that would exceed it makes room among the checkpoints alone, so that a long
prompt's can't push out the rows of others; within the share all leave in one order. No block follows a checkpoint, so
none is left without its parent either way.

Bytes written are entered into the index with the reservation, so that processes which write at the same time can't
exceed the day's budget together; a write that fails then counts as if it had been done.

All of it belongs to one thread, that of its index.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import CHECKPOINT, Part
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_layout import EVICTED, IndexEntry, UnpublishedFile, block_path, temporary_path
from omlx_core.cache.ssd_owner import is_abandoned, new_owner, retire_owner
from omlx_core.cache.ssd_stats import StatsKeeper

_FILES_PER_TRANSACTION = 1000
_NOTHING: Mapping[BlockHash, BlockHash | None] = {}


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """What the cold tier may take.

    Attributes:
        max_size_bytes: most bytes of files in the folder.
        min_free_bytes: while less than this would be free on the volume, nothing is written.
        write_budget_bytes: most bytes written to the folder in 24 hours; None is no limit.
        checkpoint_share: the largest part of `max_size_bytes` that checkpoints may take, in (0, 1].
    """

    max_size_bytes: int
    min_free_bytes: int = 0
    write_budget_bytes: int | None = None
    checkpoint_share: float = 1.0

    @property
    def max_checkpoint_bytes(self) -> int:
        """Most bytes of checkpoints in the folder."""
        return int(self.max_size_bytes * self.checkpoint_share)


class SaveOutcome(enum.Enum):
    """How saving a block ended."""

    WRITTEN = enum.auto()
    ALREADY_THERE = enum.auto()
    NO_PARENT = enum.auto()
    """The block before it isn't published."""
    TOO_LARGE = enum.auto()
    """The block and those before it exceed the folder's budget, or a checkpoint the share for these."""
    WRITE_BUDGET = enum.auto()
    """The last 24 hours' writing would exceed its budget."""
    FREE_SPACE = enum.auto()
    """Too little space is free on the volume."""
    FAILED = enum.auto()
    """The disk or the index failed."""

    @property
    def is_on_disk(self) -> bool:
        """Whether the block is published."""
        return self in (SaveOutcome.WRITTEN, SaveOutcome.ALREADY_THERE)


class DiskBudget:
    """Reserves, evicts and cleans up in one folder, for one writer.

    Args:
        directory: the cache's folder.
        index: its index.
        limits: what it may take.
        stats: counts what it evicts.

    Attributes:
        owner: marks the files that this writer is writing.
    """

    def __init__(self, directory: Path, index: SSDIndex, limits: DiskLimits, stats: StatsKeeper) -> None:
        self._directory = directory
        self._index = index
        self._limits = limits
        self.owner = new_owner()
        self._stats = stats

    def close(self) -> None:
        """Nothing is being written any more: whatever this writer left may be removed."""
        retire_owner(self.owner)

    def reserve(
        self,
        namespace: NamespaceHash,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        size_bytes: int,
        part: Part,
        *,
        in_hand: Mapping[BlockHash, BlockHash | None] = _NOTHING,
    ) -> SaveOutcome | None:
        """Make room for a file that is about to be written to `temporary_path`, and enter it as written.

        Blocks leave in order of their last use, leaves before their parents; those before the new block, and before
        others in hand, stay. For a checkpoint beyond the checkpoints' share, other checkpoints leave first.

        Args:
            namespace: the block's.
            block_hash: the block.
            parent_hash: the block before it, published or in hand.
            size_bytes: the file's size.
            part: what of a block it is.
            in_hand: the blocks that this writer has reserved room for, and neither published nor released yet, each
                with the block before it.

        Returns:
            None, or why the file may not be written; nothing is evicted then.

        Raises:
            OSError: an evicted file can't be removed.
        """
        # One call of a microsecond or two, next to the fsyncs of a write.
        if self._limits.min_free_bytes and free_space_bytes(self._directory) - size_bytes < self._limits.min_free_bytes:
            return SaveOutcome.FREE_SPACE
        while True:
            with self._index.transaction():
                parent = None if parent_hash is None else self._index.get(namespace, parent_hash)
                if parent is None and parent_hash is not None and parent_hash not in in_hand:
                    return SaveOutcome.NO_PARENT
                if self._exceeds_write_budget(size_bytes):
                    return SaveOutcome.WRITE_BUDGET
                has_more = self._remove_leftovers(in_hand)
                victims = self._victims(size_bytes, part, [parent_hash, *in_hand.values()], namespace)
                if victims == []:
                    self._index.add_unpublished(UnpublishedFile(namespace, block_hash, self.owner, size_bytes, part))
                    self._index.record_write(size_bytes)
                    return None
                if not has_more:
                    if victims is None:
                        return SaveOutcome.TOO_LARGE
                    self._evict(victims)

    def release(self, namespace: NamespaceHash, block_hash: BlockHash, *, is_renamed: bool = False) -> None:
        """Remove a file that isn't to be published, if it is still there, and its reservation.

        Args:
            namespace: the block's.
            block_hash: the block.
            is_renamed: the file has its final name already.

        Raises:
            OSError: neither could be done; the next process will.
        """
        with self._index.transaction():
            temporary_path(self._directory, namespace, block_hash, self.owner).unlink(missing_ok=True)
            if is_renamed:
                self._unlink_unlisted(namespace, block_hash)
            self._index.remove_unpublished(namespace, block_hash, self.owner)

    def trim(self) -> None:
        """Remove what earlier processes left, and evict down to the budget and the checkpoints' share of it.

        Raises:
            OSError: an evicted file can't be removed.
        """
        while True:
            with self._index.transaction():
                if self._remove_leftovers():
                    continue
                totals = self._index.current_totals()
                victims = self._index.least_recently_used(
                    totals.checkpoint_bytes - self._limits.max_checkpoint_bytes, only_checkpoints=True
                ) or self._index.least_recently_used(totals.size_bytes - self._limits.max_size_bytes)
                if not victims:
                    return
                self._evict(victims)

    def withdraw(self, entries: Iterable[IndexEntry]) -> None:
        """Take blocks out of the index; `trim` then removes their files. Inside a transaction, leaves first."""
        for entry in entries:
            self._index.remove(entry.namespace, entry.block_hash)
            # It may wait for its removal already, and have been published anew since.
            self._index.remove_unpublished(entry.namespace, entry.block_hash, EVICTED)
            self._index.add_unpublished(
                UnpublishedFile(entry.namespace, entry.block_hash, EVICTED, entry.size_bytes, entry.part)
            )

    def _exceeds_write_budget(self, size_bytes: int) -> bool:
        if self._limits.write_budget_bytes is None:
            return False
        self._index.settle_ledger()
        return self._index.current_totals().bytes_written_last_day + size_bytes > self._limits.write_budget_bytes

    def _remove_leftovers(self, in_hand: Collection[BlockHash] = ()) -> bool:
        """Unlink evicted and abandoned files; whether there are more. Inside a transaction.

        The rows of evicted blocks were committed as gone before: no reader that starts now looks for them. Under the
        write lock nobody publishes one of them anew between the check and the unlink.
        """
        num_removed = 0
        for file in self._index.unpublished():
            temporary = None
            if file.owner != EVICTED:
                temporary = temporary_path(self._directory, file.namespace, file.block_hash, file.owner)
                # Others of its own can only be there because `release` failed.
                is_in_use = file.block_hash in in_hand if file.owner == self.owner else None
                if not is_abandoned(file.owner, temporary) if is_in_use is None else is_in_use:
                    continue
            # Others wait for this transaction meanwhile.
            if num_removed == _FILES_PER_TRANSACTION:
                return True
            num_removed += 1
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            # Also after a crash between the rename and the commit of its row.
            self._unlink_unlisted(file.namespace, file.block_hash)
            self._index.remove_unpublished(file.namespace, file.block_hash, file.owner)
        return False

    def _unlink_unlisted(self, namespace: NamespaceHash, block_hash: BlockHash) -> None:
        """Remove a block's file, unless the block is published. Inside a transaction."""
        if self._index.get(namespace, block_hash) is None:
            block_path(self._directory, namespace, block_hash).unlink(missing_ok=True)

    def _victims(
        self, size_bytes: int, part: Part, needed: Iterable[BlockHash | None], namespace: NamespaceHash
    ) -> list[IndexEntry] | None:
        """What must leave for a new file, in that order; None if all that may leave is not enough.

        Args:
            size_bytes: the file's size.
            part: what of a block it is.
            needed: blocks that must stay, with all before them, as far as they are published.
            namespace: that of these.
        """
        totals = self._index.current_totals()
        excess_bytes = totals.size_bytes + size_bytes - self._limits.max_size_bytes
        checkpoints: list[IndexEntry] | None = []
        if part == CHECKPOINT:
            checkpoints = self._index.least_recently_used(
                totals.checkpoint_bytes + size_bytes - self._limits.max_checkpoint_bytes, only_checkpoints=True
            )
        if checkpoints is None:
            return None
        excess_bytes -= sum(entry.size_bytes for entry in checkpoints)
        if excess_bytes <= 0:
            return checkpoints
        keep = {(entry.namespace, entry.block_hash) for entry in checkpoints}
        for block_hash in set(needed):
            if block_hash is not None:
                keep |= self._index.ancestors(self._index.get(namespace, block_hash))
        others = self._index.least_recently_used(excess_bytes, keep)
        return None if others is None else [*checkpoints, *others]

    def _evict(self, victims: Collection[IndexEntry]) -> None:
        """Take blocks out of the index; `_remove_leftovers` takes the files, in the next transaction."""
        self.withdraw(victims)
        self._stats.count_evicted(len(victims), sum(entry.size_bytes for entry in victims))


def free_space_bytes(directory: Path) -> int:
    """Space on a folder's volume that this user may fill.

    Raises:
        OSError: the folder is gone.
    """
    volume = os.statvfs(directory)
    return volume.f_bavail * volume.f_frsize
