"""The catalogue of the cold tier: which blocks are on disk, in which order they leave, how many bytes they are.

One SQLite file in WAL mode over all namespaces of a folder. It holds two kinds of files:

- **blocks**: published files, ordered by use. ``last_used`` is a logical clock (the highest value so far, plus one), so
  a wall clock that is set back changes nothing. A block is never stamped newer than its parent, whatever is touched:
  hence the order ``last_used ASC, depth DESC`` always meets leaves before their parents.
- **unpublished**: files that take up space without being blocks. A temporary file is entered before it's written, and
  an evicted block until it's removed, so after a crash the next process knows what to clean up without looking
  through folders, and their bytes count meanwhile.

Triggers keep the totals in the same transaction. All changes to published files happen inside a write transaction:
its lock keeps processes apart, and the system releases it when one is killed.

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
from dataclasses import astuple, dataclass
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.ssd_layout import IndexEntry, UnpublishedFile, scan_directory
from omlx_core.errors import BlockFileError, CacheDirectoryError

logger = logging.getLogger(__name__)

INDEX_NAME = "index.sqlite3"
LOCK_NAME = "index.lock"
SCHEMA_VERSION = 1

_SCHEMA = (
    """CREATE TABLE blocks (namespace BLOB NOT NULL, hash BLOB NOT NULL, parent BLOB, depth INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL, created_s REAL NOT NULL, last_used INTEGER NOT NULL,
        PRIMARY KEY (hash, namespace)) WITHOUT ROWID""",
    "CREATE INDEX blocks_by_use ON blocks (last_used, depth DESC)",
    """CREATE TABLE unpublished (namespace BLOB NOT NULL, hash BLOB NOT NULL, owner TEXT NOT NULL,
        size_bytes INTEGER NOT NULL, PRIMARY KEY (namespace, hash, owner)) WITHOUT ROWID""",
    "CREATE TABLE totals (num_blocks INTEGER NOT NULL, size_bytes INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    """CREATE TRIGGER block_added AFTER INSERT ON blocks BEGIN
        UPDATE totals SET num_blocks = num_blocks + 1, size_bytes = size_bytes + NEW.size_bytes; END""",
    """CREATE TRIGGER block_removed AFTER DELETE ON blocks BEGIN
        UPDATE totals SET num_blocks = num_blocks - 1, size_bytes = size_bytes - OLD.size_bytes; END""",
    """CREATE TRIGGER unpublished_added AFTER INSERT ON unpublished BEGIN
        UPDATE totals SET size_bytes = size_bytes + NEW.size_bytes; END""",
    """CREATE TRIGGER unpublished_removed AFTER DELETE ON unpublished BEGIN
        UPDATE totals SET size_bytes = size_bytes - OLD.size_bytes; END""",
)
_COLUMNS = "namespace, hash, parent, depth, size_bytes, created_s, last_used"  # the fields of IndexEntry
_INSERT_BLOCK = f"INSERT INTO blocks ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_UNPUBLISHED = "INSERT INTO unpublished (namespace, hash, owner, size_bytes) VALUES (?, ?, ?, ?)"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_WRITER_TIMEOUT_S = 30.0
_READER_TIMEOUT_S = 0.25


@dataclass(frozen=True, slots=True)
class IndexTotals:
    """What is in the folder, over all namespaces.

    Attributes:
        num_blocks: published blocks.
        size_bytes: bytes of their files, of files being written and of files about to be removed.
    """

    num_blocks: int
    size_bytes: int


class SSDIndex:
    """The index of one folder, opened; made anew from the block files if it is missing or damaged.

    Args:
        directory: the cache's folder, which exists.

    Raises:
        CacheDirectoryError: the index can't be opened, or belongs to a newer version of this project.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / INDEX_NAME
        self._reader_lock = threading.Lock()
        self._last_totals = IndexTotals(0, 0)
        try:
            # One process at a time opens, so that two don't both rebuild.
            with _exclusive(directory / LOCK_NAME):
                self._writer = self._open()
                try:
                    self._reader = self._connect(_READER_TIMEOUT_S)
                except BaseException:
                    self._writer.close()
                    raise
        except (OSError, sqlite3.Error) as exc:
            if isinstance(exc, CacheDirectoryError):
                raise
            raise CacheDirectoryError(
                f"the cache index {str(self._path)!r} can't be opened ({exc}): check the folder's permissions and "
                "free space, or use another folder"
            ) from exc

    def contains(self, namespace: NamespaceHash, block_hash: BlockHash) -> bool:
        """Whether the block is published. Any thread; a database that fails counts as no."""
        try:
            with self._reader_lock:
                row = self._reader.execute(
                    "SELECT 1 FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace)
                ).fetchone()
        except sqlite3.Error:
            return False
        return row is not None

    def totals(self) -> IndexTotals:
        """Count blocks and bytes. Any thread; what was last known once the index is closed or fails."""
        try:
            with self._reader_lock:
                self._last_totals = IndexTotals(
                    *self._reader.execute("SELECT num_blocks, size_bytes FROM totals").fetchone()
                )
        except sqlite3.Error:
            logger.debug("the cache index can't be read", exc_info=True)
        return self._last_totals

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock of the folder; commit at the end, roll back on an exception.

        Raises:
            BlockFileError: the database failed, or another process held the lock for too long.
        """
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        except sqlite3.Error as exc:
            if getattr(exc, "sqlite_errorcode", None) in _DAMAGE:
                # The next opening then rebuilds it. What is beyond even that, it will see by itself.
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("PRAGMA user_version=0")
            raise BlockFileError(f"the cache index {str(self._path)!r} failed: {exc}") from exc

    def get(self, namespace: NamespaceHash, block_hash: BlockHash) -> IndexEntry | None:
        """One block's row. Inside a transaction."""
        row = self._writer.execute(
            f"SELECT {_COLUMNS} FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace)
        ).fetchone()
        return None if row is None else IndexEntry(*row)

    def insert(self, entry: IndexEntry) -> None:
        """Publish a block. Inside a transaction."""
        self._writer.execute(_INSERT_BLOCK, astuple(entry))

    def remove(self, namespace: NamespaceHash, block_hash: BlockHash) -> bool:
        """Take a block out; False if it wasn't there. Inside a transaction."""
        cursor = self._writer.execute("DELETE FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace))
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
                row = self._writer.execute(
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
        self, size_bytes: int, keep: Collection[tuple[NamespaceHash, BlockHash]] = ()
    ) -> list[IndexEntry] | None:
        """The blocks whose eviction frees that many bytes, in the order they leave. Inside a transaction.

        Args:
            size_bytes: how much to free.
            keep: namespace and hash of blocks that must stay.

        Returns:
            None if all others together are too small.
        """
        victims: list[IndexEntry] = []
        rows = self._writer.execute(f"SELECT {_COLUMNS} FROM blocks ORDER BY last_used, depth DESC")
        with contextlib.closing(rows):
            while size_bytes > 0:
                row = rows.fetchone()
                if row is None:
                    return None
                entry = IndexEntry(*row)
                if (entry.namespace, entry.block_hash) not in keep:
                    victims.append(entry)
                    size_bytes -= entry.size_bytes
        return victims

    def current_size_bytes(self) -> int:
        """Bytes that count towards the budget. Inside a transaction."""
        return int(self._writer.execute("SELECT size_bytes FROM totals").fetchone()[0])

    def add_unpublished(self, file: UnpublishedFile) -> None:
        """Count a file that isn't a block. Inside a transaction."""
        self._writer.execute(_INSERT_UNPUBLISHED, astuple(file))

    def remove_unpublished(self, namespace: NamespaceHash, block_hash: BlockHash, owner: str) -> None:
        """Stop counting a file. Inside a transaction."""
        self._writer.execute(
            "DELETE FROM unpublished WHERE namespace = ? AND hash = ? AND owner = ?",
            (namespace, block_hash, owner),
        )

    def unpublished(self) -> list[UnpublishedFile]:
        """All files that aren't blocks. Inside a transaction."""
        rows = self._writer.execute("SELECT namespace, hash, owner, size_bytes FROM unpublished")
        return [UnpublishedFile(*row) for row in rows]

    def checkpoint(self) -> None:
        """Make everything committed so far survive a power cut too, not only a killed process.

        Raises:
            BlockFileError: the database failed.
        """
        try:
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as exc:
            raise BlockFileError(f"the cache index {str(self._path)!r} failed: {exc}") from exc

    def close(self) -> None:
        """Close both connections; later look-ups find nothing."""
        self.totals()
        with self._reader_lock:
            self._reader.close()
        self._writer.close()

    def _newest_stamp(self) -> int:
        return int(self._writer.execute("SELECT coalesce(max(last_used), 0) FROM blocks").fetchone()[0])

    def _connect(self, timeout_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self) -> sqlite3.Connection:
        existed = self._path.exists()
        if existed:
            try:
                connection = self._connect(_WRITER_TIMEOUT_S)
            except sqlite3.DatabaseError as exc:
                if exc.sqlite_errorcode not in _DAMAGE:
                    raise
            else:
                try:
                    if self._is_usable(connection):
                        return connection
                except BaseException:
                    connection.close()
                    raise
                connection.close()
            self._path.replace(self._path.with_name(f"{INDEX_NAME}.damaged"))
        # A log without its database belongs to an earlier one.
        for suffix in ("-wal", "-shm"):
            self._path.with_name(f"{INDEX_NAME}{suffix}").unlink(missing_ok=True)
        # SQLite would create it readable by others; its side files take over this mode.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = self._connect(_WRITER_TIMEOUT_S)
        try:
            _create(connection, self._directory, warn=existed)
        except BaseException:
            connection.close()
            raise
        return connection

    def _is_usable(self, connection: sqlite3.Connection) -> bool:
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise CacheDirectoryError(
                    f"the cache index {str(self._path)!r} has version {version}, this is {SCHEMA_VERSION}: upgrade "
                    "omlx-plugins, or use another folder"
                )
            if version < SCHEMA_VERSION:
                return False
            for table in ("blocks", "unpublished", "totals"):
                connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchone()
        except sqlite3.DatabaseError as exc:
            if exc.sqlite_errorcode in (*_DAMAGE, sqlite3.SQLITE_ERROR):
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
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.executemany(_INSERT_BLOCK, map(astuple, files.entries))
    connection.executemany(_INSERT_UNPUBLISHED, map(astuple, files.unpublished))
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    connection.execute("COMMIT")
