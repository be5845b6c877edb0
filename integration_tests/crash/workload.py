"""What the killed processes do: two namespaces in one folder, chains, duplicates, touches, evictions, damage."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omlx_core.cache.block_hash import BlockHash, NamespaceHash, hash_block, hash_namespace
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import block_path

WAIT_S = 60.0
NAMESPACES: dict[str, NamespaceHash] = {name: hash_namespace({"model": name}) for name in "AB"}
AMPLE_BYTES = 10**9
TIGHT_BYTES = 34_000  # of about 3.5 kB a block


@dataclass(frozen=True)
class Operation:
    """One thing to do, followed by a flush.

    Attributes:
        verb: save, touch, damage (and read), reopen, or rebuild (without the index).
        namespace: whose.
        names: the blocks, each named by its path from the root: ``abc`` is the child of ``ab``.
    """

    verb: str
    namespace: str
    names: tuple[str, ...] = ()


def _operation(text: str) -> Operation:
    verb, namespace, *names = text.split()
    return Operation(verb, namespace, tuple(names))


OPERATIONS = tuple(
    map(
        _operation,
        (
            "save A a ab abc",
            "save B a ab",
            "save A abd a",
            "touch A ab",
            "save A x xy xyz",
            "touch B a",
            "save B p pq",
            "reopen A",
            "save A xyzw abd",
            "damage A xyzw",
            "save B pqr r",
            "save A abe z",
            "save A xyzw",
            "reopen B",
        ),
    )
)
REBUILD = _operation("rebuild A")
SCRIPTS = {"ample": (AMPLE_BYTES, (*OPERATIONS, REBUILD)), "tight": (TIGHT_BYTES, OPERATIONS)}


def all_blocks() -> list[tuple[str, str]]:
    """Namespace and name of every block that the operations write."""
    return sorted({(op.namespace, name) for op in OPERATIONS if op.verb == "save" for name in op.names})


def tokens_of(name: str) -> list[int]:
    return [ord(name[-1]), len(name), 7, 70000]


def hash_of(namespace: str, name: str) -> BlockHash:
    parent = hash_of(namespace, name[:-1]) if len(name) > 1 else NAMESPACES[namespace]
    return hash_block(parent, tokens_of(name))


def payload_of(namespace: str, name: str) -> BlockPayload:
    random = np.random.default_rng(zlib.crc32(f"{namespace}/{name}".encode()))
    keys = random.integers(0, 256, 2000, dtype=np.uint8)
    values = random.integers(0, 2**16, 500, dtype=np.uint16)
    return BlockPayload(
        {
            "layers.0.keys": BlockTensor("U8", keys.shape, memoryview(keys.tobytes())),
            "layers.0.values": BlockTensor("BF16", values.shape, memoryview(values.tobytes())),
        }
    )


class Workload:
    """Both namespaces' managers in one folder, and what the operations do with them."""

    def __init__(self, directory: Path, max_size_bytes: int) -> None:
        self._directory = directory
        self._max_size_bytes = max_size_bytes
        self.managers = {name: self._open(name) for name in NAMESPACES}

    def _open(self, namespace: str) -> PagedSSDCacheManager:
        manager = PagedSSDCacheManager(
            self._directory,
            max_size_bytes=self._max_size_bytes,
            namespace=NAMESPACES[namespace],
            description={"model": namespace},
        )
        # Before the next step: clean-up at opening is the writer's.
        manager.flush(WAIT_S)
        return manager

    def save(self, namespace: str, name: str) -> None:
        parent_hash = hash_of(namespace, name[:-1]) if len(name) > 1 else None
        self.managers[namespace].save_block(
            hash_of(namespace, name), parent_hash, tokens_of(name), payload_of(namespace, name)
        )

    def load(self, namespace: str, name: str) -> BlockPayload | None:
        return self.managers[namespace].load_block(hash_of(namespace, name), tokens_of(name))

    def perform(self, operation: Operation) -> None:
        manager = self.managers[operation.namespace]
        if operation.verb == "save":
            # What is queued while the writer is at work is written together: all of it, in every run.
            with held_up(manager):
                for name in operation.names:
                    self.save(operation.namespace, name)
        elif operation.verb == "touch":
            manager.touch([hash_of(operation.namespace, name) for name in operation.names])
        elif operation.verb == "damage":
            for name in operation.names:
                damage(block_path(self._directory, NAMESPACES[operation.namespace], hash_of(operation.namespace, name)))
                self.load(operation.namespace, name)
        elif operation.verb == "reopen":
            manager.close()
            self.managers[operation.namespace] = self._open(operation.namespace)
        elif operation.verb == "rebuild":
            self.close()
            for path in self._directory.glob("index.sqlite3*"):
                path.unlink()
            self.managers = {name: self._open(name) for name in NAMESPACES}
        else:
            raise ValueError(operation.verb)
        self.managers[operation.namespace].flush(WAIT_S)

    def held(self) -> list[tuple[str, str]]:
        """The blocks that are to be found."""
        return [block for block in all_blocks() if self.managers[block[0]].has_block(hash_of(*block))]

    def close(self) -> None:
        for manager in self.managers.values():
            manager.close()


@contextlib.contextmanager
def held_up(manager: PagedSSDCacheManager) -> Iterator[None]:
    """Let a manager's writer wait until the end: in telling of a block that can't be written, for lack of a parent."""
    is_waiting, may_go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        is_waiting.set()
        may_go_on.wait(WAIT_S)

    orphan, parent = BlockHash(b"o" * 32), BlockHash(b"p" * 32)
    manager.save_block(orphan, parent, [0], BlockPayload({}), wait)
    is_waiting.wait(WAIT_S)
    try:
        yield
    finally:
        may_go_on.set()


def damage(path: Path) -> None:
    """Flip the last bit of a file, if it is there, in place."""
    if path.exists():
        with open(path, "r+b", buffering=0) as file:
            file.seek(-1, 2)
            [last] = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
