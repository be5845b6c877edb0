"""A disk that fails on demand: I/O in one folder, made to fail by kind, from outside of the code under test."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KINDS = ("open", "read", "write", "fsync", "rename", "unlink", "mkdir", "sql")

_SQLITE_CODES = {
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EIO: sqlite3.SQLITE_IOERR,
    errno.EACCES: sqlite3.SQLITE_CANTOPEN,
    errno.EROFS: sqlite3.SQLITE_READONLY,
}


class FaultyIO:
    """Lets the kinds of I/O fail below a folder, while told to.

    Args:
        directory: the folder.
        monkeypatch: undoes the wrapping at the end.

    Attributes:
        num_failures: how often something was made to fail.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = str(directory)
        self._errors: dict[str, int] = {}
        self._fds: set[int] = set()
        self.num_failures = 0
        open_function, open_fd, connect = builtins.open, os.open, sqlite3.connect
        faulty = self

        def faulty_os_open(path: Any, *args: Any, **kwargs: Any) -> int:
            if not faulty._is_inside(path):
                return open_fd(path, *args, **kwargs)
            faulty.check("open", path)
            fd = open_fd(path, *args, **kwargs)
            faulty._fds.add(fd)
            return fd

        def faulty_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not (file in faulty._fds if isinstance(file, int) else faulty._is_inside(file)):
                return open_function(file, mode, buffering, *args, **kwargs)
            if not isinstance(file, int):
                faulty.check("open", file)
            raw = _FaultyFile(file, mode.replace("b", "").replace("t", ""))
            raw.faulty = faulty
            if "b" in mode:
                return raw if buffering == 0 else io.BufferedWriter(raw) if "w" in mode else io.BufferedReader(raw)
            return io.TextIOWrapper(io.BufferedWriter(raw) if "w" in mode else io.BufferedReader(raw), *args, **kwargs)

        class FaultyConnection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if "sql" in faulty._errors and not sql.startswith("ROLLBACK"):
                    faulty.num_failures += 1
                    error = sqlite3.OperationalError("injected")
                    error.sqlite_errorcode = _SQLITE_CODES[faulty._errors["sql"]]
                    raise error
                return super().execute(sql, *args)

        monkeypatch.setattr(os, "open", faulty_os_open)
        monkeypatch.setattr(builtins, "open", faulty_open)
        monkeypatch.setattr(io, "open", faulty_open)
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{"factory": FaultyConnection, **k}))
        for name, kind in (("replace", "rename"), ("rename", "rename"), ("unlink", "unlink"), ("mkdir", "mkdir")):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), kind))
        fsync = os.fsync

        def faulty_fsync(fd: int) -> None:
            if fd in faulty._fds:
                faulty.check("fsync", fd)
            fsync(fd)

        monkeypatch.setattr(os, "fsync", faulty_fsync)
        writev = os.writev

        def faulty_writev(fd: int, buffers: Any) -> int:
            if fd in faulty._fds:
                try:
                    faulty.check("write", fd)
                except OSError:
                    writev(fd, buffers[: len(buffers) // 2])  # a part may have arrived
                    raise
            return writev(fd, buffers)

        monkeypatch.setattr(os, "writev", faulty_writev)

    @contextlib.contextmanager
    def failing(self, *kinds: str, code: int) -> Iterator[None]:
        """Let these kinds of I/O fail with that error for a while."""
        self._errors = dict.fromkeys(kinds, code)
        try:
            yield
        finally:
            self._errors = {}

    def check(self, kind: str, path: object) -> None:
        """Raise if that kind is to fail."""
        if kind in self._errors:
            self.num_failures += 1
            code = self._errors[kind]
            raise OSError(code, f"injected: {os.strerror(code)}", str(path))

    def _is_inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._directory)

    def _wrap(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_inside(path):
                self.check(kind, path)
            return function(path, *args, **kwargs)

        return wrapped


class _FaultyFile(io.FileIO):
    faulty: FaultyIO

    def write(self, data: Any) -> int:
        try:
            self.faulty.check("write", self.name)
        except OSError:
            super().write(memoryview(data)[: len(data) // 2])  # a part may have arrived
            raise
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self.faulty.check("read", self.name)
        return super().readinto(buffer)
