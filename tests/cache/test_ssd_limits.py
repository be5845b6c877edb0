from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from omlx_core.cache import ssd_budget, ssd_publisher
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)
TOKENS = (1, 2, 3, 4)
DAY_S = 24 * 3600


class Clock:
    """The wall clock, which tests may set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_800_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def file_bytes(
    save: Callable[..., bool], make_hash: Callable[[object], BlockHash], tmp_path_factory: pytest.TempPathFactory
) -> int:
    """Size of the file of a block without a parent."""
    cache = PagedSSDCacheManager(
        tmp_path_factory.mktemp("sample"), max_size_bytes=10**9, namespace=NAMESPACE, description={}
    )
    save(cache, "sample")
    cache.close()
    return cache.stats().bytes_written


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Free space


def test_writing_pauses_below_the_floor_of_free_space_and_goes_on_above_it(
    open_cache, save, make_hash, monkeypatch, caplog, file_bytes
) -> None:
    cache = open_cache(min_free_bytes=1000)
    free_bytes = 1000 + file_bytes
    monkeypatch.setattr(ssd_budget, "free_space_bytes", lambda directory: free_bytes)
    assert save(cache, 1)
    free_bytes -= 1
    assert not save(cache, 2)
    assert not save(cache, 3)
    assert cache.load_block(make_hash(1), TOKENS) is not None
    stats = cache.stats()
    assert (stats.refused_by_free_space, stats.write_errors, stats.blocks_written) == (2, 0, 1)
    assert [message[:26] for message in warnings(caplog)] == ["less than ssd_min_free=100"]
    free_bytes += 1
    assert save(cache, 2)
    assert cache.check().is_clean


def test_a_block_that_is_refused_evicts_nothing(open_cache, save, make_hash, monkeypatch, file_bytes) -> None:
    cache = open_cache(size=file_bytes, min_free_bytes=1)
    assert save(cache, 1)
    monkeypatch.setattr(ssd_budget, "free_space_bytes", lambda directory: 0)
    assert not save(cache, 2)
    assert cache.has_block(make_hash(1))


def test_free_space_is_what_the_volume_has(tmp_path: Path) -> None:
    assert 0 < ssd_budget.free_space_bytes(tmp_path) < 2**60


# Wear


def test_writing_pauses_when_the_days_budget_is_used_up_and_goes_on_as_the_day_passes(
    open_cache, save, make_hash, clock, caplog, file_bytes
) -> None:
    cache = open_cache(write_budget_bytes=2 * file_bytes)
    assert save(cache, 1)
    clock.now_s += DAY_S / 2
    assert save(cache, 2)
    assert not save(cache, 3)
    assert not save(cache, 3)
    assert cache.load_block(make_hash(1), TOKENS) is not None
    stats = cache.stats()
    assert (stats.refused_by_write_budget, stats.write_errors) == (2, 0)
    assert (stats.bytes_written_last_day, stats.bytes_written_ever) == (2 * file_bytes, 2 * file_bytes)
    assert len(warnings(caplog)) == 1
    assert "ssd_write_budget" in caplog.text
    clock.now_s += DAY_S / 2 - 1
    assert not save(cache, 3)
    clock.now_s += 601
    assert save(cache, 3), "the first is a day ago"
    assert not save(cache, 4), "the second isn't"
    assert cache.stats().bytes_written_ever == 3 * file_bytes


def test_the_write_budget_is_shared_by_all_and_survives_a_restart(open_cache, save, clock, file_bytes) -> None:
    first = open_cache(write_budget_bytes=3 * file_bytes)
    second = open_cache(write_budget_bytes=3 * file_bytes, namespace=OTHER)
    assert save(first, 1)
    assert save(second, 2)
    first.close()
    first = open_cache(write_budget_bytes=3 * file_bytes)
    assert save(first, 3)
    assert not save(first, 4)
    assert not save(second, 5)
    assert first.stats().bytes_written_last_day == 3 * file_bytes


def test_evicting_and_clearing_give_no_write_budget_back(open_cache, save, clock, file_bytes) -> None:
    cache = open_cache(write_budget_bytes=file_bytes)
    assert save(cache, 1)
    cache.clear()
    assert not save(cache, 2)


def test_what_is_there_already_costs_no_write_budget(open_cache, save, clock, file_bytes) -> None:
    cache = open_cache(write_budget_bytes=2 * file_bytes)
    assert save(cache, 1)
    assert save(cache, 1)
    assert save(cache, 2)


def test_a_clock_set_back_neither_empties_the_ledger_nor_stops_writing_for_longer_than_a_day(
    open_cache, save, clock, file_bytes
) -> None:
    cache = open_cache(write_budget_bytes=2 * file_bytes)
    assert save(cache, 1)
    clock.now_s -= 400 * DAY_S
    assert cache.stats().bytes_written_last_day == file_bytes
    assert save(cache, 2)
    assert not save(cache, 3)
    clock.now_s += DAY_S + 601
    assert save(cache, 3)
    assert cache.stats().bytes_written_last_day == file_bytes
    assert cache.stats().bytes_written_ever == 3 * file_bytes


def test_a_paused_cache_whose_clock_is_set_back_goes_on_after_a_day(open_cache, save, clock, file_bytes) -> None:
    cache = open_cache(write_budget_bytes=file_bytes)
    assert save(cache, 1)
    clock.now_s -= 400 * DAY_S
    assert not save(cache, 2)
    clock.now_s += DAY_S + 601
    assert save(cache, 2)


def test_a_clock_set_forward_and_back_gives_at_most_one_more_budget(open_cache, save, clock, file_bytes) -> None:
    cache = open_cache(write_budget_bytes=file_bytes)
    assert save(cache, 1)
    clock.now_s += 400 * DAY_S
    assert save(cache, 2)
    clock.now_s -= 400 * DAY_S
    assert not save(cache, 3)


def test_a_write_that_fails_counts_as_written(open_cache, save, clock, file_bytes, monkeypatch) -> None:
    def fail(path: Path, block: object) -> None:
        raise OSError("injected")

    cache = open_cache(write_budget_bytes=file_bytes)
    with monkeypatch.context() as patch:
        patch.setattr(ssd_publisher, "write_block_file", fail)
        assert not save(cache, 1)
    assert not save(cache, 2)
    assert cache.stats().refused_by_write_budget == 1


def test_the_ledger_of_a_lost_index_is_made_anew_from_the_files(open_cache, save, directory, file_bytes) -> None:
    cache = open_cache()
    assert save(cache, 1)
    assert save(cache, 2)
    cache.close()
    (directory / "index.sqlite3").unlink()
    cache = open_cache(write_budget_bytes=2 * file_bytes)
    assert cache.stats().bytes_written_last_day == cache.stats().bytes_written_ever == 2 * file_bytes
    assert not save(cache, 3)


def test_the_ledger_stays_small(open_cache, save, clock, directory) -> None:
    cache = open_cache()
    for number in range(200):
        clock.now_s += 600
        assert save(cache, number)
    cache.close()
    connection = sqlite3.connect(directory / "index.sqlite3")
    assert connection.execute("SELECT count(*) FROM writes").fetchone() == (145,)
    connection.close()


# What a namespace costs


def test_the_description_says_what_a_token_costs_once_that_is_known(
    open_cache, make_hash, make_payload: Callable[..., BlockPayload], directory
) -> None:
    path = directory / NAMESPACE.hex() / "namespace.json"
    cache = open_cache()
    assert "bytes_per_token" not in json.loads(path.read_text())
    cache.save_block(make_hash(1), None, TOKENS, make_payload(size_bytes=100))
    cache.close()
    assert json.loads(path.read_text()) == {"model": "tiny", "bytes_per_token": 25}
    assert path.stat().st_mode & 0o777 == 0o600
    cache = open_cache()
    inode = path.stat().st_ino
    cache.save_block(make_hash(2), None, TOKENS, make_payload(size_bytes=100))
    cache.close()
    assert path.stat().st_ino == inode, "written once"
