from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omlx_core.cache import ssd_budget, ssd_cache, ssd_owner, ssd_publisher, ssd_writer
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import block_path, temporary_path
from omlx_core.errors import CacheDirectoryError

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)
TOKENS = (1, 2, 3, 4)
WAIT_S = 30.0


class Recorder:
    """Collects the calls of `on_complete`."""

    def __init__(self) -> None:
        self.calls: list[tuple[BlockHash, bool]] = []

    def __call__(self, block_hash: BlockHash, is_on_disk: bool) -> None:
        self.calls.append((block_hash, is_on_disk))


class Gate:
    """An `on_complete` that holds the writer until it's opened."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, block_hash: BlockHash, is_on_disk: bool) -> None:
        self.is_reached.set()
        self.open.wait(WAIT_S)


OpenCache = Callable[..., PagedSSDCacheManager]


@pytest.fixture
def file_bytes(open_cache: OpenCache, save: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Size of the file of a block that `save` stores; the same for every name of one depth digit."""
    cache = PagedSSDCacheManager(
        tmp_path_factory.mktemp("sample"), max_size_bytes=10**9, namespace=NAMESPACE, description={}
    )
    try:
        assert save(cache, "sample")
        assert save(cache, "child", "sample")
        root, child = sorted(path.stat().st_size for path in cache._directory.rglob("*.safetensors"))
        assert root < child, "a child's file names its parent"
        return child
    finally:
        cache.close()


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*/??/*"))


def names_on_disk(directory: Path, namespace: NamespaceHash = NAMESPACE) -> set[str]:
    return {path.name for path in directory.glob(f"{namespace.hex()}/??/*")}


# Round trip


def test_a_later_process_reads_back_what_one_wrote(open_cache, make_hash, make_payload) -> None:
    payload = make_payload(1, 1000)
    first = open_cache()
    assert first.save_block(make_hash(1), None, TOKENS, payload)
    first.close()
    second = open_cache()
    assert second.has_block(make_hash(1))
    assert second.load_block(make_hash(1), TOKENS) == payload
    assert not second.has_block(make_hash(2))
    assert second.load_block(make_hash(2), TOKENS) is None
    stats = second.stats()
    assert (stats.num_blocks, stats.blocks_read, stats.bytes_read, stats.corrupt_blocks) == (1, 1, 1000, 0)
    assert first.stats().bytes_written == stats.size_bytes == bytes_on_disk(second._directory)


def test_several_threads_may_load_at_once(cache, save, make_hash) -> None:
    assert all(save(cache, number) for number in range(4))
    loaded: list[bool] = []

    def load() -> None:
        for number in range(4):
            loaded.append(cache.load_block(make_hash(number), TOKENS) is not None)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert loaded == [True] * 16


def test_other_tokens_under_the_same_hash_are_a_miss_that_deletes_nothing(cache, save, make_hash) -> None:
    save(cache, 1)
    assert cache.load_block(make_hash(1), (1, 2, 3, 5)) is None
    assert cache.flush(WAIT_S)
    assert cache.load_block(make_hash(1), TOKENS) is not None


def test_a_second_manager_finds_a_new_block_without_reopening(open_cache, save, make_hash) -> None:
    writer, reader = open_cache(), open_cache()
    assert not reader.has_block(make_hash(1))
    save(writer, 1)
    assert reader.has_block(make_hash(1))
    assert reader.load_block(make_hash(1), TOKENS) is not None


def test_the_exit_of_a_process_writes_what_is_queued(directory, open_cache, make_hash) -> None:
    code = """
import atexit, pathlib, sys, threading
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
cache = PagedSSDCacheManager(
    pathlib.Path(sys.argv[1]), max_size_bytes=10**9, namespace=bytes.fromhex(sys.argv[2]), description={}
)
is_exiting = threading.Event()
atexit.register(is_exiting.set)
payload = BlockPayload({"keys": BlockTensor("U8", (4,), memoryview(b"1234"))})
parent = None
for block_hash in map(bytes.fromhex, sys.argv[3:]):
    cache.save_block(block_hash, parent, (1, 2, 3, 4), payload, lambda *_: is_exiting.wait())
    parent = block_hash
"""
    hashes = [make_hash(number) for number in range(10)]
    done = subprocess.run(
        [sys.executable, "-c", code, directory, NAMESPACE.hex(), *(each.hex() for each in hashes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(ssd_cache.__file__).parents[2])},
    )
    assert (done.stderr, done.returncode) == ("", 0)
    cache = open_cache()
    assert all(cache.load_block(each, TOKENS) is not None for each in hashes)


# Queue


def test_a_queued_block_is_found_before_it_is_written(cache, make_hash, make_payload) -> None:
    gate = Gate()
    cache.save_block(make_hash("gate"), None, TOKENS, make_payload(), gate)
    assert gate.is_reached.wait(WAIT_S)
    payload = make_payload(1)
    assert cache.save_block(make_hash(1), None, TOKENS, payload)
    assert cache.has_block(make_hash(1))
    assert cache.load_block(make_hash(1), TOKENS) is payload
    assert cache.load_block(make_hash(1), (9, 9, 9, 9)) is None
    assert (cache.stats().queued_blocks, cache.stats().queued_bytes) == (1, 64)
    gate.open.set()
    assert cache.flush(WAIT_S)
    assert cache.load_block(make_hash(1), TOKENS) is not payload
    assert (cache.stats().queued_blocks, cache.stats().queued_bytes) == (0, 0)


def test_a_full_queue_refuses_a_block(open_cache, make_hash, make_payload) -> None:
    cache = open_cache(max_queued_bytes=100)
    gate, refused = Gate(), Recorder()
    cache.save_block(make_hash("gate"), None, TOKENS, make_payload(), gate)
    assert gate.is_reached.wait(WAIT_S)
    assert cache.save_block(make_hash(1), None, TOKENS, make_payload(size_bytes=1000))
    assert not cache.save_block(make_hash(2), None, TOKENS, make_payload(size_bytes=1), refused)
    assert not cache.has_block(make_hash(2))
    gate.open.set()
    assert cache.flush(WAIT_S)
    assert cache.has_block(make_hash(1))
    assert refused.calls == []


def test_a_written_payload_is_not_kept_in_memory(cache, make_hash) -> None:
    class Owner(bytearray):
        pass

    owner = Owner(64)
    freed = threading.Event()
    weakref.finalize(owner, freed.set)
    payload = BlockPayload({"keys": BlockTensor("U8", (64,), memoryview(owner).toreadonly())})
    cache.save_block(make_hash(1), None, TOKENS, payload)
    del owner, payload
    assert freed.wait(WAIT_S)


def test_a_block_is_not_written_twice(open_cache, save, monkeypatch) -> None:
    first, second = open_cache(), open_cache()
    assert save(first, 1)
    monkeypatch.setattr(ssd_publisher, "write_block_file", None)
    assert save(first, 1)
    assert save(second, 1)
    assert (first.stats().blocks_written, second.stats().blocks_written) == (1, 0)


def test_losing_the_race_to_publish_is_not_an_error(open_cache, save, monkeypatch, directory) -> None:
    first, second = open_cache(), open_cache()
    write = ssd_publisher.write_block_file

    def write_after_the_other(path: Path, block: Any) -> None:
        monkeypatch.setattr(ssd_publisher, "write_block_file", write)
        assert save(second, 1)
        write(path, block)

    monkeypatch.setattr(ssd_publisher, "write_block_file", write_after_the_other)
    assert save(first, 1)
    assert (first.stats().blocks_written, second.stats().blocks_written) == (0, 1)
    assert len(names_on_disk(directory)) == 1
    assert first.stats().size_bytes == bytes_on_disk(directory)


def test_a_child_is_not_published_without_its_parent(cache, save, make_hash, directory, caplog) -> None:
    assert not save(cache, "child", "parent")
    assert not cache.has_block(make_hash("child"))
    assert names_on_disk(directory) == set()
    assert caplog.records == []
    assert save(cache, "parent")
    assert save(cache, "child", "parent")


def test_a_child_is_not_published_if_its_parent_goes_while_it_is_written(
    cache, save, make_hash, monkeypatch, directory
) -> None:
    save(cache, "parent")
    write = ssd_publisher.write_block_file

    def lose_parent(path: Path, block: Any) -> None:
        with cache._index.transaction():
            cache._index.remove(NAMESPACE, make_hash("parent"))
        write(path, block)

    monkeypatch.setattr(ssd_publisher, "write_block_file", lose_parent)
    assert not save(cache, "child", "parent")
    assert not any(make_hash("child").hex() in name for name in names_on_disk(directory))


def test_a_failing_callback_does_not_stop_the_writer(cache, save, make_hash, make_payload, caplog) -> None:
    def fail(block_hash: BlockHash, is_on_disk: bool) -> None:
        raise RuntimeError("callback")

    cache.save_block(make_hash(1), None, TOKENS, make_payload(), fail)
    assert save(cache, 2)
    assert "on_complete failed" in caplog.text


def test_flush_returns_false_when_the_time_is_too_short(cache, make_hash, make_payload) -> None:
    gate = Gate()
    cache.save_block(make_hash(1), None, TOKENS, make_payload(), gate)
    assert not cache.flush(0.01)
    gate.open.set()
    assert cache.flush(WAIT_S)


def test_close_writes_what_is_queued_and_refuses_more(cache, make_hash, make_payload) -> None:
    done = Recorder()
    for number in range(5):
        cache.save_block(make_hash(number), None, TOKENS, make_payload(number), done)
    cache.close()
    cache.close()
    assert done.calls == [(make_hash(number), True) for number in range(5)]
    assert not cache.save_block(make_hash(9), None, TOKENS, make_payload(), done)
    cache.touch([make_hash(0)])
    assert cache.flush()
    assert not cache.has_block(make_hash(0))
    assert len(done.calls) == 5
    assert cache.stats().num_blocks == 5


def test_close_gives_up_in_time_and_says_so_to_every_caller(
    open_cache, make_hash, make_payload, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(ssd_writer, "_GIVE_UP_S", 0.0)
    cache, gate, done = open_cache(), Gate(), Recorder()
    cache.save_block(make_hash("gate"), None, TOKENS, make_payload(), gate)
    assert gate.is_reached.wait(WAIT_S)
    for number in range(3):
        cache.save_block(make_hash(number), None, TOKENS, make_payload(), done)
    cache.close(timeout_s=0.0)
    assert "given up" in caplog.text
    gate.open.set()
    cache._writer._thread.join(WAIT_S)
    assert done.calls == [(make_hash(number), False) for number in range(3)]


# Eviction


def test_evicts_in_exact_order_of_use_also_after_reopening(open_cache, save, make_hash, file_bytes) -> None:
    cache = open_cache(size=4 * file_bytes)
    for number in range(4):
        assert save(cache, number)
    cache.touch([make_hash(0)])
    cache.close()

    cache = open_cache(size=4 * file_bytes)
    cache.touch([make_hash(2)])
    order = []
    for number in range(10, 14):
        before = {n for n in range(14) if cache.has_block(make_hash(n))}
        assert save(cache, number)
        order += sorted(before - {n for n in range(14) if cache.has_block(make_hash(n))})
    assert order == [1, 3, 0, 2]
    assert cache.stats().evictions == 4


def test_evicts_leaves_before_their_parents(open_cache, save, make_hash, file_bytes) -> None:
    cache = open_cache(size=4 * file_bytes)
    for name, parent in (("a", None), ("ab", "a"), ("abc", "ab"), ("x", None)):
        assert save(cache, name, parent)
    gone = []
    for name in ("y", "z", "w"):
        assert save(cache, name)
        gone.append([old for old in ("a", "ab", "abc", "x") if not cache.has_block(make_hash(old))])
    assert gone == [["abc"], ["ab", "abc"], ["a", "ab", "abc"]]


def test_continuing_a_chain_does_not_evict_it(open_cache, save, make_hash, file_bytes) -> None:
    cache = open_cache(size=3 * file_bytes)
    assert save(cache, "a")
    assert save(cache, "ab", "a")
    assert save(cache, "x")
    assert save(cache, "abc", "ab")
    assert [cache.has_block(make_hash(name)) for name in ("a", "ab", "abc", "x")] == [True, True, True, False]


def test_a_chain_in_hand_is_not_evicted_by_others_while_its_next_block_is_written(
    open_cache, save, make_hash, file_bytes, monkeypatch
) -> None:
    first, second = open_cache(size=3 * file_bytes), open_cache(size=3 * file_bytes)
    assert save(first, "a")
    assert save(first, "x")
    write = ssd_publisher.write_block_file

    def let_the_other_evict(path: Path, block: Any) -> None:
        monkeypatch.setattr(ssd_publisher, "write_block_file", write)
        assert save(second, "y")
        write(path, block)

    monkeypatch.setattr(ssd_publisher, "write_block_file", let_the_other_evict)
    assert save(first, "ab", "a")
    assert [first.has_block(make_hash(name)) for name in ("a", "ab", "x", "y")] == [True, True, False, True]


def test_a_chain_longer_than_the_budget_keeps_its_trunk(open_cache, save, make_hash, file_bytes, caplog) -> None:
    cache = open_cache(size=2 * file_bytes)
    assert save(cache, "a")
    assert save(cache, "ab", "a")
    assert not save(cache, "abc", "ab")
    assert not save(cache, "abd", "ab")
    assert cache.has_block(make_hash("a"))
    assert cache.has_block(make_hash("ab"))
    assert cache.stats().write_errors == 0
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_block_larger_than_the_budget_evicts_nothing(open_cache, save, make_hash, file_bytes, caplog) -> None:
    cache = open_cache(size=2 * file_bytes)
    assert save(cache, 1)
    assert not save(cache, 2, size_bytes=2 * file_bytes)
    assert cache.has_block(make_hash(1))
    assert "too small" in caplog.text


def test_the_budget_holds_over_all_namespaces_at_every_moment(
    open_cache, save, directory, file_bytes, monkeypatch, make_hash
) -> None:
    size = 3 * file_bytes
    caches = [open_cache(size=size), open_cache(size=size, namespace=OTHER)]
    largest = 0
    write = ssd_publisher.write_block_file

    def write_and_measure(path: Path, block: Any) -> None:
        nonlocal largest
        write(path, block)
        largest = max(largest, bytes_on_disk(directory))

    monkeypatch.setattr(ssd_publisher, "write_block_file", write_and_measure)
    for number in range(12):
        assert save(caches[number % 2], number)
    assert 2 * file_bytes < largest <= size
    assert caches[0].stats().size_bytes == bytes_on_disk(directory)
    assert caches[0].stats().num_blocks == 3
    # The same hash in two namespaces is two blocks.
    assert not caches[0].has_block(make_hash(11))
    assert caches[1].has_block(make_hash(11))


def test_a_smaller_budget_is_enforced_at_opening(open_cache, save, make_hash, directory, file_bytes) -> None:
    cache = open_cache()
    for number in range(5):
        save(cache, number)
    cache.close()
    cache = open_cache(size=2 * file_bytes)
    assert cache.flush(WAIT_S)
    assert bytes_on_disk(directory) <= 2 * file_bytes
    assert [cache.has_block(make_hash(number)) for number in range(5)] == [False, False, False, True, True]


def test_an_eviction_elsewhere_is_a_miss_and_no_damage(open_cache, save, make_hash, file_bytes) -> None:
    reader, writer = open_cache(), open_cache(size=file_bytes)
    save(reader, 1)
    save(writer, 2)
    assert reader.load_block(make_hash(1), TOKENS) is None
    assert reader.flush(WAIT_S)
    assert not reader.has_block(make_hash(1))
    assert reader.stats().corrupt_blocks == 0


@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["save", "touch", "reopen", "delete"]), st.integers(0, 7)), min_size=1, max_size=14
    )
)
def test_behaves_like_a_dictionary_that_may_forget(tmp_path_factory: pytest.TempPathFactory, steps) -> None:
    directory = tmp_path_factory.mktemp("model")
    # A binary tree of blocks: the parent of n is (n - 1) // 2.
    hashes = [BlockHash(bytes([number + 1]) * 32) for number in range(8)]
    payloads = [
        BlockPayload({"keys": BlockTensor("U8", (100 + number,), memoryview(bytes([number]) * (100 + number)))})
        for number in range(8)
    ]

    def reopen() -> PagedSSDCacheManager:
        return PagedSSDCacheManager(directory, max_size_bytes=4000, namespace=NAMESPACE, description={})

    cache = reopen()
    try:
        for action, number in steps:
            parent = hashes[(number - 1) // 2] if number else None
            if action == "save":
                is_parent_there = parent is None or cache.has_block(parent)
                done = Recorder()
                cache.save_block(hashes[number], parent, [number], payloads[number], done)
                assert cache.flush(WAIT_S)
                assert done.calls == [(hashes[number], is_parent_there)]
            elif action == "touch":
                cache.touch([hashes[number]])
            elif action == "delete":
                block_path(directory, NAMESPACE, hashes[number]).unlink(missing_ok=True)
                assert cache.load_block(hashes[number], [number]) is None
            else:
                cache.close()
                cache = reopen()
            assert cache.flush(WAIT_S)
            held = [number for number in range(8) if cache.has_block(hashes[number])]
            assert names_on_disk(directory) == {f"{hashes[number].hex()}.safetensors" for number in held}
            assert cache.stats().num_blocks == len(held)
            assert cache.stats().size_bytes == bytes_on_disk(directory) <= 4000
            for each in held:
                assert cache.load_block(hashes[each], [each]) == payloads[each]
    finally:
        cache.close()


# Damage


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_bit, damage_truncate, damage_remove])
def test_a_damaged_block_is_dropped_counted_and_written_anew(
    cache, save, make_hash, directory, caplog, damage: Callable[[Path], None]
) -> None:
    save(cache, 1)
    save(cache, 2)
    path = block_path(directory, NAMESPACE, make_hash(1))
    damage(path)
    for _ in range(2):
        assert cache.load_block(make_hash(1), TOKENS) is None
        assert not cache.has_block(make_hash(1))
        assert cache.flush(WAIT_S)
    assert not path.exists()
    stats = cache.stats()
    assert (stats.corrupt_blocks, stats.num_blocks, stats.size_bytes) == (1, 1, bytes_on_disk(directory))
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert save(cache, 1)
    assert cache.load_block(make_hash(1), TOKENS) is not None


def test_a_block_file_under_another_name_is_never_served(cache, save, make_hash, directory) -> None:
    save(cache, 1)
    save(cache, 2)
    paths = [block_path(directory, NAMESPACE, make_hash(number)) for number in (1, 2)]
    paths[0].write_bytes(paths[1].read_bytes())
    assert cache.load_block(make_hash(1), TOKENS) is None
    assert cache.load_block(make_hash(2), TOKENS) is not None


def test_a_block_that_was_replaced_meanwhile_is_not_dropped(
    open_cache, save, make_hash, make_payload, directory
) -> None:
    cache, other = open_cache(), open_cache()
    save(cache, 1)
    damage_bit(block_path(directory, NAMESPACE, make_hash(1)))
    gate = Gate()
    cache.save_block(make_hash("gate"), None, TOKENS, make_payload(), gate)
    assert gate.is_reached.wait(WAIT_S)
    assert cache.load_block(make_hash(1), TOKENS) is None
    assert other.load_block(make_hash(1), TOKENS) is None
    assert save(other, 1)
    gate.open.set()
    assert cache.flush(WAIT_S)
    assert cache.has_block(make_hash(1))
    assert cache.load_block(make_hash(1), TOKENS) is not None


def fail_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(ssd_cache, "read_block_into", fail)


def test_a_transient_read_error_deletes_nothing_and_is_repaired_by_the_next_save(
    cache, save, make_hash, directory, monkeypatch
) -> None:
    save(cache, 1)
    path = block_path(directory, NAMESPACE, make_hash(1))
    inode = path.stat().st_ino
    with monkeypatch.context() as patch:
        fail_reading(patch)
        assert cache.load_block(make_hash(1), TOKENS) is None
    assert cache.flush(WAIT_S)
    assert path.stat().st_ino == inode
    assert not cache.has_block(make_hash(1))
    assert save(cache, 1)
    assert path.stat().st_ino != inode
    assert cache.has_block(make_hash(1))
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.stats().size_bytes == bytes_on_disk(directory)


def test_a_file_that_can_be_read_again_is_found_again(cache, save, make_hash, monkeypatch) -> None:
    save(cache, 1)
    with monkeypatch.context() as patch:
        fail_reading(patch)
        assert cache.load_block(make_hash(1), TOKENS) is None
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.has_block(make_hash(1))


@pytest.mark.parametrize("version", [1, 3])
def test_a_file_of_another_version_is_a_miss_and_stays(cache, save, make_hash, directory, version: int) -> None:
    save(cache, 1)
    path = block_path(directory, NAMESPACE, make_hash(1))
    other = path.read_bytes().replace(b'"format_version":"2"', f'"format_version":"{version}"'.encode())
    path.write_bytes(other)
    assert cache.load_block(make_hash(1), TOKENS) is None
    assert cache.flush(WAIT_S)
    assert not cache.has_block(make_hash(1))
    assert path.read_bytes() == other


def test_a_file_of_an_older_version_is_replaced_when_its_block_is_computed_again(
    open_cache, save, make_hash, directory
) -> None:
    cache = open_cache()
    save(cache, 1)
    cache.close()
    path = block_path(directory, NAMESPACE, make_hash(1))
    path.write_bytes(path.read_bytes().replace(b'"format_version":"2"', b'"format_version":"1"'))
    connection = sqlite3.connect(directory / "index.sqlite3")
    connection.execute("PRAGMA user_version=1")
    connection.close()
    cache = open_cache()
    assert cache.stats().num_blocks == 0
    assert save(cache, 1)
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.check().is_clean


def test_a_failing_database_is_a_miss(cache, save, make_hash) -> None:
    save(cache, 1)
    cache._index._reader.close()
    assert not cache.has_block(make_hash(1))


def test_a_lost_index_is_rebuilt_with_its_chains(open_cache, save, make_hash, directory) -> None:
    cache = open_cache()
    save(cache, "a")
    save(cache, "ab", "a")
    size_bytes = cache.stats().size_bytes
    cache.close()
    (directory / "index.sqlite3").unlink()
    cache = open_cache()
    assert (cache.stats().num_blocks, cache.stats().size_bytes) == (2, size_bytes)
    assert cache.load_block(make_hash("ab"), TOKENS) is not None
    assert save(cache, "abc", "ab")


def test_foreign_files_are_left_alone(open_cache, save, directory) -> None:
    cache = open_cache()
    save(cache, 1)
    foreign = [directory / "notes.txt", directory / NAMESPACE.hex() / "ab" / "model.safetensors"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    cache.close()
    (directory / "index.sqlite3").unlink()
    cache = open_cache(size=1)
    assert cache.flush(WAIT_S)
    assert cache.stats().num_blocks == 0
    assert all(path.read_text() == "mine" for path in foreign)


# Failing disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_write_error_is_counted_warned_of_once_and_leaves_nothing(
    cache, save, make_hash, directory, monkeypatch, caplog, code: int
) -> None:
    def fail(path: Path, block: Any) -> None:
        path.write_bytes(b"a part of it")
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(ssd_publisher, "write_block_file", fail)
        assert not save(cache, 1)
        assert not save(cache, 2)
    assert names_on_disk(directory) == set()
    stats = cache.stats()
    assert (stats.write_errors, stats.num_blocks, stats.size_bytes, stats.blocks_written) == (2, 0, 0, 0)
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert not cache.has_block(make_hash(1))
    assert save(cache, 1)


def test_a_write_that_could_not_even_be_cleaned_up_is_cleaned_up_by_the_next(
    cache, save, directory, monkeypatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(cache._index, "insert", fail)
        patch.setattr(cache._budget, "release", fail)
        assert not save(cache, 1)
    reserved_bytes = cache.stats().size_bytes
    assert reserved_bytes
    assert save(cache, 1)
    assert cache.stats().size_bytes == reserved_bytes == bytes_on_disk(directory)
    assert cache.check().is_clean


def test_a_failure_after_the_rename_leaves_no_file_without_a_row(cache, save, directory, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(cache._index, "insert", fail)
        assert not save(cache, 1)
    assert names_on_disk(directory) == set()
    assert cache.stats().size_bytes == 0
    assert save(cache, 1)


def test_evicted_files_that_cannot_be_removed_stop_writing_and_evict_no_more(
    open_cache, save, make_hash, file_bytes, monkeypatch
) -> None:
    cache = open_cache(size=3 * file_bytes)
    for number in range(3):
        assert save(cache, number)
    full_bytes = cache.stats().size_bytes
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise OSError(errno.EROFS, "injected")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        assert not save(cache, 10)
        assert not save(cache, 11)
    assert [cache.has_block(make_hash(number)) for number in range(3)] == [False, True, True]
    assert cache.stats().size_bytes == bytes_on_disk(cache._directory) == full_bytes
    assert save(cache, 10)
    assert [cache.has_block(make_hash(number)) for number in range(3)] == [False, True, True]


def test_a_folder_removed_while_in_use_costs_hits_only(cache, save, make_hash, directory) -> None:
    save(cache, 1)
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
    assert cache.load_block(make_hash(1), TOKENS) is None
    assert not save(cache, 2)
    assert cache.stats().write_errors == 1


def test_a_malformed_payload_is_reported_to_its_caller_only(cache, save, make_hash) -> None:
    done = Recorder()
    broken = BlockPayload({"keys": BlockTensor("F32", (3,), memoryview(b"1234"))})
    cache.save_block(make_hash(1), None, TOKENS, broken, done)
    cache.save_block(make_hash(2), None, [2**32], BlockPayload({}), done)
    assert save(cache, 3)
    assert done.calls == [(make_hash(1), False), (make_hash(2), False)]


# Leftovers of killed processes


def leave_temporary_file(cache: PagedSSDCacheManager, block_hash: BlockHash, owner: str) -> Path:
    """What a process killed in the middle of a write leaves: a reservation and part of a file."""
    path = temporary_path(cache._directory, NAMESPACE, block_hash, owner)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"part")
    assert cache.flush(WAIT_S)  # the index is the writer's; from here on that thread has nothing to do
    with cache._index.transaction():
        cache._index.add_unpublished(ssd_budget.UnpublishedFile(NAMESPACE, block_hash, owner, 1000))
    return path


def owner_with_pid(pid: int, host: str | None = None) -> str:
    return f"{host or ssd_owner.host_id()}-{pid}-0123456789abcdef"


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(WAIT_S)
    return child.pid


def test_a_dead_process_temporary_file_is_removed_at_opening(open_cache, make_hash, dead_pid: int) -> None:
    cache = open_cache()
    path = leave_temporary_file(cache, make_hash(1), owner_with_pid(dead_pid))
    assert cache.stats().size_bytes == 1000
    cache.close()
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert not path.exists()
    assert cache.stats().size_bytes == 0


def test_a_dead_process_temporary_file_is_removed_after_the_index_was_lost(
    open_cache, directory, make_hash, dead_pid: int
) -> None:
    cache = open_cache()
    path = leave_temporary_file(cache, make_hash(1), owner_with_pid(dead_pid))
    cache.close()
    (directory / "index.sqlite3").unlink()
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert not path.exists()


@pytest.mark.parametrize(("age_s", "is_removed"), [(3600, False), (2 * 24 * 3600, True)])
@pytest.mark.parametrize("host", [None, "ffffffff"])
def test_a_possible_writer_keeps_its_temporary_file_for_a_day(
    open_cache, make_hash, host: str | None, age_s: int, is_removed: bool
) -> None:
    cache = open_cache()
    path = leave_temporary_file(cache, make_hash(1), owner_with_pid(os.getppid(), host))
    then = time.time() - age_s
    os.utime(path, (then, then))
    cache.close()
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert path.exists() is not is_removed


def test_another_managers_temporary_file_is_kept_until_that_one_is_closed(open_cache, make_hash) -> None:
    writer = open_cache()
    path = leave_temporary_file(writer, make_hash(1), writer._budget.owner)
    reader = open_cache()
    assert reader.flush(WAIT_S)
    assert path.exists()
    writer.close()
    reader = open_cache()
    assert reader.flush(WAIT_S)
    assert not path.exists()


def test_a_file_renamed_but_never_entered_is_removed(open_cache, save, make_hash, directory, dead_pid: int) -> None:
    cache = open_cache()
    assert save(cache, 1)
    leave_temporary_file(cache, make_hash(1), owner_with_pid(dead_pid)).unlink()
    with cache._index.transaction():
        cache._index.remove(NAMESPACE, make_hash(1))
    cache.close()
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert names_on_disk(directory) == set()


def test_a_reservation_left_over_does_not_take_a_published_block_with_it(
    open_cache, save, make_hash, dead_pid: int
) -> None:
    cache = open_cache()
    assert save(cache, 1)
    leave_temporary_file(cache, make_hash(1), owner_with_pid(dead_pid))
    cache.close()
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert cache.load_block(make_hash(1), TOKENS) is not None


# The folder


def test_folders_and_files_are_for_their_owner_only(cache, save, directory) -> None:
    save(cache, 1)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_the_namespace_is_described_for_people(cache, directory) -> None:
    assert json.loads((directory / NAMESPACE.hex() / "namespace.json").read_text()) == {"model": "tiny"}


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(open_cache, directory, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(CacheDirectoryError, match="chmod go-w"):
        open_cache()


def test_a_folder_that_cannot_be_created_is_a_typed_error(open_cache, directory) -> None:
    directory.write_text("a file")
    with pytest.raises(CacheDirectoryError, match="name a folder that you may write to"):
        open_cache()


def test_opening_reads_no_block_file(open_cache, save, monkeypatch) -> None:
    cache = open_cache()
    save(cache, 1)
    cache.close()

    def fail(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("omlx_core.cache.ssd_layout.read_block_identity", fail)
    monkeypatch.setattr(ssd_cache, "read_block_into", fail)
    cache = open_cache()
    assert cache.flush(WAIT_S)
    assert cache.stats().num_blocks == 1
