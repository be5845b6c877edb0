"""Payloads, hashes and folders for tests of the tiers: bytes, no model."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import ROWS, Part
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

NAMESPACE = NamespaceHash(b"n" * 32)
TOKENS = (1, 2, 3, 4)
WAIT_S = 30.0


@pytest.fixture
def make_tensor() -> Callable[..., BlockTensor]:
    def make(dtype: str, values: np.ndarray) -> BlockTensor:
        data = np.frombuffer(values.tobytes(), dtype=np.uint8).data
        return BlockTensor(dtype, values.shape, data)

    return make


@pytest.fixture
def make_payload(make_tensor: Callable[..., BlockTensor]) -> Callable[..., BlockPayload]:
    def make(seed: int = 0, size_bytes: int = 64) -> BlockPayload:
        values = np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)
        return BlockPayload({"layer.0.keys": make_tensor("U8", values)})

    return make


@pytest.fixture
def make_hash() -> Callable[[object], BlockHash]:
    def make(name: object) -> BlockHash:
        return BlockHash(hashlib.sha256(repr(name).encode()).digest())

    return make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def open_cache(directory: Path) -> Iterator[Callable[..., PagedSSDCacheManager]]:
    caches: list[PagedSSDCacheManager] = []

    def make(*, size: int = 10**9, namespace: NamespaceHash = NAMESPACE, **options: Any) -> PagedSSDCacheManager:
        options = {"description": {"model": "tiny"}, **options}
        caches.append(PagedSSDCacheManager(directory, max_size_bytes=size, namespace=namespace, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


@pytest.fixture
def cache(open_cache: Callable[..., PagedSSDCacheManager]) -> PagedSSDCacheManager:
    return open_cache()


@pytest.fixture
def save(make_payload: Callable[..., BlockPayload], make_hash: Callable[[object], BlockHash]) -> Callable[..., bool]:
    """Store a block of a name under a parent's name, wait, and say whether it is on disk."""

    def store(
        cache: PagedSSDCacheManager, name: object, parent: object = None, *, size_bytes: int = 64, part: Part = ROWS
    ) -> bool:
        calls: list[tuple[BlockHash, bool, str]] = []

        def on_complete(block_hash: BlockHash, is_on_disk: bool) -> None:
            calls.append((block_hash, is_on_disk, threading.current_thread().name))

        parent_hash = None if parent is None else make_hash(parent)
        payload = make_payload(zlib.crc32(repr(name).encode()), size_bytes)
        assert cache.save_block(make_hash(name), parent_hash, TOKENS, payload, on_complete, part=part)
        assert cache.flush(WAIT_S)
        [(block_hash, is_on_disk, thread)] = calls
        assert (block_hash, thread) == (make_hash(name), "omlx-ssd-writer")
        return is_on_disk

    return store
