"""How an adapter talks to the benchmark: a line of JSON with a request comes in, one with its answer goes out.

Adapters run in environments that hold one peer and nothing of this project, so this module needs only the standard
library. It also says what every adapter works on, so that all of them do the same work.
"""

import contextlib
import importlib.util
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

# The keys and values of a prompt: 64 MiB in float16.
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, NUM_TOKENS = 16, 4, 64, 4096
# Appended to whatever was restored, which forces every copy that a lazy restore puts off.
APPENDED_TOKENS = 32

Operation = Callable[..., dict[str, Any]]


def make_tokens(num_tokens: int = NUM_TOKENS) -> list[int]:
    """The same token ids in every process."""
    return random.Random(0).choices(range(150_000), k=num_tokens)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._begin_s


def sync_files(directory: str) -> None:
    """Have the disk hold every file of a folder: what a peer without fsync leaves to the operating system."""
    for path in Path(directory).rglob("*"):
        if path.is_file():
            with _opened(path) as fd:
                os.fsync(fd)


def read_files(directory: Path) -> None:
    """Bring every file of a folder into the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.read_bytes()


def drop_files(directory: Path) -> None:
    """Drop every file of a folder from the page cache; only what is on the disk already can be dropped."""
    sync_files(str(directory))
    for path in directory.rglob("*"):
        if path.is_file():
            with _opened(path) as fd:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def bare_package(name: str, folder: str | None = None) -> None:
    """Make the modules of a package importable without running its ``__init__``, which imports more than is wanted.

    Args:
        name: of the package.
        folder: where it is; found among the installed ones if not given.
    """
    if folder is None:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{name} isn't an installed package")
        folder = spec.submodule_search_locations[0]
    package = ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package


def serve(operations: Mapping[str, Operation], distributions: tuple[str, ...]) -> None:
    """Answer requests from standard input until it ends.

    Args:
        operations: by name; each takes keyword arguments and returns what JSON can hold.
        distributions: whose versions ``versions`` reports.
    """
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def versions() -> dict[str, Any]:
        return {"python": platform.python_version(), **{name: version(name) for name in distributions}}

    known = {**operations, "versions": versions}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = known[request["operation"]](**request["arguments"])
        except Exception as exc:
            traceback.print_exc()
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
