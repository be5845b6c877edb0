"""The contract of a store, in the situations that the SSD tier can be in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cache.store_contract import BlockStore, StoreContract

from omlx_core.cache.block_hash import NamespaceHash
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

Open = Callable[..., PagedSSDCacheManager]


class TestPagedSSDCacheManager(StoreContract):
    @pytest.fixture
    def store(self, open_cache: Open) -> BlockStore:
        return open_cache()


class TestPagedSSDCacheManagerBesideAnother(StoreContract):
    """A second one of the same namespace is open in the folder."""

    @pytest.fixture
    def store(self, open_cache: Open) -> BlockStore:
        open_cache()
        return open_cache()


class ReopenedCache:
    """An SSD cache that is closed and opened again whenever it has been flushed."""

    def __init__(self, open_cache: Open) -> None:
        self._open = open_cache
        self._cache = open_cache()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def flush(self, timeout_s: float | None = None) -> bool:
        self._cache.close()
        self._cache = self._open()
        return True


class TestPagedSSDCacheManagerReopened(StoreContract):
    @pytest.fixture
    def store(self, open_cache: Open) -> BlockStore:
        return ReopenedCache(open_cache)


class TestPagedSSDCacheManagerAfterAFullBudget(StoreContract):
    """Blocks of another namespace take up the whole budget, and make room."""

    test_counts_its_blocks = None  # what is counted is the whole folder

    @pytest.fixture
    def store(self, open_cache: Open, make_hash, make_payload) -> BlockStore:
        other = open_cache(size=20_000, namespace=NamespaceHash(b"o" * 32))
        for number in range(40):
            other.save_block(make_hash(number), None, (9,), make_payload(number, 1000))
        assert other.flush(30)
        assert other.stats().evictions > 0
        return open_cache(size=20_000)
