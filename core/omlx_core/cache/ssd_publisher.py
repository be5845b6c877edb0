"""Writes blocks into the cold tier's folder, several at a time, and takes damaged ones out.

A block is published by making room, temporary file, fsync, rename, fsync of the folder, row in the index. Several
blocks take each of these steps together: their files are written and synced side by side, their rows appear at once.
One whose file fails loses itself and those that follow it, no others. Eviction goes the other way: the row, then the
file. A process that is killed in between leaves at most files that the index knows as unpublished, and the next process
to write or open removes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omlx_core.cache.block_file import EncodedBlock, encode_block, sync_directory, write_block_file
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.block_header import BlockIdentity, encode_token_ids
from omlx_core.cache.file_threads import FileThreads
from omlx_core.cache.parts import ROWS, Part
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_budget import DiskBudget, SaveOutcome
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_layout import (
    IndexEntry,
    block_path,
    make_folder,
    namespace_folder,
    read_description,
    temporary_path,
    write_description,
)

logger = logging.getLogger(__name__)

SIZE_KEY = "bytes_per_token"  # in namespace.json: bytes of payload

# Enough to keep a disk busy while one of them waits for it; more of them gain nothing.
_NUM_FILE_THREADS = 4

FileVersion = tuple[int, int, int]
"""What tells a file from one written later under its name: device, inode, time of change."""


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to be saved.

    Attributes:
        block_hash: its name.
        parent_hash: the block before it; None for the first of a chain.
        token_ids: its tokens.
        payload: its tensors.
        part: what of a block it is.
        replaces_file: publish it even if there is one, whose file can't be read.
    """

    block_hash: BlockHash
    parent_hash: BlockHash | None
    token_ids: Sequence[int]
    payload: BlockPayload
    part: Part = ROWS
    replaces_file: bool = False


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How saving a block ended.

    Attributes:
        outcome: whether it is on disk, or why not.
        size_bytes: size of its file; 0 if it never came to that.
        error: what failed, if something did; nothing is left of the block then.
    """

    outcome: SaveOutcome
    size_bytes: int = 0
    error: Exception | None = None


@dataclass(slots=True)
class _Draft:
    """A block on its way to the disk, for which the way has ended once there is a result."""

    block: NewBlock
    result: SaveResult | None = None
    depth: int = 0
    encoded: EncodedBlock | None = None
    is_reserved: bool = False
    is_renamed: bool = False

    @property
    def size_bytes(self) -> int:
        return 0 if self.encoded is None else self.encoded.size_bytes

    def end(self, outcome: SaveOutcome) -> None:
        self.result = SaveResult(outcome, self.size_bytes)

    def fail(self, error: Exception) -> None:
        self.result = SaveResult(SaveOutcome.FAILED, self.size_bytes, error)


class BlockPublisher:
    """Publishes the blocks of one namespace. Belongs to one thread, that of its index.

    Args:
        directory: the cache's folder.
        namespace: the root of the blocks' chains.
        description: what it stands for.
        index: the folder's index.
        budget: makes room.
    """

    def __init__(
        self,
        directory: Path,
        namespace: NamespaceHash,
        description: Mapping[str, Any],
        index: SSDIndex,
        budget: DiskBudget,
    ) -> None:
        self._directory = directory
        self._namespace = namespace
        self._description = description
        self._is_size_described = False
        self._index = index
        self._budget = budget
        self._threads = FileThreads(_NUM_FILE_THREADS)

    def save(self, blocks: Sequence[NewBlock]) -> list[SaveResult]:
        """Write blocks and make them durable, those aside that are there already.

        Args:
            blocks: no two of one hash, and none before its parent.

        Returns:
            How each of them ended. An error of the disk or the index is a result too.
        """
        drafts = [_Draft(block) for block in blocks]
        waiting = drafts
        while waiting:
            self._save_together(waiting)
            # Those for which there was no room beside the others: these may be evicted now, and aren't in the way.
            waiting = [draft for draft in waiting if draft.result is None]
        if not self._is_size_described:
            self._describe_size(drafts)
        return [draft.result for draft in drafts if draft.result is not None]

    def drop(self, block_hash: BlockHash, version: FileVersion | None) -> bool:
        """Take out a block whose file is missing (`version` None) or corrupt, unless it was replaced meanwhile.

        Returns:
            Whether it was published.

        Raises:
            OSError: the disk or the index failed.
        """
        path = block_path(self._directory, self._namespace, block_hash)
        with self._index.transaction():
            entry = self._index.get(self._namespace, block_hash)
            if entry is None or file_version(path) != version:
                return False
            self._budget.withdraw([entry])
        self._budget.trim()
        return True

    def stamp(self, block_hashes: Sequence[BlockHash]) -> None:
        """Mark blocks and all blocks before them as just used, alike.

        Raises:
            BlockFileError: the index failed.
        """
        with self._index.transaction():
            self._index.stamp(self._namespace, block_hashes)

    def clean_up(self) -> None:
        """Remove what a smaller budget or an earlier crash left to remove.

        Raises:
            OSError: the disk or the index failed.
        """
        self._budget.trim()

    def sync(self) -> None:
        """Make everything published so far survive a power cut.

        Raises:
            BlockFileError: the index failed.
        """
        self._index.checkpoint()

    def close(self) -> None:
        """Close the index and the budget."""
        self._threads.close()
        self._index.close()
        self._budget.close()

    def _save_together(self, waiting: Sequence[_Draft]) -> None:
        """Take the first of some blocks, and as many more as there is room for at once, all the way."""
        reserved: Sequence[_Draft] = waiting
        try:
            self._admit(waiting)
            reserved = self._reserve([draft for draft in waiting if draft.result is None])
            self._write(reserved)
            self._publish([draft for draft in reserved if draft.result is None])
        except Exception as exc:
            for draft in reserved:
                if draft.result is None:
                    draft.fail(exc)
        finally:
            for draft in reserved:
                if draft.is_reserved and (draft.result is None or draft.result.outcome is not SaveOutcome.WRITTEN):
                    with contextlib.suppress(OSError):  # then the next reservation does it
                        self._budget.release(self._namespace, draft.block.block_hash, is_renamed=draft.is_renamed)

    def _admit(self, drafts: Sequence[_Draft]) -> None:
        """Sort out what is there already, or would have no parent; say how deep the others are."""
        depths: dict[BlockHash, int] = {}
        with self._index.transaction():
            for draft in drafts:
                block = draft.block
                if self._is_published(block):
                    self._index.stamp(self._namespace, [block.block_hash])
                    draft.end(SaveOutcome.ALREADY_THERE)
                    continue
                if block.parent_hash is not None and block.parent_hash in depths:
                    draft.depth = depths[block.parent_hash] + 1
                else:
                    parent = self._parent(block)
                    if parent is None and block.parent_hash is not None:
                        draft.end(SaveOutcome.NO_PARENT)
                        continue
                    # The chain in hand is in use: nobody should evict it while its next block is being written.
                    self._index.stamp_for_child(parent, self._namespace)
                    draft.depth = 0 if parent is None else parent.depth + 1
                depths[block.block_hash] = draft.depth

    def _reserve(self, drafts: Sequence[_Draft]) -> list[_Draft]:
        """Lay out files and make room for them; those that got it.

        A block that is too large beside the others in hand ends this, and is left without a result like all after it.
        """
        reserved: list[_Draft] = []
        in_hand: dict[BlockHash, BlockHash | None] = {}
        for draft in drafts:
            block = draft.block
            try:
                token_ids = encode_token_ids(block.token_ids)
                identity = BlockIdentity(
                    self._namespace, block.block_hash, block.parent_hash, draft.depth, token_ids, block.part
                )
                draft.encoded = encode_block(identity, block.payload)
                refusal = self._budget.reserve(
                    self._namespace, block.block_hash, block.parent_hash, draft.size_bytes, block.part, in_hand=in_hand
                )
            except Exception as exc:
                draft.fail(exc)
                continue
            if refusal is SaveOutcome.TOO_LARGE and reserved:
                break
            if refusal is not None:
                draft.end(refusal)
                continue
            draft.is_reserved = True
            reserved.append(draft)
            in_hand[block.block_hash] = block.parent_hash
        return reserved

    def _write(self, drafts: Sequence[_Draft]) -> None:
        """Write temporary files and make their content durable."""
        self._make_folders({self._path(draft).parent for draft in drafts})
        writes = [
            partial(write_block_file, self._temporary(draft), draft.encoded)
            for draft in drafts
            if draft.encoded is not None
        ]
        for draft, error in zip(drafts, self._threads.run(writes), strict=True):
            if error is not None:
                draft.fail(error)

    def _publish(self, drafts: Sequence[_Draft]) -> None:
        """Give finished files their names and their rows, unless another process was faster or took their parents."""
        published: set[BlockHash] = set()
        with self._index.transaction():
            renamed: dict[BlockHash, _Draft] = {}
            for draft in drafts:
                if self._rename(draft, renamed):
                    renamed[draft.block.block_hash] = draft
            self._sync_folders(renamed.values())
            for draft in renamed.values():
                parent_hash = draft.block.parent_hash
                if parent_hash in renamed and parent_hash not in published:
                    draft.end(SaveOutcome.NO_PARENT)
                elif draft.result is None:
                    self._insert(draft)
                    published.add(draft.block.block_hash)
        for block_hash in published:
            renamed[block_hash].end(SaveOutcome.WRITTEN)

    def _rename(self, draft: _Draft, renamed: Container[BlockHash | None]) -> bool:
        """Name a file after its block, unless that is there or lacks its parent. Inside a transaction."""
        block = draft.block
        if self._is_published(block):
            draft.end(SaveOutcome.ALREADY_THERE)
        elif block.parent_hash is not None and block.parent_hash not in renamed and self._parent(block) is None:
            draft.end(SaveOutcome.NO_PARENT)
        else:
            try:
                self._temporary(draft).replace(self._path(draft))
                draft.is_renamed = True
            except OSError as exc:
                draft.fail(exc)
        return draft.is_renamed

    def _sync_folders(self, renamed: Collection[_Draft]) -> None:
        """Make the names of files durable; those for which that fails are not to be published."""
        folders = sorted({self._path(draft).parent for draft in renamed})
        errors = dict(zip(folders, self._threads.run([partial(sync_directory, path) for path in folders]), strict=True))
        for draft in renamed:
            error = errors[self._path(draft).parent]
            if error is not None:
                draft.fail(error)

    def _insert(self, draft: _Draft) -> None:
        """Enter a block's row. Inside a transaction."""
        block = draft.block
        parent = self._parent(block)
        self._index.remove(self._namespace, block.block_hash)
        self._index.insert(
            IndexEntry(
                namespace=self._namespace,
                block_hash=block.block_hash,
                parent_hash=block.parent_hash,
                depth=draft.depth,
                size_bytes=draft.size_bytes,
                created_s=time.time(),
                last_used=self._index.stamp_for_child(parent, self._namespace),
                part=block.part,
            )
        )
        self._index.remove_unpublished(self._namespace, block.block_hash, self._budget.owner)

    def _describe_size(self, drafts: Sequence[_Draft]) -> None:
        """Add to the description what only a block can tell."""
        for draft in drafts:
            num_tokens = len(draft.block.token_ids)
            if num_tokens and draft.result is not None and draft.result.outcome is SaveOutcome.WRITTEN:
                break
        else:
            return
        self._is_size_described = True
        bytes_per_token = draft.block.payload.size_bytes / num_tokens
        try:
            if SIZE_KEY not in read_description(self._directory, self._namespace):
                rounded = int(bytes_per_token) if bytes_per_token.is_integer() else bytes_per_token
                write_description(self._directory, self._namespace, {**self._description, SIZE_KEY: rounded})
        except OSError as exc:
            logger.debug("the namespace can't be described: %s", exc)

    def _make_folders(self, folders: Iterable[Path]) -> None:
        # Never the cache's own folder: it may be the mount point of a volume that is gone for now.
        namespace = namespace_folder(self._directory, self._namespace)
        if make_folder(namespace):
            sync_directory(self._directory)
        # All of them, as one sync does for all.
        if sum(map(make_folder, folders)):
            sync_directory(namespace)

    def _path(self, draft: _Draft) -> Path:
        return block_path(self._directory, self._namespace, draft.block.block_hash)

    def _temporary(self, draft: _Draft) -> Path:
        return temporary_path(self._directory, self._namespace, draft.block.block_hash, self._budget.owner)

    def _is_published(self, block: NewBlock) -> bool:
        return not block.replaces_file and self._index.get(self._namespace, block.block_hash) is not None

    def _parent(self, block: NewBlock) -> IndexEntry | None:
        return None if block.parent_hash is None else self._index.get(self._namespace, block.parent_hash)


def file_version(path: Path | int) -> FileVersion | None:
    """The version of a file, given by name or descriptor; None if it isn't there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
