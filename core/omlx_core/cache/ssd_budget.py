"""Keeps the bytes in the cold tier's folder within their budget, at every moment and over all processes.

Bytes are reserved before a temporary file is written, and an evicted block counts until its file is gone: what the
index adds up is therefore never less than what is on disk. Counted are the files' lengths; the index itself and the
file system's rounding to its own blocks come on top.

All of it runs on the writer's thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import time
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_layout import EVICTED, IndexEntry, UnpublishedFile, block_path, temporary_path

_MAX_WRITE_AGE_S = 24 * 3600.0
_live_owners: set[str] = set()


class DiskBudget:
    """Reserves, evicts and cleans up in one folder, for one writer.

    Args:
        directory: the cache's folder.
        index: its index.
        max_size_bytes: the budget.

    Attributes:
        owner: marks the files that this writer is writing.
        num_evictions: blocks evicted so far.
    """

    def __init__(self, directory: Path, index: SSDIndex, max_size_bytes: int) -> None:
        self._directory = directory
        self._index = index
        self._max_size_bytes = max_size_bytes
        self.owner = f"{_host_id()}-{os.getpid()}-{secrets.token_hex(8)}"
        self.num_evictions = 0
        _live_owners.add(self.owner)

    def close(self) -> None:
        """Nothing is being written any more: whatever this writer left may be removed."""
        _live_owners.discard(self.owner)

    def reserve(
        self, namespace: NamespaceHash, block_hash: BlockHash, parent_hash: BlockHash | None, size_bytes: int
    ) -> bool:
        """Make room for a file that is about to be written to `temporary_path`.

        Blocks leave in order of their last use, leaves before their parents; those before the new block stay.

        Returns:
            False if the chain alone exceeds the budget, or its parent is no longer published; nothing is evicted then.

        Raises:
            OSError: an evicted file can't be removed.
        """
        while True:
            with self._index.transaction():
                parent = None if parent_hash is None else self._index.get(namespace, parent_hash)
                if parent is None and parent_hash is not None:
                    return False
                if self._remove_leftovers() + size_bytes <= self._max_size_bytes:
                    self._index.add_unpublished(UnpublishedFile(namespace, block_hash, self.owner, size_bytes))
                    return True
                if not self._evict(size_bytes, parent):
                    return False

    def release(self, namespace: NamespaceHash, block_hash: BlockHash) -> None:
        """Remove a temporary file, if it is still there, and its reservation.

        Raises:
            OSError: neither could be done; the next process will.
        """
        with self._index.transaction():
            temporary_path(self._directory, namespace, block_hash, self.owner).unlink(missing_ok=True)
            self._index.remove_unpublished(namespace, block_hash, self.owner)

    def trim(self) -> None:
        """Remove what earlier processes left, and evict down to the budget.

        Raises:
            OSError: an evicted file can't be removed.
        """
        while True:
            with self._index.transaction():
                if self._remove_leftovers() <= self._max_size_bytes or not self._evict(0, None):
                    return

    def _remove_leftovers(self) -> int:
        """Unlink evicted and abandoned files; return the bytes that still count. Inside a transaction.

        The rows of evicted blocks were committed as gone before: no reader that starts now looks for them. Under the
        write lock nobody publishes one of them anew between the check and the unlink.
        """
        for file in self._index.unpublished():
            if file.owner != EVICTED:
                temporary = temporary_path(self._directory, file.namespace, file.block_hash, file.owner)
                if not _is_abandoned(file.owner, temporary):
                    continue
                temporary.unlink(missing_ok=True)
            # Also after a crash between the rename and the commit of its row.
            if self._index.get(file.namespace, file.block_hash) is None:
                block_path(self._directory, file.namespace, file.block_hash).unlink(missing_ok=True)
            self._index.remove_unpublished(file.namespace, file.block_hash, file.owner)
        return self._index.current_size_bytes()

    def _evict(self, size_bytes: int, parent: IndexEntry | None) -> bool:
        """Take the rows of enough blocks; `_remove_leftovers` takes the files, in the next transaction."""
        excess_bytes = self._index.current_size_bytes() + size_bytes - self._max_size_bytes
        victims = self._index.least_recently_used(excess_bytes, keep=self._index.ancestors(parent))
        for victim in victims or ():
            self._index.remove(victim.namespace, victim.block_hash)
            self._index.add_unpublished(
                UnpublishedFile(victim.namespace, victim.block_hash, EVICTED, victim.size_bytes)
            )
        self.num_evictions += len(victims or ())
        return victims is not None


def _host_id() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_abandoned(owner: str, temporary: Path) -> bool:
    """Whether a temporary file is certainly nobody's any more.

    Process ids say something on their own host only, and may be in use again; a file of a day ago is old anyway.
    """
    host, pid_text, _ = owner.split("-")
    pid = int(pid_text)
    if host == _host_id():
        if pid == os.getpid():
            return owner not in _live_owners
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
    try:
        return time.time() - temporary.stat().st_mtime > _MAX_WRITE_AGE_S
    except FileNotFoundError:
        return False  # reserved, not written yet
