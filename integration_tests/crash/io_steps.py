"""Counts every step of I/O that could change a folder, and kills the process at the one that it is told.

Nothing in the code under test knows of this: the functions it calls are wrapped from outside. A kill before step n + 1
leaves the same folder as one after step n, because between two steps nothing reaches the disk. One kind of step can
also be cut in the middle: a write, of which then half of the bytes arrive.

Steps of several threads are counted as they come. How many there are doesn't depend on their order, so each number is
a moment at which the process can be killed, though not the same one in every run.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

_FUNCTIONS = (
    (os, "open"),
    (os, "mkdir"),
    (os, "replace"),
    (os, "rename"),
    (os, "link"),
    (os, "unlink"),
    (os, "remove"),
    (os, "rmdir"),
    (os, "chmod"),
    (os, "utime"),
    (os, "truncate"),
    (os, "ftruncate"),
    (fcntl, "flock"),
)


class IOSteps:
    """The steps of this process.

    Args:
        kill_at: the step at which the process kills itself, counted from 1; 0 for none.
        tears_write: write half of the bytes first, where that step is a write.
        syncs: whether fsync is executed. Only a power cut undoes what isn't synced, a kill doesn't, and without it a
            run is many times faster; it counts as a step all the same.
    """

    def __init__(self, kill_at: int = 0, *, tears_write: bool = False, syncs: bool = True) -> None:
        self._kill_at = kill_at
        self._tears_write = tears_write
        self._syncs = syncs
        self._is_paused = False
        self._lock = threading.Lock()
        # Kind and object: a path, or a statement with the hashes that it is about.
        self.trace: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What the test itself does is no step."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def take(self, kind: str, detail: object, tear: Callable[[], object] | None = None) -> None:
        """Count a step, which is about to be made."""
        if self._is_paused:
            return
        with self._lock:
            self.trace.append((kind, os.fspath(detail) if isinstance(detail, os.PathLike) else str(detail)))
            if len(self.trace) == self._kill_at:
                if self._tears_write and tear is not None:
                    tear()
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Wrap the functions, for the rest of the process."""
        for module, name in _FUNCTIONS:
            setattr(module, name, self._wrap(name, getattr(module, name)))
        fsync = os.fsync
        fcntl_function = fcntl.fcntl

        def counted_fsync(fd: int) -> None:
            self.take("fsync", _path_of(fd))
            if self._syncs:
                fsync(fd)

        def counted_fcntl(fd: Any, command: int, argument: Any = 0) -> Any:
            if command == getattr(fcntl, "F_FULLFSYNC", object()):
                return counted_fsync(fd)
            return fcntl_function(fd, command, argument)

        os.fsync = counted_fsync
        fcntl.fcntl = counted_fcntl  # type: ignore[assignment]
        write = os.write

        def counted_write(fd: int, data: Any) -> int:
            self.take("write", _path_of(fd), lambda: write(fd, memoryview(data)[: len(data) // 2]))
            return write(fd, data)

        os.write = counted_write
        writev = os.writev

        def counted_writev(fd: int, buffers: Any) -> int:
            data = b"".join(buffers)
            self.take("write", _path_of(fd), lambda: write(fd, data[: len(data) // 2]))
            return writev(fd, buffers)

        os.writev = counted_writev
        open_function = builtins.open

        def counted_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if set(mode).isdisjoint("wax+"):
                return open_function(file, mode, buffering, *args, **kwargs)
            if not isinstance(file, int):
                self.take("open", file)
            raw = _SteppingFile(file, mode.replace("b", "").replace("t", ""))
            raw.steps = self
            if "b" in mode:
                return raw if buffering == 0 else io.BufferedWriter(raw)
            return io.TextIOWrapper(io.BufferedWriter(raw), *args, **kwargs)

        builtins.open = io.open = counted_open  # type: ignore[assignment]
        self._install_sqlite()

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.take(name, args[0])
            return function(*args, **kwargs)

        return counted

    def _install_sqlite(self) -> None:
        steps = self

        class SteppingConnection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                keys = [value.hex() for value in (args[0] if args else ()) if isinstance(value, bytes)]
                steps.take("sql", " ".join([sql, *keys]))
                return super().execute(sql, *args)

            def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
                steps.take("sql", sql)
                return super().executemany(sql, *args)

            def close(self) -> None:
                steps.take("sql", "close")
                super().close()

        connect = sqlite3.connect

        def counted_connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            steps.take("sql", "connect")
            return connect(*args, factory=SteppingConnection, **kwargs)

        sqlite3.connect = counted_connect  # type: ignore[assignment]


class _SteppingFile(io.FileIO):
    steps: IOSteps

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.steps.take(
            "write", _path_of(self.fileno()), lambda: super(_SteppingFile, self).write(view[: len(view) // 2])
        )
        return super().write(view)


def _path_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"fd {fd}"
