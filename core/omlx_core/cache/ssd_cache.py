"""The cold tier: blocks as files on disk, found again by any later process.

Writing is asynchronous: one thread does it, in the order of the calls, so no child is published before its parent.
Until it's done the queue itself answers for its blocks, so that one may leave RAM as soon as it's queued.

A block is published by making room, temporary file, fsync, rename, fsync of the folder, row in the index. Eviction
goes the other way: the row, then the file. A process that is killed in between leaves at most files that the index
knows as unpublished, and the next process to write or open removes them.

A disk that fails costs hits, never answers: an error in writing or reading ends in a miss, with a counter, and the
first of its kind with a warning.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omlx_core.cache.block_file import (
    BlockIdentity,
    encode_block,
    encode_token_ids,
    read_block,
    sync_directory,
    write_block_file,
)
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_budget import DiskBudget
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_layout import IndexEntry, block_path, make_folder, prepare_directory, temporary_path
from omlx_core.errors import CorruptBlockError
from omlx_core.sizes import format_size

logger = logging.getLogger(__name__)

_GIVE_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class SSDCacheStats:
    """What the cold tier holds, and what this process did with it.

    Attributes:
        num_blocks: published blocks in the folder, over all namespaces.
        size_bytes: bytes in the folder that count towards the budget, files being written included.
        bytes_written: bytes of block files published by this process.
        bytes_read: bytes of payload returned to callers.
        blocks_written: block files published by this process.
        blocks_read: blocks returned to callers.
        evictions: blocks evicted by this process.
        corrupt_blocks: published blocks found damaged, missing or unreadable.
        write_errors: blocks not published because of the disk or the index.
        queued_blocks: blocks waiting to be written.
        queued_bytes: bytes of their payloads.
    """

    num_blocks: int = 0
    size_bytes: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    blocks_written: int = 0
    blocks_read: int = 0
    evictions: int = 0
    corrupt_blocks: int = 0
    write_errors: int = 0
    queued_blocks: int = 0
    queued_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _SaveRequest:
    block_hash: BlockHash
    parent_hash: BlockHash | None
    token_ids: tuple[int, ...]
    payload: BlockPayload
    size_bytes: int
    on_complete: Callable[[BlockHash, bool], None] | None


class PagedSSDCacheManager:
    """The blocks of one namespace in a folder that namespaces and processes share.

    All methods may be called from any thread; `flush` and `close` not from within `on_complete`.

    Args:
        directory: the cache's folder; created if it isn't there.
        max_size_bytes: budget over all block files in the folder, of every namespace and process.
        namespace: the root of this manager's block hashes.
        description: what the namespace stands for, written to its folder as ``namespace.json`` for people.
        max_queued_bytes: most payload bytes that wait to be written; a single larger block may wait alone.

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
    ) -> None:
        self._directory = directory
        self._max_size_bytes = max_size_bytes
        self._max_queued_bytes = max_queued_bytes
        self._namespace = namespace
        prepare_directory(directory, namespace, description)
        self._index = SSDIndex(directory)
        self._budget = DiskBudget(directory, self._index, max_size_bytes)
        self._lock = threading.Lock()  # of the fields below; never held during I/O
        self._stats = SSDCacheStats()
        self._warned: set[str] = set()
        self._queued: dict[BlockHash, _SaveRequest] = {}
        self._unreadable: set[BlockHash] = set()  # published, but not to be found unless written anew
        self._is_closed = False
        self._is_giving_up = threading.Event()

        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # What a smaller budget or an earlier crash left to remove.
        self._tasks.put(partial(self._report_errors, "cleaning up", self._budget.trim))
        # A daemon, so that a hanging disk can't keep the interpreter from ending; close() runs before that.
        self._writer = threading.Thread(target=self._run, name="omlx-ssd-writer", daemon=True)
        self._writer.start()
        atexit.register(self.close)

    def has_block(self, block_hash: BlockHash) -> bool:
        """Whether `load_block` should find the block: published, by whichever process, or queued by this one."""
        # Read without the lock: a stale answer is only a miss, or a look-up that ends in one.
        if block_hash in self._queued:
            return True
        return block_hash not in self._unreadable and self._index.contains(self._namespace, block_hash)

    def save_block(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        payload: BlockPayload,
        on_complete: Callable[[BlockHash, bool], None] | None = None,
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

        Returns:
            Whether the block is in the queue now. False: the queue is full or closed.
        """
        request = _SaveRequest(block_hash, parent_hash, tuple(token_ids), payload, payload.size_bytes, on_complete)
        with self._lock:
            if self._is_closed:
                return False
            if on_complete is None and block_hash in self._queued:
                return True
            queued_bytes = self._stats.queued_bytes
            if queued_bytes and queued_bytes + request.size_bytes > self._max_queued_bytes:
                return False
            self._queued[block_hash] = request
            self._count(queued_blocks=1, queued_bytes=request.size_bytes)
            self._tasks.put(partial(self._complete_save, request))
        return True

    def load_block(self, block_hash: BlockHash, token_ids: Sequence[int]) -> BlockPayload | None:
        """Read a block and verify every byte of it. Blocks on the disk; meant for I/O threads.

        Args:
            block_hash: the block's name.
            token_ids: its tokens.

        Returns:
            The payload, or None for a miss. A block that is missing, damaged or unreadable is a miss from then on; its
            file is removed only if its content is proven to be wrong.
        """
        queued = self._queued.get(block_hash)
        if queued is not None:
            return queued.payload if queued.token_ids == tuple(token_ids) else None
        path = block_path(self._directory, self._namespace, block_hash)
        version: tuple[int, ...] | None = None
        try:
            with open(path, "rb", buffering=0) as file:
                version = _file_version(os.fstat(file.fileno()))
                identity, payload = read_block(file)
            if (identity.namespace, identity.block_hash) != (self._namespace, block_hash):
                raise CorruptBlockError(f"the file holds block {identity.block_hash.hex()}")
        except FileNotFoundError:
            # Evicted, perhaps just now by another process. If its row is still there, the writer counts it.
            self._hide(block_hash, partial(self._drop, block_hash, None, is_corrupt=False))
            return None
        except OSError as exc:
            is_corrupt = isinstance(exc, CorruptBlockError)
            with self._lock:
                self._count(corrupt_blocks=1)
            self._warn("read", "cache block %s can't be used and will be computed again: %s", path, exc)
            # Anything but proven damage may pass, or be a newer version's file: it stays as it is.
            drop = partial(self._drop, block_hash, version, is_corrupt=True) if is_corrupt else None
            self._hide(block_hash, drop)
            return None
        if identity.token_ids != encode_token_ids(token_ids):
            self._warn("tokens", "cache block %s holds other tokens than asked for; not used", path)
            return None
        with self._lock:
            self._unreadable.discard(block_hash)
            self._count(blocks_read=1, bytes_read=payload.size_bytes)
        return payload

    def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Mark blocks and all blocks before them as just used, alike. Returns at once; nothing after `close`.

        Args:
            block_hashes: a chain, root first.
        """
        stamp = partial(self._report_errors, "noting the use of blocks", partial(self._stamp, tuple(block_hashes)))
        with self._lock:
            if not self._is_closed:
                self._tasks.put(stamp)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued before the call is durable, power cuts included, or given up.

        Returns:
            False if the time was too short.
        """
        done = threading.Event()
        with self._lock:
            if not self._is_closed:
                self._tasks.put(partial(self._report_errors, "flushing", self._index.checkpoint))
                self._tasks.put(done.set)
        if self._is_closed:
            self._writer.join(timeout_s)
            return not self._writer.is_alive()
        return done.wait(timeout_s)

    def stats(self) -> SSDCacheStats:
        """Current figures."""
        totals = self._index.totals()
        with self._lock:
            return replace(
                self._stats,
                num_blocks=totals.num_blocks,
                size_bytes=totals.size_bytes,
                evictions=self._budget.num_evictions,
            )

    def close(self, timeout_s: float = 30.0) -> None:
        """Write what is queued and stop; what isn't written in time is given up. Called again, does nothing.

        Args:
            timeout_s: how long writing may take.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._tasks.put(None)
        self._writer.join(timeout_s)
        if self._writer.is_alive():
            self._is_giving_up.set()
            logger.warning("the SSD cache could not be written within %.0f s; the rest is given up", timeout_s)
            self._writer.join(_GIVE_UP_S)
        atexit.unregister(self.close)

    # What follows runs on the writer's thread, but for _hide, _count and _warn.

    def _run(self) -> None:
        try:
            while (task := self._tasks.get()) is not None:
                task()
                del task  # or the last payload would stay in memory until the next one comes
        finally:
            self._index.close()
            self._budget.close()

    def _complete_save(self, request: _SaveRequest) -> None:
        is_on_disk = False
        try:
            if not self._is_giving_up.is_set():
                is_on_disk = self._save(request)
        except Exception as exc:  # whatever it is, the caller must hear of its block and the thread go on
            with self._lock:
                self._count(write_errors=1)
            self._warn("write", "cache blocks can't be written to %s: %r", self._directory, exc)
        finally:
            with self._lock:
                self._count(queued_blocks=-1, queued_bytes=-request.size_bytes)
                if self._queued.get(request.block_hash) is request:
                    del self._queued[request.block_hash]
        if request.on_complete is None:
            return
        try:
            request.on_complete(request.block_hash, is_on_disk)
        except Exception:
            logger.exception("on_complete failed for block %s", request.block_hash.hex())

    def _save(self, request: _SaveRequest) -> bool:
        with self._index.transaction():
            if self._is_published(request.block_hash):
                self._index.stamp(self._namespace, [request.block_hash])
                return True
            parent = self._parent(request)
            if parent is None and request.parent_hash is not None:
                return False
            # The chain in hand is in use: nobody should evict it while its next block is being written.
            self._index.stamp_for_child(parent, self._namespace)
        identity = BlockIdentity(
            namespace=self._namespace,
            block_hash=request.block_hash,
            parent_hash=request.parent_hash,
            depth=0 if parent is None else parent.depth + 1,
            token_ids=encode_token_ids(request.token_ids),
        )
        block = encode_block(identity, request.payload)
        if not self._budget.reserve(self._namespace, request.block_hash, request.parent_hash, block.size_bytes):
            self._warn(
                "budget",
                "paged_ssd_cache_max_size=%s is too small for a block of %s and those before it; not written",
                format_size(self._max_size_bytes),
                format_size(block.size_bytes),
            )
            return False
        temporary = temporary_path(self._directory, self._namespace, request.block_hash, self._budget.owner)
        try:
            if make_folder(temporary.parent):
                sync_directory(temporary.parent.parent)
            write_block_file(temporary, block)
            return self._publish(request, temporary, identity.depth, block.size_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                self._budget.release(self._namespace, request.block_hash)
            raise

    def _publish(self, request: _SaveRequest, temporary: Path, depth: int, size_bytes: int) -> bool:
        """Give a finished file its name and its row, unless another process was faster or took its parent."""
        path = block_path(self._directory, self._namespace, request.block_hash)
        is_renamed = False
        try:
            with self._index.transaction():
                parent = self._parent(request)
                is_duplicate = self._is_published(request.block_hash)
                if not is_duplicate and (parent is not None or request.parent_hash is None):
                    temporary.replace(path)
                    is_renamed = True
                    sync_directory(path.parent)
                    self._index.remove(self._namespace, request.block_hash)
                    self._index.insert(
                        IndexEntry(
                            namespace=self._namespace,
                            block_hash=request.block_hash,
                            parent_hash=request.parent_hash,
                            depth=depth,
                            size_bytes=size_bytes,
                            created_s=time.time(),
                            last_used=self._index.stamp_for_child(parent, self._namespace),
                        )
                    )
                    self._index.remove_unpublished(self._namespace, request.block_hash, self._budget.owner)
        except BaseException:
            if is_renamed:
                path.unlink(missing_ok=True)
            raise
        if not is_renamed:
            self._budget.release(self._namespace, request.block_hash)
            return is_duplicate
        with self._lock:
            self._unreadable.discard(request.block_hash)
            self._count(blocks_written=1, bytes_written=size_bytes)
        return True

    def _drop(self, block_hash: BlockHash, version: tuple[int, ...] | None, *, is_corrupt: bool) -> None:
        """Take a block out whose file is missing (`version` None) or corrupt, unless it was replaced meanwhile."""
        path = block_path(self._directory, self._namespace, block_hash)
        was_published = False
        with self._index.transaction():
            try:
                current = _file_version(path.stat())
            except FileNotFoundError:
                current = None
            if current == version:
                was_published = self._index.remove(self._namespace, block_hash)
                path.unlink(missing_ok=True)
        with self._lock:
            self._unreadable.discard(block_hash)
        if was_published and not is_corrupt:
            with self._lock:
                self._count(corrupt_blocks=1)
            self._warn("read", "cache block %s is missing and will be computed again", path)

    def _stamp(self, block_hashes: tuple[BlockHash, ...]) -> None:
        with self._index.transaction():
            self._index.stamp(self._namespace, block_hashes)

    def _is_published(self, block_hash: BlockHash) -> bool:
        return block_hash not in self._unreadable and self._index.get(self._namespace, block_hash) is not None

    def _parent(self, request: _SaveRequest) -> IndexEntry | None:
        return None if request.parent_hash is None else self._index.get(self._namespace, request.parent_hash)

    def _report_errors(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as exc:
            self._warn("index", "%s failed in the SSD cache %s: %s", what, self._directory, exc)

    def _hide(self, block_hash: BlockHash, drop: Callable[[], None] | None) -> None:
        with self._lock:
            self._unreadable.add(block_hash)
            if drop is not None and not self._is_closed:
                self._tasks.put(partial(self._report_errors, "dropping a block", drop))

    def _count(self, **changes: int) -> None:
        """Add to the statistics; the caller holds the lock."""
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + change for name, change in changes.items()}
        )

    def _warn(self, kind: str, message: str, *args: object) -> None:
        """Log a warning the first time, and for those who look for details from then on."""
        with self._lock:
            is_first = kind not in self._warned
            self._warned.add(kind)
        logger.log(logging.WARNING if is_first else logging.DEBUG, message, *args)


def _file_version(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from one written later under its name."""
    return status.st_dev, status.st_ino, status.st_mtime_ns
