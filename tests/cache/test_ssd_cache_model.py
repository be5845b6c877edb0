"""The SSD tier against a dictionary, in any order of operations, by three managers in one folder.

The model knows a block by its namespace and number and keeps, of the real thing, only what decides who is evicted:
size, depth, part, and a logical time of last use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from ssd_audit import audit_directory

from omlx_core.cache.block_file import encode_block
from omlx_core.cache.block_hash import BlockHash, NamespaceHash, hash_block, hash_namespace
from omlx_core.cache.block_header import BlockIdentity, encode_token_ids
from omlx_core.cache.parts import CHECKPOINT, ROWS, Part, hash_part
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_check import FindingKind
from omlx_core.cache.ssd_layout import block_path

WAIT_S = 30.0
NUM_BLOCKS = 10
NUM_CHECKPOINTS = 6
MAX_SIZE_BYTES = 6_000  # between five and seven files
CHECKPOINT_SHARE = 0.25  # one or two
NAMESPACES = [hash_namespace({"model": name}) for name in "AB"]
OWNERS = [0, 0, 1]  # two managers share a namespace, the third has the other

Key = tuple[int, int]
"""A namespace and a number in its binary tree of blocks; from `NUM_BLOCKS` on, checkpoints of its first blocks."""

managers = st.integers(0, len(OWNERS) - 1)
checkpoints = st.integers(NUM_BLOCKS, NUM_BLOCKS + NUM_CHECKPOINTS - 1)
numbers = st.one_of(st.integers(0, NUM_BLOCKS - 1), checkpoints)


def part_of(key: Key) -> Part:
    return ROWS if key[1] < NUM_BLOCKS else CHECKPOINT


def parent_of(key: Key) -> Key | None:
    if part_of(key) == CHECKPOINT:
        return key[0], key[1] - NUM_BLOCKS
    return (key[0], (key[1] - 1) // 2) if key[1] else None


def ancestors_of(key: Key) -> Iterator[Key]:
    parent = parent_of(key)
    while parent is not None:
        yield parent
        parent = parent_of(parent)


def depth_of(key: Key) -> int:
    return len(list(ancestors_of(key)))


def tokens_of(key: Key) -> list[int]:
    return [key[1], 100_000] if part_of(key) == ROWS else []


def hash_of(key: Key) -> BlockHash:
    parent = parent_of(key)
    if parent is not None and part_of(key) == CHECKPOINT:
        return hash_part(hash_of(parent), CHECKPOINT)
    return hash_block(NAMESPACES[key[0]] if parent is None else hash_of(parent), tokens_of(key))


def payload_of(key: Key) -> BlockPayload:
    size_bytes = 100 + 150 * (key[1] % 4)
    return BlockPayload({"kv": BlockTensor("U8", (size_bytes,), memoryview(repr(key).encode().ljust(size_bytes)))})


def file_bytes(key: Key) -> int:
    parent = parent_of(key)
    identity = BlockIdentity(
        NamespaceHash(NAMESPACES[key[0]]),
        hash_of(key),
        None if parent is None else hash_of(parent),
        depth_of(key),
        encode_token_ids(tokens_of(key)),
        part_of(key),
    )
    return encode_block(identity, payload_of(key)).size_bytes


HASHES = {
    (namespace, number): hash_of((namespace, number))
    for namespace in (0, 1)
    for number in range(NUM_BLOCKS + NUM_CHECKPOINTS)
}
SIZES = {key: file_bytes(key) for key in HASHES}


@dataclass
class ModelBlock:
    last_used: int


class Model:
    """What must be on disk."""

    def __init__(self) -> None:
        self.blocks: dict[Key, ModelBlock] = {}

    def newest(self) -> int:
        return max((block.last_used for block in self.blocks.values()), default=0)

    def size_bytes(self) -> int:
        return sum(SIZES[key] for key in self.blocks)

    def checkpoint_bytes(self) -> int:
        return sum(SIZES[key] for key in self.blocks if part_of(key) == CHECKPOINT)

    def chain(self, key: Key) -> list[Key]:
        """The block, if it is there, and those before it up to the first that isn't."""
        found = []
        for each in (key, *ancestors_of(key)):
            if each not in self.blocks:
                break
            found.append(each)
        return found

    def use(self, key: Key) -> None:
        now = self.newest() + 1
        for each in self.chain(key):
            self.blocks[each].last_used = now

    def use_before(self, key: Key) -> int:
        """Stamp the blocks before a new one, unless they are the latest already; its own stamp."""
        parent = parent_of(key)
        if parent is None:
            return self.newest() + 1
        if self.blocks[parent].last_used != self.newest():
            self.use(parent)
        return self.blocks[parent].last_used

    def order(self) -> list[Key]:
        """Who leaves first: unused for longest, then the deepest."""

        def rank(key: Key) -> tuple[int, int, bytes, bytes]:
            return self.blocks[key].last_used, -depth_of(key), HASHES[key], NAMESPACES[key[0]]

        return sorted(self.blocks, key=rank)

    def save(self, key: Key) -> bool:
        if key in self.blocks:
            self.use(key)
            return True
        parent = parent_of(key)
        if parent is not None and parent not in self.blocks:
            return False
        self.use_before(key)
        kept = self.chain(parent) if parent is not None else []
        victims: list[Key] = []
        if part_of(key) == CHECKPOINT:
            excess_bytes = self.checkpoint_bytes() + SIZES[key] - int(MAX_SIZE_BYTES * CHECKPOINT_SHARE)
            candidates = [candidate for candidate in self.order() if part_of(candidate) == CHECKPOINT]
            victims += self.first(candidates, excess_bytes)
        excess_bytes = self.size_bytes() - sum(SIZES[victim] for victim in victims) + SIZES[key] - MAX_SIZE_BYTES
        others = self.first([each for each in self.order() if each not in (*kept, *victims)], excess_bytes)
        victims += others
        if sum(SIZES[other] for other in others) < excess_bytes:
            return False
        for victim in victims:
            del self.blocks[victim]
        self.blocks[key] = ModelBlock(self.use_before(key))
        return True

    @staticmethod
    def first(candidates: list[Key], size_bytes: int) -> list[Key]:
        """As many of them as it takes to free so much, or all."""
        taken = []
        for candidate in candidates:
            if size_bytes <= 0:
                break
            taken.append(candidate)
            size_bytes -= SIZES[candidate]
        return taken

    def orphans(self) -> set[Key]:
        """Blocks whose parent was damaged: valid, and reachable again once that one is."""
        return {key for key in self.blocks if (parent := parent_of(key)) is not None and parent not in self.blocks}


class SSDCacheMachine(RuleBasedStateMachine):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.model = Model()
        self.managers = [self.open(owner) for owner in OWNERS]

    def open(self, namespace: int) -> PagedSSDCacheManager:
        return PagedSSDCacheManager(
            self.directory,
            max_size_bytes=MAX_SIZE_BYTES,
            checkpoint_share=CHECKPOINT_SHARE,
            namespace=NAMESPACES[namespace],
            description={"namespace": namespace},
        )

    def teardown(self) -> None:
        for manager in self.managers:
            manager.close()

    @rule(index=managers, number=numbers)
    def save(self, index: int, number: int) -> None:
        self.save_all(index, [number])

    @rule(index=managers, leaf=numbers)
    def save_chain(self, index: int, leaf: int) -> None:
        self.save_all(index, [leaf, *(key[1] for key in ancestors_of((0, leaf)))])

    def save_all(self, index: int, numbers: list[int]) -> None:
        manager = self.managers[index]
        done: list[tuple[BlockHash, bool]] = []
        expected = []
        for number in sorted(numbers):  # a parent's number is the smaller one
            key = (OWNERS[index], number)
            parent = parent_of(key)
            parent_hash = None if parent is None else HASHES[parent]
            assert manager.save_block(
                HASHES[key],
                parent_hash,
                tokens_of(key),
                payload_of(key),
                lambda *call: done.append(call),
                part=part_of(key),
            )
            assert manager.has_block(HASHES[key])
            assert manager.load_block(HASHES[key], tokens_of(key)) == payload_of(key)
            expected.append((HASHES[key], self.model.save(key)))
        assert manager.flush(WAIT_S)
        assert done == expected

    @rule(index=managers, number=numbers)
    def load(self, index: int, number: int) -> None:
        key = (OWNERS[index], number)
        expected = payload_of(key) if key in self.model.blocks else None
        assert self.managers[index].load_block(HASHES[key], tokens_of(key)) == expected

    @rule(index=managers, number=numbers)
    def load_with_other_tokens(self, index: int, number: int) -> None:
        assert self.managers[index].load_block(HASHES[OWNERS[index], number], [number, 100_001]) is None

    @rule(index=managers, leaf=numbers)
    def touch(self, index: int, leaf: int) -> None:
        key = (OWNERS[index], leaf)
        self.managers[index].touch([HASHES[each] for each in reversed([key, *ancestors_of(key)])])
        now = self.model.newest() + 1
        for each in (key, *ancestors_of(key)):
            if each in self.model.blocks:
                self.model.blocks[each].last_used = now

    @rule(index=managers)
    def reopen(self, index: int) -> None:
        self.managers[index].close()
        self.managers[index] = self.open(OWNERS[index])

    @rule(index=managers, number=numbers, at=st.integers(0, 10_000), is_removed=st.booleans())
    def damage_and_read(self, index: int, number: int, at: int, is_removed: bool) -> None:
        key = (OWNERS[index], number)
        path = block_path(self.directory, NAMESPACES[key[0]], HASHES[key])
        if key not in self.model.blocks:
            assert not path.exists()
            return
        if is_removed:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            # In the data: a header that names another format or version is no proof of damage, and its row stays.
            content[-1 - at % 16] ^= 1 << at % 8
            path.write_bytes(content)
        assert self.managers[index].load_block(HASHES[key], tokens_of(key)) is None
        assert not self.managers[index].has_block(HASHES[key])
        del self.model.blocks[key]

    @invariant()
    def agrees_with_the_model(self) -> None:
        for manager in self.managers:
            assert manager.flush(WAIT_S)
        for manager, namespace in zip(self.managers, OWNERS, strict=True):
            found = {
                number for number in range(NUM_BLOCKS + NUM_CHECKPOINTS) if manager.has_block(HASHES[namespace, number])
            }
            assert found == {key[1] for key in self.model.blocks if key[0] == namespace}
        manager = self.managers[0]
        entries = sorted(manager.entries(), key=lambda e: (e.last_used, -e.depth, e.block_hash, e.namespace))
        names = {(NAMESPACES[key[0]], block_hash): key for key, block_hash in HASHES.items()}
        assert [names[entry.namespace, entry.block_hash] for entry in entries] == self.model.order()
        stats = manager.stats()
        assert [entry.part for entry in entries] == [part_of(key) for key in self.model.order()]
        assert (stats.num_blocks, stats.size_bytes) == (len(self.model.blocks), self.model.size_bytes())
        assert stats.checkpoint_bytes == self.model.checkpoint_bytes() <= MAX_SIZE_BYTES * CHECKPOINT_SHARE
        assert stats.size_bytes <= MAX_SIZE_BYTES
        findings = [(finding.kind, finding.path.stem) for finding in manager.check().findings]
        orphans = sorted(HASHES[key].hex() for key in self.model.orphans())
        assert sorted(findings) == [(FindingKind.MISSING_PARENT, name) for name in orphans]
        audited = audit_directory(
            self.directory,
            max_size_bytes=MAX_SIZE_BYTES,
            checkpoint_share=CHECKPOINT_SHARE,
            hashes_are_of_tokens=True,
        )
        assert [finding for finding in audited if not finding.endswith("its parent is missing")] == []
        assert len(audited) == len(orphans)


def test_behaves_like_a_dictionary_with_a_budget(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing here loses power, and thousands of syncs take minutes.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    run_state_machine_as_test(
        lambda: SSDCacheMachine(tmp_path_factory.mktemp("model") / "kv"),
        settings=settings(max_examples=25, stateful_step_count=25, deadline=None),
    )
