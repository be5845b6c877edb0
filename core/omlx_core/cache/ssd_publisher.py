"""Writes blocks into the cold tier's folder, one at a time, and takes damaged ones out.

A block is published by making room, temporary file, fsync, rename, fsync of the folder, row in the index. Eviction
goes the other way: the row, then the file. A process that is killed in between leaves at most files that the index
knows as unpublished, and the next process to write or open removes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omlx_core.cache.block_file import BlockIdentity, encode_block, sync_directory, write_block_file
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
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

FileVersion = tuple[int, int, int]
"""What tells a file from one written later under its name: device, inode, time of change."""


@dataclass(frozen=True, slots=True)
class NewBlock:
    """A block to be saved.

    Attributes:
        block_hash: its name.
        parent_hash: the block before it; None for the first of a chain.
        token_ids: its tokens as little-endian uint32.
        payload: its tensors.
        part: what of a block it is.
        replaces_file: publish it even if there is one, whose file can't be read.
    """

    block_hash: BlockHash
    parent_hash: BlockHash | None
    token_ids: bytes
    payload: BlockPayload
    part: Part = ROWS
    replaces_file: bool = False


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How saving a block ended.

    Attributes:
        outcome: whether it is on disk, or why not.
        size_bytes: size of its file; 0 if it never came to that.
    """

    outcome: SaveOutcome
    size_bytes: int = 0


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

    def save(self, block: NewBlock) -> SaveResult:
        """Write a block and make it durable, unless it is there already.

        Raises:
            OSError: the disk or the index failed; nothing is left of the block.
            OverflowError: a token id doesn't fit 32 bits.
        """
        with self._index.transaction():
            if self._is_published(block):
                self._index.stamp(self._namespace, [block.block_hash])
                return SaveResult(SaveOutcome.ALREADY_THERE)
            parent = self._parent(block)
            if parent is None and block.parent_hash is not None:
                return SaveResult(SaveOutcome.NO_PARENT)
            # The chain in hand is in use: nobody should evict it while its next block is being written.
            self._index.stamp_for_child(parent, self._namespace)
        depth = 0 if parent is None else parent.depth + 1
        identity = BlockIdentity(
            self._namespace, block.block_hash, block.parent_hash, depth, block.token_ids, block.part
        )
        encoded = encode_block(identity, block.payload)
        refusal = self._budget.reserve(
            self._namespace, block.block_hash, block.parent_hash, encoded.size_bytes, block.part
        )
        if refusal is not None:
            return SaveResult(refusal, encoded.size_bytes)
        temporary = temporary_path(self._directory, self._namespace, block.block_hash, self._budget.owner)
        try:
            self._make_folders(temporary.parent)
            write_block_file(temporary, encoded)
            outcome = self._publish(block, temporary, depth, encoded.size_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                self._budget.release(self._namespace, block.block_hash)
            raise
        if not self._is_size_described and identity.num_tokens:
            self._describe_size(block.payload.size_bytes / identity.num_tokens)
        return SaveResult(outcome, encoded.size_bytes)

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
        self._index.close()
        self._budget.close()

    def _publish(self, block: NewBlock, temporary: Path, depth: int, size_bytes: int) -> SaveOutcome:
        """Give a finished file its name and its row, unless another process was faster or took its parent."""
        path = block_path(self._directory, self._namespace, block.block_hash)
        outcome = SaveOutcome.WRITTEN
        is_renamed = False
        try:
            with self._index.transaction():
                parent = self._parent(block)
                if self._is_published(block):
                    outcome = SaveOutcome.ALREADY_THERE
                elif parent is None and block.parent_hash is not None:
                    outcome = SaveOutcome.NO_PARENT
                else:
                    temporary.replace(path)
                    is_renamed = True
                    sync_directory(path.parent)
                    self._index.remove(self._namespace, block.block_hash)
                    self._index.insert(
                        IndexEntry(
                            namespace=self._namespace,
                            block_hash=block.block_hash,
                            parent_hash=block.parent_hash,
                            depth=depth,
                            size_bytes=size_bytes,
                            created_s=time.time(),
                            last_used=self._index.stamp_for_child(parent, self._namespace),
                            part=block.part,
                        )
                    )
                    self._index.remove_unpublished(self._namespace, block.block_hash, self._budget.owner)
        except BaseException:
            if is_renamed:
                path.unlink(missing_ok=True)
            raise
        if outcome is not SaveOutcome.WRITTEN:
            self._budget.release(self._namespace, block.block_hash)
        return outcome

    def _describe_size(self, bytes_per_token: float) -> None:
        """Add to the description what only a block can tell."""
        self._is_size_described = True
        try:
            if SIZE_KEY not in read_description(self._directory, self._namespace):
                rounded = int(bytes_per_token) if bytes_per_token.is_integer() else bytes_per_token
                write_description(self._directory, self._namespace, {**self._description, SIZE_KEY: rounded})
        except OSError as exc:
            logger.debug("the namespace can't be described: %s", exc)

    def _make_folders(self, folder: Path) -> None:
        # Never the cache's own folder: it may be the mount point of a volume that is gone for now.
        for path in (namespace_folder(self._directory, self._namespace), folder):
            if make_folder(path):
                sync_directory(path.parent)

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
