"""What every store of blocks under the hot tier promises. A test class for a store derives from `StoreContract`.

class TestMyStore(StoreContract):
    @pytest.fixture
    def store(self):
        ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pytest

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW, Part, hash_part
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import SSDCacheStats

TOKENS = (1, 2, 3, 2**32 - 1)
WAIT_S = 30.0


class BlockStore(Protocol):
    """What `TieredCache` and `PagedCacheManager` use of a cold tier."""

    def has_block(self, block_hash: BlockHash) -> bool: ...

    def save_block(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        payload: BlockPayload,
        on_complete: Callable[[BlockHash, bool], None] | None = None,
        *,
        part: Part = ROWS,
    ) -> bool: ...

    def load_block(self, block_hash: BlockHash, token_ids: Sequence[int]) -> BlockPayload | None: ...

    def touch(self, block_hashes: Sequence[BlockHash]) -> None: ...

    def flush(self, timeout_s: float | None = None) -> bool: ...

    def stats(self) -> SSDCacheStats: ...

    def close(self) -> None: ...


class StoreContract:
    """The tests. Each gets an empty ``store`` with room for some dozens of small blocks."""

    @pytest.fixture
    def store(self) -> BlockStore:
        raise NotImplementedError

    @pytest.fixture
    def save(self, store, make_hash, make_payload) -> Callable[..., bool]:
        def save(name: int, parent: int | None = None) -> bool:
            parent_hash = None if parent is None else make_hash(parent)
            return store.save_block(make_hash(name), parent_hash, TOKENS, make_payload(name))

        return save

    def test_an_unknown_block_is_a_miss(self, store, make_hash) -> None:
        assert not store.has_block(make_hash(1))
        assert store.load_block(make_hash(1), TOKENS) is None

    def test_returns_what_was_saved_at_once_and_after_a_flush(self, store, save, make_hash, make_payload) -> None:
        assert save(1)
        assert store.has_block(make_hash(1))
        assert store.load_block(make_hash(1), TOKENS) == make_payload(1)
        assert store.flush(WAIT_S)
        assert store.has_block(make_hash(1))
        assert store.load_block(make_hash(1), TOKENS) == make_payload(1)

    def test_keeps_element_types_shapes_and_order_of_tensors_of_no_elements(
        self, store, make_hash, make_tensor
    ) -> None:
        payload = BlockPayload(
            {
                "scalar": make_tensor("I64", np.array(-7, dtype=np.int64)),
                "empty": make_tensor("F16", np.zeros((2, 0, 3), dtype=np.float16)),
                "matrix": make_tensor("BF16", np.arange(6, dtype=np.uint16).reshape(2, 3)),
            }
        )
        assert store.save_block(make_hash(1), None, TOKENS, payload)
        assert store.flush(WAIT_S)
        assert store.load_block(make_hash(1), TOKENS) == payload

    def test_other_tokens_under_the_same_hash_are_a_miss_and_take_nothing_away(self, store, save, make_hash) -> None:
        assert save(1)
        for _ in range(2):
            assert store.load_block(make_hash(1), (*TOKENS[:-1], 5)) is None
            assert store.load_block(make_hash(1), TOKENS[:-1]) is None
            assert store.flush(WAIT_S)
        assert store.load_block(make_hash(1), TOKENS) is not None

    def test_a_block_whose_parent_is_missing_is_not_there_after_a_flush(self, store, save, make_hash) -> None:
        save(2, parent=1)
        assert store.flush(WAIT_S)
        assert not store.has_block(make_hash(2))
        assert store.load_block(make_hash(2), TOKENS) is None

    def test_a_chain_saved_in_order_is_there_in_full(self, store, save, make_hash) -> None:
        assert all(save(number, parent=number - 1 if number else None) for number in range(5))
        assert store.flush(WAIT_S)
        assert all(store.has_block(make_hash(number)) for number in range(5))

    def test_parts_are_stored_beside_their_block(self, store, save, make_hash, make_payload) -> None:
        assert save(1)
        hashes = {part: hash_part(make_hash(1), part) for part in (WINDOW, CHECKPOINT)}
        for seed, (part, part_hash) in enumerate(hashes.items(), start=2):
            assert store.save_block(part_hash, make_hash(1), (), make_payload(seed), part=part)
        assert store.flush(WAIT_S)
        for seed, part_hash in enumerate(hashes.values(), start=2):
            assert store.has_block(part_hash)
            assert store.load_block(part_hash, ()) == make_payload(seed)

    def test_says_once_of_each_block_whether_it_is_stored(self, store, make_hash, make_payload) -> None:
        calls: list[tuple[BlockHash, bool]] = []
        for name, parent in ((1, None), (2, 1), (4, 3), (1, None)):
            parent_hash = None if parent is None else make_hash(parent)
            store.save_block(make_hash(name), parent_hash, TOKENS, make_payload(name), lambda *call: calls.append(call))
        assert store.flush(WAIT_S)
        assert calls == [(make_hash(name), name != 4) for name in (1, 2, 4, 1)]

    def test_saving_again_changes_nothing(self, store, save, make_hash, make_payload) -> None:
        assert save(1)
        assert save(1)
        assert store.flush(WAIT_S)
        assert save(1)
        assert store.flush(WAIT_S)
        assert store.load_block(make_hash(1), TOKENS) == make_payload(1)

    def test_touching_what_is_not_there_is_no_error(self, store, save, make_hash) -> None:
        assert save(1)
        store.touch([make_hash(1), make_hash(2)])
        store.touch([])
        assert store.flush(WAIT_S)
        assert store.has_block(make_hash(1))
        assert not store.has_block(make_hash(2))

    def test_counts_its_blocks(self, store, save) -> None:
        assert store.stats().num_blocks == 0
        for number in range(3):
            assert save(number)
        assert store.flush(WAIT_S)
        assert store.stats().num_blocks == 3

    def test_may_be_asked_by_several_threads(self, store, save, make_hash, make_payload) -> None:
        assert all(save(number) for number in range(8))
        wrong: list[int] = []

        def ask() -> None:
            for number in range(8):
                payload = store.load_block(make_hash(number), TOKENS)
                if payload != make_payload(number) or not store.has_block(make_hash(number)):
                    wrong.append(number)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert wrong == []

    def test_closing_twice_is_no_error(self, store, save) -> None:
        assert save(1)
        store.close()
        store.close()
