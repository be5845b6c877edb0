"""Payloads and hashes for tests of the tiers: bytes, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.payload import BlockPayload, BlockTensor


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
