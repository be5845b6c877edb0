"""The catalogue of the cold tier: which blocks are on disk, in which order they leave, how many bytes they are.

One SQLite file in WAL mode over all namespaces of a folder. It holds two kinds of files:

- **blocks**: published files, ordered by use. ``last_used`` is a logical clock (the highest value so far, plus one), so
  a wall clock that is set back changes nothing. A block is never stamped newer than its parent, whatever is touched:
  hence the order ``last_used ASC, depth DESC`` always meets leaves before their parents.
- **unpublished**: files that take up space without being blocks. A temporary file is entered before it's written, and
  an evicted block until it's removed, so after a crash the next process knows what to clean up without looking
  through folders, and their bytes count meanwhile.

Triggers keep the totals in the same transaction, with those of checkpoints apart; `ssd_index_view` explains the ledger
of bytes written. All changes to published files happen inside a write transaction: its lock keeps processes apart, and
the system releases it when one is killed.

An index that is deleted, replaced or found damaged while it is open is noticed by the next transaction, which opens the
one that is there then, or makes a new one.

Thread rules: `contains` and `totals` may be called from any thread and use a connection of their own; everything else
belongs to one thread, the cache's writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.ssd_index_view import (
    BUCKET_S,
    COLUMNS,
    DAY_BUCKETS,
    INDEX_NAME,
    SCHEMA,
    SCHEMA_VERSION,
    IndexTotals,
    IndexView,
    check_version,
    current_bucket,
    is_damage,
    read_children,
    read_totals,
)
from omlx_core.cache.ssd_layout import IndexEntry, UnpublishedFile, scan_directory
from omlx_core.errors import BlockFileError, CacheDirectoryError

logger = logging.getLogger(__name__)

LOCK_NAME = "index.lock"

_INSERT_BLOCK = f"INSERT INTO blocks ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_WRITE = """INSERT INTO writes (bucket, size_bytes) VALUES (?, ?)
    ON CONFLICT (bucket) DO UPDATE SET size_bytes = size_bytes + excluded.size_bytes"""
_INSERT_UNPUBLISHED = "INSERT INTO unpublished (namespace, hash, owner, size_bytes, part) VALUES (?, ?, ?, ?, ?)"
_WRITER_TIMEOUT_S = 30.0
_READER_TIMEOUT_S = 0.25


class SSDIndex(IndexView):
    """The index of one folder, opened; made anew from the block files if it is missing or damaged.

    Args:
        directory: the cache's folder, which exists.

    Raises:
        CacheDirectoryError: the index can't be opened, or belongs to a newer version of this project.
    """

    _BEGIN = "BEGIN IMMEDIATE"

    def __init__(self, directory: Path) -> None:
        self._reader_lock = threading.Lock()
        self._last_totals = IndexTotals(0, 0)
        self._is_suspect = False  # a reader found damage, which the writer's connection may not see
        path = directory / INDEX_NAME
        try:
            self._file_id: tuple[int, int] | None
            connection, self._reader, self._file_id = _open_both(path)
        except (OSError, sqlite3.Error) as exc:
            if isinstance(exc, CacheDirectoryError):
                raise
            raise CacheDirectoryError(
                f"the cache index {str(path)!r} can't be opened ({exc}): check the folder's permissions and free "
                "space, or use another folder"
            ) from exc
        super().__init__(path, connection)

    def contains(self, namespace: NamespaceHash, block_hash: BlockHash) -> bool:
        """Whether the block is published. Any thread; a database that fails counts as no."""
        try:
            with self._reader_lock:
                row = self._reader.execute(
                    "SELECT 1 FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace)
                ).fetchone()
        except sqlite3.Error as exc:
            self._is_suspect |= is_damage(exc)
            return False
        return row is not None

    def children(self, namespace: NamespaceHash, parent_hash: BlockHash | None, limit: int) -> list[BlockHash]:
        """See `IndexView.children`. Any thread; none if the database fails."""
        try:
            with self._reader_lock:
                return read_children(self._reader, namespace, parent_hash, limit)
        except sqlite3.Error as exc:
            self._is_suspect |= is_damage(exc)
            return []

    def totals(self) -> IndexTotals:
        """Count blocks and bytes. Any thread; what was last known once the index is closed or fails."""
        try:
            with self._reader_lock:
                self._last_totals = read_totals(self._reader)
        except sqlite3.Error as exc:
            self._is_suspect |= is_damage(exc)
            logger.debug("the cache index can't be read", exc_info=True)
        return self._last_totals

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock of the folder; commit at the end, roll back on an exception.

        Raises:
            BlockFileError: the database failed, or another process held the lock for too long.
        """
        self._follow_file()
        with super().transaction():
            yield

    def insert(self, entry: IndexEntry) -> None:
        """Publish a block. Inside a transaction."""
        self._connection.execute(_INSERT_BLOCK, astuple(entry))

    def remove(self, namespace: NamespaceHash, block_hash: BlockHash) -> bool:
        """Take a block out; False if it wasn't there. Inside a transaction."""
        cursor = self._connection.execute(
            "DELETE FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace)
        )
        return cursor.rowcount > 0

    def stamp(self, namespace: NamespaceHash, block_hashes: Sequence[BlockHash]) -> int:
        """Mark published blocks and all their ancestors as used now, alike. Inside a transaction.

        Returns:
            The new value of the clock.
        """
        now = self._newest_stamp() + 1
        stamped: set[BlockHash] = set()
        for block_hash in reversed(block_hashes):
            walked: BlockHash | None = block_hash
            while walked is not None and walked not in stamped:
                stamped.add(walked)
                row = self._connection.execute(
                    "UPDATE blocks SET last_used = ? WHERE hash = ? AND namespace = ? RETURNING parent",
                    (now, walked, namespace),
                ).fetchone()
                walked = None if row is None else row[0]
        return now

    def stamp_for_child(self, parent: IndexEntry | None, namespace: NamespaceHash) -> int:
        """The stamp of a block about to be published, no newer than its parent's. Inside a transaction.

        A run of blocks of one chain shares one stamp, so that only its first block pays for the walk to the root.
        """
        if parent is not None and parent.last_used == self._newest_stamp():
            return parent.last_used
        return self.stamp(namespace, [] if parent is None else [parent.block_hash])

    def ancestors(self, entry: IndexEntry | None) -> set[tuple[NamespaceHash, BlockHash]]:
        """A block's own key and those of all blocks before it. Inside a transaction."""
        keys: set[tuple[NamespaceHash, BlockHash]] = set()
        while entry is not None and (entry.namespace, entry.block_hash) not in keys:
            keys.add((entry.namespace, entry.block_hash))
            entry = self.get(entry.namespace, entry.parent_hash) if entry.parent_hash is not None else None
        return keys

    def least_recently_used(
        self,
        size_bytes: int,
        keep: Collection[tuple[NamespaceHash, BlockHash]] = (),
        *,
        only_checkpoints: bool = False,
    ) -> list[IndexEntry] | None:
        """The blocks whose eviction frees that many bytes, in the order they leave. Inside a transaction.

        Args:
            size_bytes: how much to free.
            keep: namespace and hash of blocks that must stay.
            only_checkpoints: leave rows and windows alone.

        Returns:
            None if all others together are too small.
        """
        victims: list[IndexEntry] = []
        with contextlib.closing(self.entries(only_checkpoints=only_checkpoints)) as entries:
            while size_bytes > 0:
                entry = next(entries, None)
                if entry is None:
                    return None
                if (entry.namespace, entry.block_hash) not in keep:
                    victims.append(entry)
                    size_bytes -= entry.size_bytes
        return victims

    def add_unpublished(self, file: UnpublishedFile) -> None:
        """Count a file that isn't a block. Inside a transaction."""
        self._connection.execute(_INSERT_UNPUBLISHED, astuple(file))

    def remove_unpublished(self, namespace: NamespaceHash, block_hash: BlockHash, owner: str) -> None:
        """Stop counting a file. Inside a transaction."""
        self._connection.execute(
            "DELETE FROM unpublished WHERE namespace = ? AND hash = ? AND owner = ?",
            (namespace, block_hash, owner),
        )

    def record_write(self, size_bytes: int) -> None:
        """Enter into the ledger that a file of that size is being written. Inside a transaction."""
        self.settle_ledger()
        self._connection.execute(_INSERT_WRITE, (current_bucket(), size_bytes))
        self._connection.execute("UPDATE totals SET bytes_written = bytes_written + ?", (size_bytes,))

    def settle_ledger(self) -> None:
        """Forget what was written more than a day ago, and correct the rest. Inside a transaction."""
        now = current_bucket()
        # From before the clock was set back: the latest that it can have been is now.
        [(future_bytes,)] = self._connection.execute(
            "SELECT coalesce(sum(size_bytes), 0) FROM writes WHERE bucket > ?", (now,)
        ).fetchall()
        self._connection.execute("DELETE FROM writes WHERE bucket NOT BETWEEN ? AND ?", (now - DAY_BUCKETS, now))
        if future_bytes:
            self._connection.execute(_INSERT_WRITE, (now, future_bytes))

    def recount(self) -> None:
        """Make the totals agree with the rows. Inside a transaction."""
        self._connection.execute(
            "UPDATE totals SET num_blocks = ?, size_bytes = ?, checkpoint_bytes = ?", self.counted_totals()
        )

    def give_up_damaged(self) -> None:
        """Have the index made anew from the block files, by the next transaction or the next process to open it."""
        # What is beyond even this, they will see by themselves.
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA user_version=0")
        self._file_id = None

    def checkpoint(self) -> None:
        """Make everything committed so far survive a power cut too, not only a killed process.

        Raises:
            BlockFileError: the database failed.
        """
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as exc:
            raise BlockFileError(f"the cache index {str(self._path)!r} failed: {exc}") from exc

    def close(self) -> None:
        """Close both connections; later look-ups find nothing."""
        self.totals()
        with self._reader_lock:
            self._reader.close()
        self._connection.close()

    def _newest_stamp(self) -> int:
        return int(self._connection.execute("SELECT coalesce(max(last_used), 0) FROM blocks").fetchone()[0])

    def _follow_file(self) -> None:
        """Go over to the file that now has the index's name, if it isn't the one that is open."""
        if self._is_suspect:
            self.give_up_damaged()
            self._is_suspect = False
        try:
            if self._file_id is not None and _file_id(self._path) == self._file_id:
                return
            # First, because SQLite shares what it knows of a file among all connections of a process.
            self._file_id = None
            self._connection.close()
            with self._reader_lock:
                self._reader.close()
            self._connection, reader, self._file_id = _open_both(self._path)
            with self._reader_lock:
                self._reader = reader
        except (OSError, sqlite3.Error) as exc:
            raise BlockFileError(f"the cache index {str(self._path)!r} can't be opened: {exc}") from exc

    def _failure(self, exc: sqlite3.Error) -> BlockFileError:
        if is_damage(exc):
            self.give_up_damaged()
        elif getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
            # The folder was, or a reader of this process had opened the file in that way; both may pass.
            self._file_id = None
        return super()._failure(exc)


def _open_both(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection, tuple[int, int] | None]:
    """Open the writer's and the readers' connection; one process at a time, so that two don't both rebuild."""
    with _exclusive(path.with_name(LOCK_NAME)):
        writer = _open(path)
        try:
            return writer, _connect(path, _READER_TIMEOUT_S), _file_id(path)
        except BaseException:
            writer.close()
            raise


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(path: Path) -> sqlite3.Connection:
    existed = path.exists()
    if existed:
        try:
            connection = _connect(path, _WRITER_TIMEOUT_S)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
            if not is_damage(exc):
                raise
        else:
            try:
                if _is_usable(connection, path):
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
        path.replace(path.with_name(f"{INDEX_NAME}.damaged"))
    # A log without its database belongs to an earlier one.
    for suffix in ("-wal", "-shm"):
        path.with_name(f"{INDEX_NAME}{suffix}").unlink(missing_ok=True)
    # SQLite would create it readable by others; its side files take over this mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(path, _WRITER_TIMEOUT_S)
    try:
        _create(connection, path.parent, warn=existed)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_usable(connection: sqlite3.Connection, path: Path) -> bool:
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        check_version(path, version)
        if version < SCHEMA_VERSION:
            return False
        for table in ("blocks", "unpublished", "writes"):
            connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()
        read_totals(connection)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
        # Also a table or a column that isn't there.
        if is_damage(exc) or getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            return False
        raise
    return True


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _create(connection: sqlite3.Connection, directory: Path, *, warn: bool) -> None:
    """Create the tables and enter every file there is: in one transaction, so that a crash repeats it all."""
    files = scan_directory(directory)
    if warn or files.entries:
        logger.warning(
            "the cache index in %s was missing or damaged; %d blocks found again", directory, len(files.entries)
        )
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.executemany(_INSERT_BLOCK, map(astuple, files.entries))
    connection.executemany(_INSERT_UNPUBLISHED, map(astuple, files.unpublished))
    # The ledger went with the old index; that these have been written is certain.
    written = [(int(entry.created_s // BUCKET_S), entry.size_bytes) for entry in files.entries]
    connection.executemany(_INSERT_WRITE, [row for row in written if row[0] >= current_bucket() - DAY_BUCKETS])
    connection.execute("UPDATE totals SET bytes_written = ?", (sum(size_bytes for _, size_bytes in written),))
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    connection.execute("COMMIT")
