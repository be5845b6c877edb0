"""Reading the index of the cold tier: what it holds, and how to look into it without changing anything.

Besides blocks and unpublished files (see `ssd_index`), the index keeps a ledger of the bytes written to the folder by
all processes: one row for every ten minutes of the last day, and a total over all time. A wall clock that is set back
can't empty it: what then seems to have been written in the future counts as written now. One that is set forward lets
the entries expire early, once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import CHECKPOINT, ROWS
from omlx_core.cache.ssd_layout import IndexEntry, UnpublishedFile
from omlx_core.errors import BlockFileError, CacheDirectoryError

INDEX_NAME = "index.sqlite3"
SCHEMA_VERSION = 3

COLUMNS = "namespace, hash, parent, depth, size_bytes, created_s, last_used, part"  # the fields of IndexEntry

# A literal, because a partial index is of no use to a bound value.
_IS_CHECKPOINT = f"part = '{CHECKPOINT}'"
_IS_ROWS = f"part = '{ROWS}'"
_ADD_SIZE = f"""size_bytes = size_bytes + NEW.size_bytes,
    checkpoint_bytes = checkpoint_bytes + (NEW.{_IS_CHECKPOINT}) * NEW.size_bytes"""
_SUBTRACT_SIZE = f"""size_bytes = size_bytes - OLD.size_bytes,
    checkpoint_bytes = checkpoint_bytes - (OLD.{_IS_CHECKPOINT}) * OLD.size_bytes"""

SCHEMA = (
    f"""CREATE TABLE blocks (namespace BLOB NOT NULL, hash BLOB NOT NULL, parent BLOB, depth INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL, created_s REAL NOT NULL, last_used INTEGER NOT NULL,
        part TEXT NOT NULL DEFAULT '{ROWS}', PRIMARY KEY (hash, namespace)) WITHOUT ROWID""",
    "CREATE INDEX blocks_by_use ON blocks (last_used, depth DESC)",
    f"CREATE INDEX rows_by_parent ON blocks (namespace, parent, last_used) WHERE {_IS_ROWS}",
    f"CREATE INDEX checkpoints_by_use ON blocks (last_used, depth DESC) WHERE {_IS_CHECKPOINT}",
    f"""CREATE TABLE unpublished (namespace BLOB NOT NULL, hash BLOB NOT NULL, owner TEXT NOT NULL,
        size_bytes INTEGER NOT NULL, part TEXT NOT NULL DEFAULT '{ROWS}',
        PRIMARY KEY (namespace, hash, owner)) WITHOUT ROWID""",
    """CREATE TABLE totals (num_blocks INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
        checkpoint_bytes INTEGER NOT NULL, bytes_written INTEGER NOT NULL)""",
    "INSERT INTO totals VALUES (0, 0, 0, 0)",
    f"""CREATE TRIGGER block_added AFTER INSERT ON blocks BEGIN
        UPDATE totals SET num_blocks = num_blocks + 1, {_ADD_SIZE}; END""",
    f"""CREATE TRIGGER block_removed AFTER DELETE ON blocks BEGIN
        UPDATE totals SET num_blocks = num_blocks - 1, {_SUBTRACT_SIZE}; END""",
    f"CREATE TRIGGER unpublished_added AFTER INSERT ON unpublished BEGIN UPDATE totals SET {_ADD_SIZE}; END",
    f"CREATE TRIGGER unpublished_removed AFTER DELETE ON unpublished BEGIN UPDATE totals SET {_SUBTRACT_SIZE}; END",
    "CREATE TABLE writes (bucket INTEGER PRIMARY KEY, size_bytes INTEGER NOT NULL)",
)

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

BUCKET_S = 600
DAY_BUCKETS = 24 * 3600 // BUCKET_S


@dataclass(frozen=True, slots=True)
class IndexTotals:
    """What is in the folder, over all namespaces, and what was written to it by all processes.

    Attributes:
        num_blocks: published blocks.
        size_bytes: bytes of their files, of files being written and of files about to be removed.
        checkpoint_bytes: those of checkpoints among them.
        bytes_written_last_day: bytes of files written in the last 24 hours, to ten minutes.
        bytes_written_ever: bytes of files written since the folder came into use.
    """

    num_blocks: int
    size_bytes: int
    checkpoint_bytes: int = 0
    bytes_written_last_day: int = 0
    bytes_written_ever: int = 0


class IndexView:
    """An index that can be asked, within a `transaction` and by one thread at a time.

    Args:
        path: the database file.
        connection: a connection to it.
    """

    _BEGIN = "BEGIN"

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Look at one state of the index.

        Raises:
            BlockFileError: the database failed.
        """
        try:
            self._connection.execute(self._BEGIN)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, such as a full disk.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as exc:
            raise self._failure(exc) from exc

    def get(self, namespace: NamespaceHash, block_hash: BlockHash) -> IndexEntry | None:
        """One block's row."""
        row = self._connection.execute(
            f"SELECT {COLUMNS} FROM blocks WHERE hash = ? AND namespace = ?", (block_hash, namespace)
        ).fetchone()
        return None if row is None else IndexEntry(*row)

    def entries(
        self, namespace: NamespaceHash | None = None, *, only_checkpoints: bool = False
    ) -> Generator[IndexEntry, None, None]:
        """All blocks, or those of one namespace or checkpoints alone, in the order in which they would be evicted."""
        conditions = [_IS_CHECKPOINT] if only_checkpoints else ["TRUE"]
        arguments = []
        if namespace is not None:
            conditions.append("namespace = ?")
            arguments.append(namespace)
        rows = self._connection.execute(
            f"SELECT {COLUMNS} FROM blocks WHERE {' AND '.join(conditions)} ORDER BY last_used, depth DESC", arguments
        )
        with contextlib.closing(rows):
            for row in rows:
                yield IndexEntry(*row)

    def unpublished(self) -> list[UnpublishedFile]:
        """All files that aren't blocks."""
        rows = self._connection.execute("SELECT namespace, hash, owner, size_bytes, part FROM unpublished")
        return [UnpublishedFile(*row) for row in rows]

    def is_unpublished(self, namespace: NamespaceHash, block_hash: BlockHash) -> bool:
        """Whether a block's file is being written or about to be removed."""
        row = self._connection.execute(
            "SELECT 1 FROM unpublished WHERE namespace = ? AND hash = ?", (namespace, block_hash)
        ).fetchone()
        return row is not None

    def children(self, namespace: NamespaceHash, parent_hash: BlockHash | None, limit: int) -> list[BlockHash]:
        """The blocks that follow one, or that begin a chain; the most recently used first, `limit` at the most."""
        return read_children(self._connection, namespace, parent_hash, limit)

    def current_totals(self) -> IndexTotals:
        """The totals as they are kept."""
        return read_totals(self._connection)

    def counted_totals(self) -> tuple[int, int, int]:
        """Blocks, bytes and bytes of checkpoints, counted row by row; what `current_totals` should say."""
        sums = f"coalesce(sum(size_bytes), 0), coalesce(sum(({_IS_CHECKPOINT}) * size_bytes), 0)"
        num_blocks, *published = self._connection.execute(f"SELECT count(*), {sums} FROM blocks").fetchone()
        unpublished = self._connection.execute(f"SELECT {sums} FROM unpublished").fetchone()
        size_bytes, checkpoint_bytes = (sum(pair) for pair in zip(published, unpublished, strict=True))
        return num_blocks, size_bytes, checkpoint_bytes

    def without_parent(self) -> list[IndexEntry]:
        """Blocks whose parent isn't published."""
        return self._linked("LEFT JOIN", "p.hash IS NULL")

    def outliving_parent(self) -> list[IndexEntry]:
        """Blocks that eviction would meet after the block before them."""
        return self._linked("JOIN", "b.last_used > p.last_used OR b.depth <= p.depth")

    def damage(self) -> str | None:
        """What SQLite finds wrong with its own structures, if anything."""
        [(verdict,)] = self._connection.execute("PRAGMA integrity_check(1)").fetchall()
        return None if verdict == "ok" else str(verdict)

    def _linked(self, join: str, condition: str) -> list[IndexEntry]:
        columns = ", ".join(f"b.{column}" for column in COLUMNS.split(", "))
        rows = self._connection.execute(
            f"""SELECT {columns} FROM blocks b {join} blocks p ON p.hash = b.parent AND p.namespace = b.namespace
                WHERE b.parent IS NOT NULL AND ({condition}) ORDER BY b.depth DESC"""
        )
        return [IndexEntry(*row) for row in rows]

    def _failure(self, exc: sqlite3.Error) -> BlockFileError:
        return BlockFileError(f"the cache index {str(self._path)!r} failed: {exc}")


@contextlib.contextmanager
def read_snapshot(directory: Path) -> Iterator[IndexView]:
    """Look at the newest committed state of a folder's index; nothing on the disk is created or changed.

    Also on a medium that can't be written, and while other processes write. Without an index, or with one whose
    creation was cut short, the view is empty.

    Raises:
        BlockFileError: the database is damaged or can't be read.
        CacheDirectoryError: it belongs to a newer version of this project.
    """
    path = directory / INDEX_NAME
    try:
        connection = _connect_read_only(path)
    except sqlite3.Error as exc:
        raise BlockFileError(f"the cache index {str(path)!r} can't be read: {exc}") from exc
    view = IndexView(path, connection)
    with contextlib.closing(connection), view.transaction():
        yield view


def is_damage(exc: BaseException | None) -> bool:
    """Whether an error of SQLite says that the database itself is broken."""
    if isinstance(exc, UnicodeDecodeError):
        return True  # its message quotes a broken schema, of which the module `sqlite3` can make no text
    # The lowest byte is the kind, the rest a detail.
    return isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def read_totals(connection: sqlite3.Connection) -> IndexTotals:
    """The totals of the index behind a connection."""
    return IndexTotals(
        *connection.execute(
            """SELECT num_blocks, size_bytes, checkpoint_bytes,
                (SELECT coalesce(sum(size_bytes), 0) FROM writes WHERE bucket >= ?), bytes_written FROM totals""",
            (current_bucket() - DAY_BUCKETS,),
        ).fetchone()
    )


def read_children(
    connection: sqlite3.Connection, namespace: NamespaceHash, parent_hash: BlockHash | None, limit: int
) -> list[BlockHash]:
    """The blocks that follow one, or that begin a chain; the most recently used first, `limit` at the most."""
    rows = connection.execute(
        f"""SELECT hash FROM blocks WHERE namespace = ? AND parent IS ? AND {_IS_ROWS}
            ORDER BY last_used DESC LIMIT ?""",
        (namespace, parent_hash, limit),
    )
    return [row[0] for row in rows]


def current_bucket() -> int:
    """The number of the ledger's row for now."""
    return int(time.time() // BUCKET_S)


def check_version(path: Path, version: int) -> None:
    """Refuse the index of a newer version of this project.

    Raises:
        CacheDirectoryError: naming both versions.
    """
    if version > SCHEMA_VERSION:
        raise CacheDirectoryError(
            f"the cache index {str(path)!r} has version {version}, this is {SCHEMA_VERSION}: upgrade omlx-plugins, or "
            "use another folder"
        )


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # SQLite would create a log and shared memory where there are none, even for reading. With a log, its shared memory
    # must be used, or all that hasn't been moved to the database yet would be missed; without one nobody is writing,
    # and the file alone is everything.
    if all(path.with_name(f"{path.name}{suffix}").exists() for suffix in ("-wal", "-shm")):
        # It fails if the last writer has just closed and taken its log along.
        with contextlib.suppress(sqlite3.OperationalError):
            return _connect_if_current(path, "mode=ro&readonly_shm=1")
    if path.exists():
        return _connect_if_current(path, "immutable=1")
    return _connect_empty()


def _connect_if_current(path: Path, options: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        check_version(path, version)
    except BaseException:
        connection.close()
        raise
    if version == SCHEMA_VERSION:
        return connection
    connection.close()
    return _connect_empty()


def _connect_empty() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for statement in SCHEMA:
        connection.execute(statement)
    return connection
