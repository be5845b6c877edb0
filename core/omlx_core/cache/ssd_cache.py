"""The cold tier: blocks as files on disk, found again by any later process.

Writing is asynchronous: one thread does it, in the order of the calls, so no child is published before its parent.
Until it's done the queue itself answers for its blocks, so that one may leave RAM as soon as it's queued.

A disk that fails costs hits, never answers: an error in writing or reading ends in a miss, with a counter, and the
first of its kind with a warning. Maintenance does its work as another process would, on connections of its own, so it
may run in any thread beside everything else.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omlx_core.cache import ssd_maintenance
from omlx_core.cache.block_file import read_block_identity, read_block_into, read_block_layout
from omlx_core.cache.block_hash import BlockHash, NamespaceHash, hash_block, iter_block_hashes
from omlx_core.cache.block_header import encode_token_ids
from omlx_core.cache.block_tree import ChildBlock
from omlx_core.cache.events import EventBus
from omlx_core.cache.neighbour import Neighbour, nearest_of
from omlx_core.cache.parts import ROWS, Part
from omlx_core.cache.payload import BlockBuffers, BlockLayout, BlockPayload, InPlace, LoadedBlock, Place
from omlx_core.cache.quantized_payload import dequantize
from omlx_core.cache.ssd_budget import DiskBudget, DiskLimits
from omlx_core.cache.ssd_check import CheckReport
from omlx_core.cache.ssd_export import ImportReport, export_blocks, find_chain, import_blocks
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_index_view import IndexTotals, read_snapshot
from omlx_core.cache.ssd_layout import IndexEntry, block_path, prepare_directory, refuse_open_folders
from omlx_core.cache.ssd_publisher import BlockPublisher, FileVersion, file_version
from omlx_core.cache.ssd_stats import SSDCacheStats, StatsKeeper
from omlx_core.cache.ssd_writer import BlockWriter, SaveRequest
from omlx_core.errors import CacheInvariantError, CorruptBlockError, InvalidRequestError

__all__ = ["PagedSSDCacheManager", "SSDCacheStats"]

_MAX_CHILDREN = 16  # of the blocks that follow a prefix, how many are looked into for the nearest


class PagedSSDCacheManager:
    """The blocks of one namespace in a folder that namespaces and processes share.

    All methods may be called from any thread; `flush`, `close` and maintenance not from within `on_complete`.

    Args:
        directory: the cache's folder; created if it isn't there.
        max_size_bytes: budget over all block files in the folder, of every namespace and process.
        namespace: the root of this manager's block hashes.
        description: what the namespace stands for, written to its folder as ``namespace.json`` for people.
        max_queued_bytes: most payload bytes that wait to be written; a single larger block may wait alone.
        min_free_bytes: while less than this would be free on the volume, nothing is written.
        write_budget_bytes: most bytes written to the folder in 24 hours, by all processes; None is no limit.
        checkpoint_share: the largest part of `max_size_bytes` that checkpoints may take, in (0, 1].
        quantizes: keep rows in eight bits, which halves them and is inexact: only for a namespace whose description
            says so. What still waits to be written is served as it is.
        read_only: serve blocks and never write anything, so that the folder may be on a medium that can't be written,
            or missing. Blocks are then found by their files, those of other processes that write included.
        events: where to tell of blocks written, evicted and found corrupt.

    Raises:
        CacheDirectoryError: the folder can't be created or written, or others may write to it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_size_bytes: int,
        namespace: NamespaceHash,
        description: Mapping[str, Any],
        max_queued_bytes: int = 1024**3,
        min_free_bytes: int = 0,
        write_budget_bytes: int | None = None,
        checkpoint_share: float = 1.0,
        quantizes: bool = False,
        read_only: bool = False,
        events: EventBus | None = None,
    ) -> None:
        self._directory = directory
        self._limits = DiskLimits(max_size_bytes, min_free_bytes, write_budget_bytes, checkpoint_share)
        self._namespace = namespace
        self._description = description
        self._stats = StatsKeeper(events)
        self._quantizes = quantizes
        self._index: SSDIndex | None = None
        self._writer: BlockWriter | None = None
        if read_only:
            refuse_open_folders(directory, namespace)
            self._unreadable: dict[BlockHash, FileVersion | None] = {}
            return
        prepare_directory(directory, namespace, description)
        self._index = SSDIndex(directory)
        self._budget = DiskBudget(directory, self._index, self._limits, self._stats)
        publisher = BlockPublisher(directory, namespace, description, self._index, self._budget)
        self._writer = BlockWriter(publisher, self._limits, self._stats, max_queued_bytes, quantizes=quantizes)
        self._unreadable = self._writer.unreadable

    @property
    def reads_in_place(self) -> bool:
        """Whether files hold rows as they are used, so that `load_block_into` can put them in their place."""
        return not self._quantizes

    def has_block(self, block_hash: BlockHash) -> bool:
        """Whether `load_block` should find the block: published, by whichever process, or queued by this one."""
        # Read without the lock: a stale answer is only a miss, or a look-up that ends in one.
        if self._writer is None or self._index is None:
            return self._has_file(block_hash)
        if block_hash in self._writer.queued:
            return True
        return block_hash not in self._unreadable and self._index.contains(self._namespace, block_hash)

    def save_block(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        payload: BlockPayload,
        on_complete: Callable[[BlockHash, bool], None] | None = None,
        *,
        part: Part = ROWS,
    ) -> bool:
        """Queue a block for writing; returns at once and does no I/O.

        Args:
            block_hash: the block's name.
            parent_hash: the block before it, None for the first of a chain. Unless that one is published when this
                one's turn comes, this one isn't either.
            token_ids: the block's tokens; compared on reading, so that equal hashes never stand for other tokens.
            payload: what to write; kept by reference, and returned by `load_block`, until it's written.
            on_complete: called exactly once with the hash and whether the block is on disk, on the writer's thread,
                if the block was queued.
            part: what of a block it is. Checkpoints leave by their share, and nothing may follow one.

        Returns:
            Whether the block is in the queue now. False: the queue is full or closed, or the cache is read-only.
        """
        if self._writer is None:
            return False
        return self._writer.submit(
            SaveRequest(block_hash, parent_hash, tuple(token_ids), payload, payload.size_bytes, part, on_complete)
        )

    def load_block(self, block_hash: BlockHash, token_ids: Sequence[int]) -> BlockPayload | None:
        """Read a block and verify every byte of it. Blocks on the disk; meant for I/O threads.

        Args:
            block_hash: the block's name.
            token_ids: its tokens.

        Returns:
            The payload, or None for a miss. A block that is missing, damaged or unreadable is a miss from then on; its
            file is removed only if its content is proven to be wrong.
        """
        loaded = self._load(block_hash, token_ids, lambda _: None)
        if loaded is InPlace.IN_PLACE:
            raise CacheInvariantError(f"block {block_hash.hex()} went where no memory was given")
        return loaded

    def load_block_into(
        self, block_hash: BlockHash, token_ids: Sequence[int], buffers: BlockBuffers, place: Place
    ) -> LoadedBlock | None:
        """As `load_block`, but the content goes to its place in `buffers`, unless it is in RAM or has no place there.

        Rows in eight bits have none.

        Args:
            block_hash: the block's name.
            token_ids: its tokens.
            buffers: where it goes; after a miss they may hold some of what was read.
            place: the block's place in the prefix.
        """
        loaded = self._load(block_hash, token_ids, partial(buffers.segments, place))
        if loaded is InPlace.IN_PLACE:
            buffers.complete(place)
        return loaded

    def read_layout(self, block_hash: BlockHash) -> BlockLayout | None:
        """What the tensors of a block are: one short read of the disk at the most. None if that can't be said now."""
        queued = None if self._writer is None else self._writer.queued.get(block_hash)
        if queued is not None:
            return queued.payload.layout
        try:
            with open(block_path(self._directory, self._namespace, block_hash), "rb", buffering=0) as file:
                return read_block_layout(file)
        except OSError:
            return None  # whoever loads the block finds out what is wrong with it

    def _load(
        self,
        block_hash: BlockHash,
        token_ids: Sequence[int],
        place: Callable[[BlockLayout], Sequence[memoryview] | None],
    ) -> LoadedBlock | None:
        queued = None if self._writer is None else self._writer.queued.get(block_hash)
        if queued is not None:
            return queued.payload if queued.token_ids == tuple(token_ids) else None
        path = block_path(self._directory, self._namespace, block_hash)
        version: FileVersion | None = None
        try:
            with open(path, "rb", buffering=0) as file:
                version = file_version(file.fileno())
                identity, content = read_block_into(file, place)
            if (identity.namespace, identity.block_hash) != (self._namespace, block_hash):
                raise CorruptBlockError(f"the file holds block {identity.block_hash.hex()}")
        except FileNotFoundError:
            # Evicted, perhaps just now by another process. If its row is still there, the writer counts it.
            if self._writer is not None:
                self._writer.hide(block_hash, None, drop=True, is_counted=False)
            return None
        except OSError as exc:
            self._stats.count_corrupt()
            self._stats.warn("read", "cache block %s can't be used and will be computed again: %s", path, exc)
            # Anything but proven damage may pass, or be a newer version's file: it stays as it is.
            if self._writer is None:
                self._unreadable[block_hash] = version
            else:
                self._writer.hide(block_hash, version, drop=isinstance(exc, CorruptBlockError), is_counted=True)
            return None
        if identity.token_ids != encode_token_ids(token_ids):
            self._stats.warn("tokens", "cache block %s holds other tokens than asked for; not used", path)
            return None
        self._unreadable.pop(block_hash, None)
        if isinstance(content, int):
            self._stats.count(blocks_read=1, bytes_read=content)
            return InPlace.IN_PLACE
        self._stats.count(blocks_read=1, bytes_read=content.size_bytes)
        return dequantize(content) if self._quantizes else content

    def find_neighbour(
        self, token_ids: Sequence[int], block_size: int, extra_keys: tuple[str, ...] = ()
    ) -> Neighbour | None:
        """The published sequence that a prompt shares most with, as far as its next block. Blocks on the disk.

        Args:
            token_ids: the prompt.
            block_size: tokens per block.
            extra_keys: what the sequence must have been stored under.

        Returns:
            None if not even a token is shared, or the folder can't be read.
        """
        hashes = list(iter_block_hashes(self._namespace, token_ids, block_size, extra_keys))
        # A block is there only if those before it are, damage aside; and any that is there proves what is before it.
        num_blocks = bisect.bisect_left(hashes, True, key=lambda block_hash: not self.has_block(block_hash))
        parent_hash = hashes[num_blocks - 1] if num_blocks else None
        children = self.children(parent_hash, extra_keys, _MAX_CHILDREN)
        return nearest_of(token_ids, num_blocks * block_size, [child.token_ids for child in children])

    def children(
        self,
        parent_hash: BlockHash | None,
        extra_keys: tuple[str, ...],
        limit: int,
        known: Container[BlockHash] = (),
    ) -> list[ChildBlock]:
        """The published blocks that follow one, or that begin a chain. Blocks on the disk, a read for each.

        Args:
            parent_hash: the one that they follow; None for the first of a chain.
            extra_keys: what they must have been stored under.
            limit: look into no more than this, those that were used last.
            known: blocks to pass over.

        Returns:
            None of them if the folder can't be read.
        """
        try:
            if self._index is not None:
                hashes = self._index.children(self._namespace, parent_hash, limit)
            else:
                with read_snapshot(self._directory) as view:
                    hashes = view.children(self._namespace, parent_hash, limit)
        except OSError:
            return []
        new = (each for each in hashes if each not in known)
        read = ((each, self._read_tokens(each, parent_hash, extra_keys)) for each in new)
        return [ChildBlock(block_hash, token_ids) for block_hash, token_ids in read if token_ids is not None]

    def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Mark blocks and all blocks before them as just used, alike. Returns at once; nothing after `close`.

        Args:
            block_hashes: a chain, root first.
        """
        if self._writer is not None:
            self._writer.touch(tuple(block_hashes))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued before the call is durable, power cuts included, or given up.

        Returns:
            False if the time was too short.
        """
        return self._writer is None or self._writer.flush(timeout_s)

    def stats(self) -> SSDCacheStats:
        """Current figures."""
        totals = self._read_totals() if self._index is None else self._index.totals()
        return replace(
            self._stats.current,
            num_blocks=totals.num_blocks,
            size_bytes=totals.size_bytes,
            checkpoint_bytes=totals.checkpoint_bytes,
            bytes_written_last_day=totals.bytes_written_last_day,
            bytes_written_ever=totals.bytes_written_ever,
        )

    def check(self, repair: bool = False) -> CheckReport:
        """Judge everything in the folder, of all namespaces, by reading every block. Takes its time.

        Other processes, and other threads of this one, may go on meanwhile: what they are about to write or remove
        is no finding.

        Args:
            repair: put right what can be. Nothing valid is thrown away, unless the budget demands it.

        Raises:
            InvalidRequestError: `repair` of a read-only cache.
            OSError: the folder can't be read or, in repairing, written.
        """
        if repair:
            self._refuse_read_only("repaired")
        self.flush()
        return ssd_maintenance.check(self._directory, self._limits, repair=repair)

    def entries(self, namespace: NamespaceHash | None = None) -> Iterator[IndexEntry]:
        """The published blocks as they are at this moment, in the order in which they would be evicted.

        Args:
            namespace: only those of this one.

        Raises:
            BlockFileError: the index can't be read.
        """
        return ssd_maintenance.entries(self._directory, namespace)

    def clear(self, namespace: NamespaceHash | None = None, older_than_s: float | None = None) -> int:
        """Remove blocks, whoever wrote them.

        Args:
            namespace: only those of this one.
            older_than_s: only those written longer ago than this many seconds, whether used since or not. One that
                is needed to reach a younger one stays.

        Returns:
            How many were removed.

        Raises:
            InvalidRequestError: the cache is read-only.
            OSError: the folder can't be written.
        """
        self._refuse_read_only("cleared")
        self.flush()
        return ssd_maintenance.clear(self._directory, self._limits, namespace=namespace, older_than_s=older_than_s)

    def export(
        self,
        path: Path,
        *,
        block_hashes: Sequence[BlockHash] | None = None,
        token_ids: Sequence[int] | None = None,
        extra_keys: Sequence[str] = (),
    ) -> int:
        """Write a warmed prefix to one file, whole or not at all; see `ssd_export` for its format.

        Args:
            path: the file; replaced if there is one.
            block_hashes: what to export, with all blocks before them and the windows and checkpoints of these.
            token_ids: instead of hashes, a prompt, of which the full blocks are exported.
            extra_keys: what the blocks were stored under besides tokens.

        Returns:
            The number of blocks exported, windows and checkpoints counted.

        Raises:
            InvalidRequestError: not one of hashes and tokens is given, the prompt doesn't fill a block, or the extra
                keys are others.
            MissingBlocksError: not all blocks are on disk.
            CorruptBlockError: a block is damaged.
            OSError: the file can't be written.
        """
        if (block_hashes is None) == (token_ids is None):
            raise InvalidRequestError("name what to export, either by block_hashes or by token_ids")
        self.flush()
        if token_ids is not None:
            block_hashes = find_chain(self._directory, self._namespace, token_ids, extra_keys)
        return export_blocks(self._directory, self._namespace, block_hashes or (), path, extra_keys)

    def import_(self, path: Path, *, extra_keys: Sequence[str] = ()) -> ImportReport:
        """Publish the blocks of an exported prefix, after all of it has been verified. What is there stays as it is.

        All limits hold: the report says whether they let everything in. Verified is that the file is what was
        exported; whether the keys and values in it are those of its tokens, only who exported it knows.

        Args:
            path: what `export` wrote.
            extra_keys: what the blocks were stored under besides tokens.

        Raises:
            ForeignExportError: it belongs to another model.
            CorruptBlockError: it isn't what was exported; nothing has changed.
            InvalidRequestError: the extra keys are others, or the cache is read-only.
            OSError: the file can't be read or is no export of this version, or the folder can't be written.
        """
        self._refuse_read_only("added to")
        with ssd_maintenance.open_for_writing(self._directory, self._limits) as (index, budget):
            publisher = BlockPublisher(self._directory, self._namespace, self._description, index, budget)
            report = import_blocks(path, self._namespace, self._description, publisher, extra_keys)
        self._stats.count_written(report.blocks_written, report.bytes_written)
        return report

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued and stop; what isn't written in time is given up. Called again, does nothing.

        Args:
            timeout_s: how long writing may take.
        """
        if self._writer is not None:
            self._writer.close(timeout_s)

    def _read_tokens(
        self, block_hash: BlockHash, parent_hash: BlockHash | None, extra_keys: tuple[str, ...]
    ) -> npt.NDArray[np.uint32] | None:
        """A block's tokens; None if it can't be read, is damaged, or was stored under other keys."""
        try:
            with open(block_path(self._directory, self._namespace, block_hash), "rb", buffering=0) as file:
                token_ids = np.frombuffer(read_block_identity(file).token_ids, "<u4")
        except OSError:
            return None
        proof = hash_block(parent_hash or self._namespace, token_ids, extra_keys)
        return token_ids.astype(np.uint32, copy=False) if proof == block_hash else None

    def _has_file(self, block_hash: BlockHash) -> bool:
        path = block_path(self._directory, self._namespace, block_hash)
        if block_hash not in self._unreadable:
            return os.path.exists(path)
        # It may have been written anew since.
        try:
            return file_version(path) not in (None, self._unreadable[block_hash])
        except (OSError, KeyError):
            return False

    def _read_totals(self) -> IndexTotals:
        """The totals of a folder in which nothing is kept open."""
        try:
            with read_snapshot(self._directory) as view:
                return view.current_totals()
        except OSError:
            return IndexTotals(0, 0)

    def _refuse_read_only(self, participle: str) -> None:
        if self._writer is None:
            raise InvalidRequestError(f"a read-only cache can't be {participle}: open it without read_only")
