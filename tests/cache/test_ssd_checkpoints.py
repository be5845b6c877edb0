"""The checkpoints' share of the SSD tier."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ssd_audit import audit_directory

from omlx_core.cache import ssd_publisher
from omlx_core.cache.block_file import EncodedBlock
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import UnpublishedFile

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)
WAIT_S = 30.0


@pytest.fixture
def checkpoint_bytes(save: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Size of the file of a checkpoint of a first block; that of the block itself is a little smaller."""
    cache = PagedSSDCacheManager(
        tmp_path_factory.mktemp("sample"), max_size_bytes=10**9, namespace=NAMESPACE, description={}
    )
    save(cache, "s")
    save(cache, "S", "s", part=CHECKPOINT)
    cache.close()
    return cache.stats().checkpoint_bytes


@pytest.fixture
def names(make_hash: Callable[[object], BlockHash]) -> Callable[[PagedSSDCacheManager], str]:
    """What would be evicted, in order: rows in lower case, checkpoints in upper case."""
    letters = {make_hash(letter): letter for letter in map(chr, range(ord("A"), ord("z") + 1))}
    return lambda cache: "".join(letters[entry.block_hash] for entry in cache.entries())


@pytest.fixture
def serve(save: Callable[..., bool]) -> Callable[..., None]:
    """Save blocks of those letters, each the first of a chain, with a checkpoint."""

    def run(cache: PagedSSDCacheManager, letters: str) -> None:
        for letter in letters:
            assert save(cache, letter)
            assert save(cache, letter.upper(), letter, part=CHECKPOINT)

    return run


def use(cache: PagedSSDCacheManager, make_hash: Callable[[object], BlockHash], letters: str) -> None:
    cache.touch([make_hash(letter) for letter in letters])
    assert cache.flush(WAIT_S)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_checkpoint_beyond_the_share_evicts_the_least_recently_used_checkpoint_and_no_rows(
    open_cache, serve, names, make_hash, checkpoint_bytes, directory
) -> None:
    cache = open_cache(size=12 * checkpoint_bytes, checkpoint_share=0.25)
    serve(cache, "abc")
    assert names(cache) == "AaBbCc"
    use(cache, make_hash, "aA")
    serve(cache, "d")
    assert names(cache) == "bCcAaDd"
    serve(cache, "e")
    assert names(cache) == "bcAaDdEe"
    stats = cache.stats()
    assert (stats.evictions, stats.checkpoint_bytes) == (2, 3 * checkpoint_bytes)
    cache.close()
    assert audit_directory(directory, max_size_bytes=12 * checkpoint_bytes, checkpoint_share=0.25) == []


def test_of_the_checkpoints_of_one_chain_the_newest_and_the_first_ones_stay(
    open_cache, save, names, checkpoint_bytes
) -> None:
    cache = open_cache(size=12 * checkpoint_bytes, checkpoint_share=0.25)
    for letter, parent in (("a", None), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "d")):
        assert save(cache, letter, parent)
        assert save(cache, letter.upper(), letter, part=CHECKPOINT)
    assert sorted(names(cache)) == sorted("abcde" + "ABE")


def test_a_flood_of_checkpoints_leaves_the_rows_of_others(open_cache, save, names, serve, checkpoint_bytes) -> None:
    cache = open_cache(size=24 * checkpoint_bytes, checkpoint_share=0.125)
    for letter in "abcdefgh":
        assert save(cache, letter)
    serve(cache, "ijklmnopqrst")
    assert names(cache) == "abcdefgh" + "ijklmnopq" + "RrSsTt"
    assert cache.stats().evictions == 9


def test_a_flood_of_rows_takes_a_checkpoint_only_in_its_turn(open_cache, save, names, serve, checkpoint_bytes) -> None:
    cache = open_cache(size=6 * checkpoint_bytes, checkpoint_share=0.5)
    assert save(cache, "a")
    serve(cache, "b")
    order = []
    for letter in "cdefgh":
        assert save(cache, letter)
        order.append(names(cache))
    assert order == ["aBbc", "aBbcd", "aBbcde", "Bbcdef", "bcdefg", "cdefgh"]


def test_a_checkpoint_within_the_share_evicts_the_least_recently_used_of_all(
    open_cache, save, names, serve, checkpoint_bytes
) -> None:
    cache = open_cache(size=6 * checkpoint_bytes)
    for letter in "abcd":
        assert save(cache, letter)
    serve(cache, "xyz")
    assert names(cache) == "XxYyZz"


def test_a_checkpoint_may_evict_checkpoints_for_the_share_and_then_others_for_the_budget(
    open_cache, save, names, serve, make_hash, checkpoint_bytes
) -> None:
    cache = open_cache(size=4 * checkpoint_bytes, checkpoint_share=0.5)
    for letter in "ab":
        assert save(cache, letter)
    serve(cache, "x")
    assert names(cache) == "abXx"
    assert save(cache, "Y", "x", part=CHECKPOINT, size_bytes=checkpoint_bytes)
    assert names(cache) == "bYx"


def test_a_checkpoint_larger_than_the_share_is_refused_with_one_warning_and_evicts_nothing(
    open_cache, save, names, serve, checkpoint_bytes, caplog
) -> None:
    cache = open_cache(size=8 * checkpoint_bytes, checkpoint_share=0.25)
    serve(cache, "ab")
    for letter in "XY":
        assert not save(cache, letter, "a", part=CHECKPOINT, size_bytes=65 + checkpoint_bytes)
    assert sorted(names(cache)) == sorted("AaBb")
    assert cache.stats().evictions == cache.stats().write_errors == 0
    [warning] = warnings(caplog)
    assert "checkpoint_share=0.25 of paged_ssd_cache_max_size=" in warning
    assert save(cache, "x", size_bytes=65 + checkpoint_bytes)
    assert save(cache, "X", "a", part=WINDOW, size_bytes=65 + checkpoint_bytes)


def test_a_checkpoint_whose_chain_leaves_no_room_is_refused_and_evicts_nothing(
    open_cache, save, names, serve, checkpoint_bytes, caplog
) -> None:
    cache = open_cache(size=6 * checkpoint_bytes, checkpoint_share=0.5)
    serve(cache, "x")
    for letter, parent in (("a", None), ("b", "a"), ("c", "b"), ("d", "c")):
        assert save(cache, letter, parent)
    assert not save(cache, "D", "d", part=CHECKPOINT, size_bytes=2 * checkpoint_bytes)
    assert names(cache) == "Xxdcba"
    assert "too small for a block of" in warnings(caplog)[0]


def test_a_checkpoint_that_another_process_is_writing_counts(
    open_cache, save, serve, names, make_hash, checkpoint_bytes
) -> None:
    cache, other = (open_cache(size=4 * checkpoint_bytes, checkpoint_share=0.25) for _ in range(2))
    assert other.flush(WAIT_S)
    with cache._index.transaction():
        cache._index.add_unpublished(
            UnpublishedFile(NAMESPACE, make_hash("o"), other._budget.owner, checkpoint_bytes, CHECKPOINT)
        )
    assert cache.stats().checkpoint_bytes == checkpoint_bytes
    assert save(cache, "a")
    assert not save(cache, "A", "a", part=CHECKPOINT)
    with cache._index.transaction():
        cache._index.remove_unpublished(NAMESPACE, make_hash("o"), other._budget.owner)
    assert save(cache, "A", "a", part=CHECKPOINT)
    assert names(cache) == "Aa"


def test_a_checkpoint_counts_from_before_it_is_written_until_its_file_is_gone(
    open_cache, save, serve, make_hash, checkpoint_bytes, monkeypatch
) -> None:
    cache = open_cache()
    counted = []
    write = ssd_publisher.write_block_file

    def write_and_count(path: Path, block: EncodedBlock) -> None:
        counted.append(cache.stats().checkpoint_bytes)
        write(path, block)

    monkeypatch.setattr(ssd_publisher, "write_block_file", write_and_count)
    serve(cache, "a")
    counted.append(cache.stats().checkpoint_bytes)
    with cache._index.transaction():
        cache._budget.withdraw([entry for entry in cache._index.entries() if entry.part == CHECKPOINT])
    counted.append(cache.stats().checkpoint_bytes)
    assert save(cache, "b")
    counted.append(cache.stats().checkpoint_bytes)
    assert counted == [0, *[checkpoint_bytes] * 3, 0, 0]


def test_the_share_is_over_all_namespaces(open_cache, save, serve, names, make_hash, checkpoint_bytes) -> None:
    size = 8 * checkpoint_bytes
    cache, other = (open_cache(size=size, checkpoint_share=0.25, namespace=name) for name in (NAMESPACE, OTHER))
    serve(cache, "ab")
    serve(other, "c")
    assert names(cache) == "aBbCc"


def test_a_smaller_share_evicts_checkpoints_at_the_next_opening(
    open_cache, serve, names, checkpoint_bytes, directory
) -> None:
    cache = open_cache(size=20 * checkpoint_bytes)
    serve(cache, "abcde")
    cache.close()
    cache = open_cache(size=20 * checkpoint_bytes, checkpoint_share=0.125)
    assert cache.flush(WAIT_S)
    assert names(cache) == "abcDdEe"
    assert cache.check().is_clean
    cache.close()
    assert audit_directory(directory, max_size_bytes=20 * checkpoint_bytes, checkpoint_share=0.125) == []


def lose(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


@pytest.mark.parametrize("break_index", [lose, damage])
def test_an_index_made_anew_knows_the_checkpoints(
    open_cache, save, serve, names, checkpoint_bytes, directory, break_index
) -> None:
    size = 12 * checkpoint_bytes
    cache = open_cache(size=size, checkpoint_share=0.25)
    serve(cache, "abc")
    assert save(cache, "W", "a", part=WINDOW)
    parts = {entry.block_hash: entry.part for entry in cache.entries()}
    assert sorted(parts.values()) == sorted([ROWS] * 3 + [CHECKPOINT] * 3 + [WINDOW])
    cache.close()
    break_index(directory / "index.sqlite3")
    # When they were written is what says in which order they leave.
    for number, path in enumerate(sorted(directory.glob("*/??/*.safetensors"), key=os.path.getmtime)):
        os.utime(path, (number, number))
    cache = open_cache(size=size, checkpoint_share=0.25)
    assert {entry.block_hash: entry.part for entry in cache.entries()} == parts
    assert cache.stats().checkpoint_bytes == 3 * checkpoint_bytes
    serve(cache, "d")
    assert sorted(names(cache)) == sorted("aWbBcCdD")
    assert cache.check().is_clean
