from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omlx_core.cache import ssd_check, ssd_publisher
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.parts import CHECKPOINT, WINDOW
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_check import CheckReport, FindingKind
from omlx_core.cache.ssd_layout import UnpublishedFile, block_path, temporary_path
from omlx_core.cache.ssd_owner import host_id
from omlx_core.errors import BlockFileError

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)
TOKENS = (1, 2, 3, 4)
WAIT_S = 30.0


def kinds(report: CheckReport) -> list[FindingKind]:
    return [finding.kind for finding in report.findings]


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def chain(cache: PagedSSDCacheManager, save: Callable[..., bool]) -> PagedSSDCacheManager:
    """A cache with the chain a, ab, abc, and x."""
    for name, parent in (("a", None), ("ab", "a"), ("abc", "ab"), ("x", None)):
        assert save(cache, name, parent)
    return cache


@pytest.fixture
def path_of(directory: Path, make_hash: Callable[[object], BlockHash]) -> Callable[[object], Path]:
    return lambda name: block_path(directory, NAMESPACE, make_hash(name))


@pytest.fixture
def held(make_hash: Callable[[object], BlockHash]) -> Callable[[PagedSSDCacheManager], set[str]]:
    def names(cache: PagedSSDCacheManager) -> set[str]:
        return {name for name in ("a", "ab", "abc", "x") if cache.load_block(make_hash(name), TOKENS) is not None}

    return names


# check


def test_a_sound_folder_is_clean(chain, open_cache, save, directory) -> None:
    save(open_cache(namespace=OTHER), "a")
    report = chain.check()
    assert report == CheckReport(5, sum(path.stat().st_size for path in directory.glob("*/??/*")), ())
    assert report.is_clean


def test_an_empty_folder_is_clean(cache) -> None:
    assert cache.check() == CheckReport(0, 0, ())


def execute(cache: PagedSSDCacheManager, sql: str, *arguments: Any) -> None:
    """Change the index behind its own back."""
    assert cache.flush(WAIT_S)
    with cache._index.transaction():
        cache._index._connection.execute(sql, arguments)


def break_missing_file(cache: Any, path: Path, block_hash: BlockHash) -> None:
    path.unlink()


def break_corrupt_file(cache: Any, path: Path, block_hash: BlockHash) -> None:
    damage_bit(path)


def break_truncated_file(cache: Any, path: Path, block_hash: BlockHash) -> None:
    os.truncate(path, path.stat().st_size // 2)


def break_misnamed_file(cache: Any, path: Path, block_hash: BlockHash) -> None:
    others = [other for other in path.parents[1].glob("??/*.safetensors") if other != path]
    path.write_bytes(others[0].read_bytes())


def break_row_size(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE blocks SET size_bytes = size_bytes + 1 WHERE hash = ?", block_hash)
    execute(cache, "UPDATE totals SET size_bytes = size_bytes + 1")


def break_row_depth(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE blocks SET depth = depth + 7 WHERE hash = ?", block_hash)


def break_row_part(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE totals SET checkpoint_bytes = (SELECT size_bytes FROM blocks WHERE hash = ?)", block_hash)
    execute(cache, "UPDATE blocks SET part = 'checkpoint' WHERE hash = ?", block_hash)


def break_row_lost(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "DELETE FROM blocks WHERE hash = ?", block_hash)


def break_row_lost_and_file_damaged(cache: Any, path: Path, block_hash: BlockHash) -> None:
    break_row_lost(cache, path, block_hash)
    damage_bit(path)


def break_order(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE blocks SET last_used = 1000 WHERE hash = ?", block_hash)


def break_totals(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE totals SET size_bytes = size_bytes - 1")


def break_checkpoint_totals(cache: Any, path: Path, block_hash: BlockHash) -> None:
    execute(cache, "UPDATE totals SET checkpoint_bytes = checkpoint_bytes + 1")


def break_permissions(cache: Any, path: Path, block_hash: BlockHash) -> None:
    path.chmod(0o644)


def break_folder_permissions(cache: Any, path: Path, block_hash: BlockHash) -> None:
    path.parent.chmod(0o750)


def break_stray_temporary(cache: Any, path: Path, block_hash: BlockHash) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(WAIT_S)
    path.with_name(f"{block_hash.hex()}.{host_id()}-{gone.pid}-0123456789abcdef.tmp").touch(0o600)


def break_stray_description(cache: Any, path: Path, block_hash: BlockHash) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(WAIT_S)
    (path.parents[1] / f"namespace.json.{host_id()}-{gone.pid}-0123456789abcdef.tmp").touch(0o600)


DAMAGES = {
    break_missing_file: (FindingKind.MISSING_FILE, {"a", "ab", "x"}),
    break_corrupt_file: (FindingKind.CORRUPT_FILE, {"a", "ab", "x"}),
    break_truncated_file: (FindingKind.CORRUPT_FILE, {"a", "ab", "x"}),
    break_misnamed_file: (FindingKind.CORRUPT_FILE, {"a", "ab", "x"}),
    break_row_lost_and_file_damaged: (FindingKind.STRAY_FILE, {"a", "ab", "x"}),
    break_row_size: (FindingKind.WRONG_ROW, {"a", "ab", "abc", "x"}),
    break_row_depth: (FindingKind.WRONG_ROW, {"a", "ab", "abc", "x"}),
    break_row_part: (FindingKind.WRONG_ROW, {"a", "ab", "abc", "x"}),
    break_row_lost: (FindingKind.UNLISTED_BLOCK, {"a", "ab", "abc", "x"}),
    break_order: (FindingKind.WRONG_ORDER, {"a", "ab", "abc", "x"}),
    break_totals: (FindingKind.WRONG_TOTALS, {"a", "ab", "abc", "x"}),
    break_checkpoint_totals: (FindingKind.WRONG_TOTALS, {"a", "ab", "abc", "x"}),
    break_permissions: (FindingKind.PERMISSIONS, {"a", "ab", "abc", "x"}),
    break_folder_permissions: (FindingKind.PERMISSIONS, {"a", "ab", "abc", "x"}),
    break_stray_temporary: (FindingKind.STRAY_FILE, {"a", "ab", "abc", "x"}),
    break_stray_description: (FindingKind.STRAY_FILE, {"a", "ab", "abc", "x"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_repaired_and_nothing_valid_lost(chain, path_of, make_hash, held, damage) -> None:
    kind, left = DAMAGES[damage]
    damage(chain, path_of("abc"), make_hash("abc"))
    found = chain.check()
    assert kind in kinds(found)
    assert not found.is_clean
    assert chain.check() == found, "looking changes nothing"
    repaired = chain.check(repair=True)
    assert kinds(repaired) == kinds(found)
    assert all(finding.is_repaired for finding in repaired.findings)
    assert chain.check() == CheckReport(repaired.num_blocks, repaired.size_bytes, ())
    assert held(chain) == left
    assert chain.stats().num_blocks == len(left)


def test_a_block_that_lost_its_parent_is_found_and_kept_until_that_is_back(chain, path_of, save, held) -> None:
    damage_bit(path_of("ab"))
    chain.check(repair=True)
    report = chain.check(repair=True)
    assert [(finding.kind, finding.path, finding.is_repaired) for finding in report.findings] == [
        (FindingKind.MISSING_PARENT, path_of("abc"), False)
    ]
    assert save(chain, "ab", "a")
    assert chain.check().is_clean
    assert held(chain) == {"a", "ab", "abc", "x"}


def test_blocks_without_rows_are_entered_again(chain, held) -> None:
    execute(chain, "DELETE FROM blocks")
    assert kinds(chain.check()) == [FindingKind.UNLISTED_BLOCK] * 4
    chain.check(repair=True)
    assert chain.check().is_clean
    assert held(chain) == {"a", "ab", "abc", "x"}


def test_more_than_the_budget_is_found_and_evicted(chain, open_cache, save, make_hash) -> None:
    size_bytes = chain.stats().size_bytes
    smaller = open_cache(size=size_bytes)
    assert smaller.flush(WAIT_S)
    save(chain, "y")
    report = smaller.check()
    assert kinds(report) == [FindingKind.OVER_BUDGET]
    assert smaller.check(repair=True).size_bytes <= size_bytes
    assert smaller.check().is_clean
    assert not smaller.has_block(make_hash("abc"))


def test_checkpoints_beyond_their_share_are_found_and_evicted(chain, open_cache, save, make_hash) -> None:
    size_bytes = 2 * chain.stats().size_bytes
    smaller = open_cache(size=size_bytes, checkpoint_share=0.25)
    assert smaller.flush(WAIT_S)
    for name, parent in (("A", "a"), ("X", "x")):
        assert save(chain, name, parent, part=CHECKPOINT, size_bytes=size_bytes // 8)
    assert kinds(chain.check()) == []
    assert kinds(smaller.check()) == [FindingKind.OVER_BUDGET]
    repaired = smaller.check(repair=True)
    assert [finding.is_repaired for finding in repaired.findings] == [True]
    assert smaller.check().is_clean
    assert [chain.has_block(make_hash(name)) for name in ("a", "x", "A", "X")] == [True, True, False, True]


def test_parts_without_rows_are_entered_again_as_what_they_are(chain, save) -> None:
    assert save(chain, "W", "a", part=WINDOW)
    assert save(chain, "A", "a", part=CHECKPOINT)
    before = {entry.block_hash: entry.part for entry in chain.entries()}
    checkpoint_bytes = chain.stats().checkpoint_bytes
    execute(chain, "DELETE FROM blocks")
    assert chain.stats().checkpoint_bytes == 0
    chain.check(repair=True)
    assert {entry.block_hash: entry.part for entry in chain.entries()} == before
    assert chain.stats().checkpoint_bytes == checkpoint_bytes > 0
    assert chain.check().is_clean


def test_what_cannot_be_read_is_found_and_left_alone(chain, path_of, held) -> None:
    newer = path_of("x").read_bytes().replace(b'"format_version":"2"', b'"format_version":"3"')
    path_of("x").write_bytes(newer)
    report = chain.check(repair=True)
    assert [(finding.kind, finding.is_repaired) for finding in report.findings] == [
        (FindingKind.UNREADABLE_FILE, False)
    ]
    assert path_of("x").read_bytes() == newer


def test_files_of_other_names_and_versions_are_nobodys_business(chain, path_of, make_hash, directory) -> None:
    newer = path_of("x").read_bytes().replace(b'"format_version":"2"', b'"format_version":"3"')
    path_of("x").write_bytes(newer)
    execute(chain, "DELETE FROM blocks WHERE hash = ?", make_hash("x"))
    (directory / "notes.txt").write_text("mine")
    (path_of("a").parent / "model.safetensors").write_text("mine")
    assert chain.check(repair=True).is_clean
    assert path_of("x").read_bytes() == newer
    assert (directory / "notes.txt").exists()


@pytest.mark.parametrize("at_a_glance", [True, False])
def test_a_damaged_index_is_found_and_made_anew(chain, open_cache, directory, held, at_a_glance: bool) -> None:
    chain.close()
    content = (directory / "index.sqlite3").read_bytes()
    kept = 0 if at_a_glance else 4096
    (directory / "index.sqlite3").write_bytes(content[:kept] + b"\xff" * (len(content) - kept))
    read_only = open_cache(read_only=True)
    assert kinds(read_only.check()) == [FindingKind.DAMAGED_INDEX]
    cache = open_cache() if at_a_glance else chain
    if not at_a_glance:
        report = cache.check(repair=True)
        assert [(finding.kind, finding.is_repaired) for finding in report.findings] == [
            (FindingKind.DAMAGED_INDEX, True)
        ]
        cache = open_cache()
    assert cache.check().is_clean
    assert held(cache) == {"a", "ab", "abc", "x"}


def test_a_file_being_written_or_removed_is_no_finding(
    chain, make_hash, directory, open_cache, save, monkeypatch
) -> None:
    reports: list[CheckReport] = []
    write = ssd_publisher.write_block_file
    other = open_cache()

    def write_and_check(path: Path, block: Any) -> None:
        write(path, block)
        reports.append(other.check())

    monkeypatch.setattr(ssd_publisher, "write_block_file", write_and_check)
    assert save(chain, "y")
    with chain._index.transaction():
        [entry] = [each for each in chain._index.entries() if each.block_hash == make_hash("x")]
        chain._budget.withdraw([entry])
    reports.append(other.check())
    assert [report.findings for report in reports] == [(), ()]
    assert block_path(directory, NAMESPACE, make_hash("x")).exists()


def test_an_eviction_while_a_block_is_judged_is_no_finding(chain, make_hash, path_of, monkeypatch) -> None:
    judge = ssd_check.judge_row

    def evict_first(directory: Path, row: Any) -> Any:
        if row.block_hash == make_hash("x") and path_of("x").exists():
            with chain._index.transaction():
                chain._budget.withdraw([row])
            chain._budget.trim()
        return judge(directory, row)

    monkeypatch.setattr(ssd_check, "judge_row", evict_first)
    assert chain.check().is_clean
    assert not path_of("x").exists()


def test_an_eviction_and_a_new_publication_while_a_block_is_judged_is_no_finding(
    chain, make_hash, path_of, save, monkeypatch
) -> None:
    judge = ssd_check.judge_row
    publications = iter([True])

    def publish_anew(directory: Path, row: Any) -> Any:
        if row.block_hash != make_hash("x"):
            return judge(directory, row)
        if not next(publications, False):
            return judge(directory, row)
        aside = path_of("x").rename(path_of("x").with_suffix(".aside"))
        finding = judge(directory, row)
        aside.rename(path_of("x"))
        execute(chain, "UPDATE blocks SET created_s = created_s + 1 WHERE hash = ?", make_hash("x"))
        return finding

    monkeypatch.setattr(ssd_check, "judge_row", publish_anew)
    assert chain.check().is_clean


def test_a_block_published_while_its_file_is_judged_is_no_finding(chain, make_hash, monkeypatch, path_of) -> None:
    [entry] = [each for each in chain.entries() if each.block_hash == make_hash("x")]
    execute(chain, "DELETE FROM blocks WHERE hash = ?", make_hash("x"))
    paths = ssd_check.block_paths

    def list_then_publish(directory: Path) -> Any:
        found = list(paths(directory))
        if not list(chain.entries(NAMESPACE))[3:]:
            with chain._index.transaction():
                chain._index.insert(entry)
        return found

    monkeypatch.setattr(ssd_check, "block_paths", list_then_publish)
    assert chain.check().is_clean


def test_check_is_clean_while_others_write_and_evict(open_cache, save, make_hash, make_payload) -> None:
    writer, judge = open_cache(size=8000), open_cache(size=8000)
    is_done = threading.Event()

    def write() -> None:
        for number in range(150):
            writer.save_block(make_hash(number), None, TOKENS, make_payload(number))
        writer.flush(WAIT_S)
        is_done.set()

    thread = threading.Thread(target=write)
    thread.start()
    findings = []
    while not is_done.is_set():
        findings += judge.check().findings
    thread.join(WAIT_S)
    assert findings == []
    assert writer.stats().evictions > 0
    assert judge.check().is_clean


# entries


def test_entries_come_in_the_order_of_eviction_as_of_one_moment(chain, open_cache, save, make_hash) -> None:
    save(open_cache(namespace=OTHER), "o")
    chain.touch([make_hash("a")])
    assert chain.flush(WAIT_S)
    entries = chain.entries()
    first = next(entries)
    save(chain, "later")
    names = [first.block_hash, *(entry.block_hash for entry in entries)]
    assert names == [make_hash(name) for name in ("abc", "ab", "x", "o", "a")]
    assert [entry.block_hash for entry in chain.entries(OTHER)] == [make_hash("o")]
    assert (first.parent_hash, first.depth, first.namespace) == (make_hash("ab"), 2, NAMESPACE)


def test_entries_of_a_damaged_index_are_a_typed_error(chain, directory) -> None:
    chain.close()
    (directory / "index.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(BlockFileError, match="can't be read"):
        next(chain.entries())


# clear


def test_clear_removes_everything_of_all_namespaces(chain, open_cache, save, directory) -> None:
    save(open_cache(namespace=OTHER), "o")
    assert chain.clear() == 5
    assert list(directory.glob("*/??/*")) == []
    assert (chain.stats().num_blocks, chain.stats().size_bytes) == (0, 0)
    assert chain.check().is_clean
    assert save(chain, "a")


def test_clear_removes_one_namespace_only(chain, open_cache, save, make_hash) -> None:
    other = open_cache(namespace=OTHER)
    save(other, "o")
    assert chain.clear(NAMESPACE) == 4
    assert other.has_block(make_hash("o"))
    assert not chain.has_block(make_hash("a"))


def test_clear_takes_checkpoints_off_the_totals(chain, save) -> None:
    assert save(chain, "A", "a", part=CHECKPOINT)
    assert chain.clear() == 5
    assert chain.stats().checkpoint_bytes == 0
    assert chain.check().is_clean


def test_clear_keeps_the_ancestors_of_what_is_younger(chain, make_hash, held) -> None:
    now_s = time.time()
    for name, age_s in (("a", 500), ("ab", 400), ("abc", 10), ("x", 500)):
        execute(chain, "UPDATE blocks SET created_s = ? WHERE hash = ?", now_s - age_s, make_hash(name))
    assert chain.clear(older_than_s=450) == 1
    assert held(chain) == {"a", "ab", "abc"}
    assert chain.clear(older_than_s=5) == 3
    assert chain.check().is_clean


def test_clear_includes_what_was_queued_before(cache, make_hash, make_payload) -> None:
    cache.save_block(make_hash(1), None, TOKENS, make_payload())
    assert cache.clear() == 1
    assert not cache.has_block(make_hash(1))


def test_a_block_cleared_twice_is_removed_twice(cache, save, make_hash, directory) -> None:
    """Its file may still wait for the first removal, and it has been published anew since."""
    save(cache, 1)
    with cache._index.transaction():
        cache._budget.withdraw(list(cache._index.entries()))
        cache._index.insert(ssd_check.IndexEntry(NAMESPACE, make_hash(1), None, 0, 10, created_s=0.0, last_used=1))
    assert cache.clear() == 1
    assert list(directory.glob("*/??/*")) == []
    assert cache.stats().size_bytes == 0


def test_another_writers_temporary_file_survives_clear_and_repair(cache, make_hash, directory) -> None:
    writer = cache._budget.owner
    path = temporary_path(directory, NAMESPACE, make_hash(1), writer)
    path.parent.mkdir(mode=0o700)
    path.touch(0o600)
    assert cache.flush(WAIT_S)
    with cache._index.transaction():
        cache._index.add_unpublished(UnpublishedFile(NAMESPACE, make_hash(1), writer, 100))
    cache.clear()
    assert cache.check(repair=True).is_clean
    assert path.exists()
