"""What a disk can do to the SSD tier, and what must not come of it: an exception, a wrong byte, a lasting loss."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cache.faulty_io import KINDS, FaultyIO
from safetensors.numpy import save_file
from ssd_audit import audit_directory

from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import block_path
from omlx_core.errors import CacheDirectoryError

NAMESPACE = NamespaceHash(b"n" * 32)
TOKENS = (1, 2, 3, 4)
WAIT_S = 30.0
ROOM_FOR_BYTES = 3 * 1000  # three files of the blocks below, hardly more

Check = Callable[[PagedSSDCacheManager], None]


def block_hash(number: int) -> BlockHash:
    return BlockHash(bytes([number]) * 32)


@pytest.fixture
def path_of(directory: Path) -> Callable[[int], Path]:
    return lambda number: block_path(directory, NAMESPACE, block_hash(number))


@pytest.fixture
def payload_of(make_payload: Callable[..., BlockPayload]) -> Callable[[int], BlockPayload]:
    return lambda number: make_payload(number, 300)


@pytest.fixture
def save(payload_of: Callable[[int], BlockPayload]) -> Callable[[PagedSSDCacheManager, int], bool]:
    """Store a block, wait, and say whether it is on disk."""

    def store(cache: PagedSSDCacheManager, number: int, parent: int | None = None) -> bool:
        done: list[bool] = []
        parent_hash = None if parent is None else block_hash(parent)
        queued = cache.save_block(
            block_hash(number), parent_hash, TOKENS, payload_of(number), lambda _, is_on_disk: done.append(is_on_disk)
        )
        assert queued
        assert cache.flush(WAIT_S)
        [is_on_disk] = done
        return is_on_disk

    return store


@pytest.fixture
def read(payload_of: Callable[[int], BlockPayload]) -> Callable[[PagedSSDCacheManager, int], bool]:
    """Load a block and say whether it was there; fails if what comes back is not what was stored."""

    def load(cache: PagedSSDCacheManager, number: int) -> bool:
        payload = cache.load_block(block_hash(number), TOKENS)
        assert payload is None or payload == payload_of(number)
        return payload is not None

    return load


@pytest.fixture
def assert_sound(directory: Path) -> Check:
    """Both judges find nothing."""

    def judge(cache: PagedSSDCacheManager) -> None:
        assert cache.flush(WAIT_S)
        report = cache.check()
        assert report.is_clean, report.findings
        assert audit_directory(directory) == []

    return judge


@pytest.fixture
def faulty(directory: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyIO:
    return FaultyIO(directory, monkeypatch)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.msg for record in caplog.records if record.levelno >= logging.WARNING]


# Errors of the system


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_disk_costs_hits_never_answers(
    faulty, open_cache, save, read, assert_sound, caplog, kind: str, code: int
) -> None:
    cache = open_cache(size=ROOM_FOR_BYTES)
    for number in range(3):
        assert save(cache, number)
    with faulty.failing(kind, code=code):
        for number in (0, 1, 2, 3, 4, 5):
            cache.has_block(block_hash(number))
            read(cache, number)
            save(cache, number)
            cache.touch([block_hash(number)])
        assert cache.flush(WAIT_S)
        stats = cache.stats()
    assert faulty.num_failures > 0
    said = warnings_in(caplog)
    assert len(said) == len(set(said)), "each kind of trouble is said once"
    assert stats.write_errors + stats.corrupt_blocks > 0 or kind == "mkdir"
    assert said or kind == "mkdir"
    # The fault is over.
    for number in (6, 7, 8):
        assert save(cache, number)
        assert cache.has_block(block_hash(number))
        assert read(cache, number)
    assert_sound(cache)


def test_everything_may_fail_at_once(faulty, open_cache, save, read, assert_sound) -> None:
    cache = open_cache()
    assert save(cache, 1)
    with faulty.failing(*KINDS, code=errno.EIO):
        assert not cache.has_block(block_hash(1))
        assert not read(cache, 1)
        assert not save(cache, 2)
        cache.touch([block_hash(1)])
        assert cache.flush(WAIT_S)
    assert save(cache, 1)
    assert save(cache, 2, parent=1)
    assert read(cache, 1)
    assert read(cache, 2)
    assert_sound(cache)


def test_a_transient_read_error_loses_no_block(faulty, open_cache, save, read, assert_sound) -> None:
    cache = open_cache()
    assert save(cache, 1)
    with faulty.failing("open", "read", code=errno.EIO):
        assert not read(cache, 1)
        assert not cache.has_block(block_hash(1))
    assert read(cache, 1)
    assert cache.has_block(block_hash(1))
    assert_sound(cache)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("read", "rename", "unlink")])
def test_a_folder_that_fails_at_opening_is_a_typed_error(faulty, directory, open_cache, kind: str) -> None:
    with faulty.failing(kind, code=errno.EIO), pytest.raises(CacheDirectoryError):
        open_cache()


def test_a_file_size_limit_is_a_failed_write_and_no_more(tmp_path) -> None:
    """RLIMIT_FSIZE, which is a full disk to a program, lies on the index as well; SIGXFSZ is ignored by Python."""
    verdict = run_child(
        """
import resource
cache = open_cache(directory)
assert save(cache, 1)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit_bytes in (1000, 5000, 20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    facts[str(limit_bytes)] = [save(cache, 2), load(cache, 1)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
facts["errors"] = cache.stats().write_errors
facts["after"] = [save(cache, 2), load(cache, 1), load(cache, 2)]
facts["findings"] = [str(finding) for finding in cache.check().findings]
cache.close()
""",
        tmp_path / "kv",
    )
    assert verdict.pop("errors") == 3
    assert verdict == {
        "1000": [False, True],
        "5000": [False, True],
        "20000": [False, True],
        "after": [True, True, True],
        "findings": [],
    }
    assert audit_directory(tmp_path / "kv") == []


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    volume = tmp_path / "volume"
    volume.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k,mode=700", "none", str(volume)]
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield volume
    subprocess.run(["umount", "--lazy", str(volume)], check=True)


def test_a_full_volume_stops_writing_until_there_is_room(small_volume, make_payload, caplog) -> None:
    cache = PagedSSDCacheManager(small_volume / "kv", max_size_bytes=10**9, namespace=NAMESPACE, description={})
    try:
        for number in range(40):
            cache.save_block(block_hash(number), None, TOKENS, make_payload(number, 10_000))
            assert cache.flush(WAIT_S)
        stored = [number for number in range(40) if cache.has_block(block_hash(number))]
        assert 0 < len(stored) < 40
        assert cache.stats().write_errors > 0
        assert len(warnings_in(caplog)) == len(set(warnings_in(caplog)))
        for number in stored:
            assert cache.load_block(block_hash(number), TOKENS) == make_payload(number, 10_000)
        subprocess.run(["mount", "-o", "remount,size=2m", str(small_volume)], check=True)
        for number in range(40):
            cache.save_block(block_hash(number), None, TOKENS, make_payload(number, 10_000))
        assert cache.flush(WAIT_S)
        assert all(cache.load_block(block_hash(number), TOKENS) is not None for number in range(40))
        assert cache.check().is_clean
        assert audit_directory(small_volume / "kv") == []
    finally:
        cache.close()


def test_a_folder_made_read_only_serves_and_writes_again_later() -> None:
    """Run as nobody where the tests run as root, whom modes don't stop."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        verdict = run_child(
            """
if os.getuid() == 0:
    os.chown(directory.parent, 65534, 65534)
    os.setgid(65534)
    os.setuid(65534)
cache = open_cache(directory)
assert save(cache, 1)
folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
for path in folders:
    path.chmod(0o500)
facts["meanwhile"] = [save(cache, 2), cache.has_block(block_hash(1)), load(cache, 1), save(cache, 3)]
facts["errors"] = cache.stats().write_errors
for path in folders:
    path.chmod(0o700)
facts["after"] = [save(cache, 2), load(cache, 1), load(cache, 2)]
facts["findings"] = [str(finding) for finding in cache.check().findings]
cache.close()
""",
            Path(folder) / "kv",
        )
    assert verdict == {
        "meanwhile": [False, True, True, False],
        "errors": 2,
        "after": [True, True, True],
        "findings": [],
    }


def run_child(code: str, directory: Path) -> dict:
    """Run code in a process of its own, with helpers of the same meaning as here; returns its ``facts``."""
    prelude = """
import json, os, pathlib, sys
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
directory, facts = pathlib.Path(sys.argv[1]), {}
def block_hash(number):
    return bytes([number]) * 32
def payload(number):
    return BlockPayload({"keys": BlockTensor("U8", (30_000,), memoryview(bytes([number]) * 30_000))})
def open_cache(directory):
    return PagedSSDCacheManager(directory, max_size_bytes=10**9, namespace=b"n" * 32, description={"model": "tiny"})
def save(cache, number):
    done = []
    assert cache.save_block(block_hash(number), None, (1, 2), payload(number), lambda _, ok: done.append(ok))
    assert cache.flush(30)
    return done[0]
def load(cache, number):
    found = cache.load_block(block_hash(number), (1, 2))
    assert found is None or found == payload(number)
    return found is not None
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + code + "\nprint(json.dumps(facts))", str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The folder


def test_a_folder_removed_while_in_use_is_a_miss_until_a_new_cache_makes_it(
    open_cache, save, read, directory, assert_sound, caplog
) -> None:
    cache = open_cache()
    assert save(cache, 1)
    shutil.rmtree(directory)
    assert not read(cache, 1)
    assert not save(cache, 2)
    assert not read(cache, 2)
    cache.touch([block_hash(1)])
    assert cache.flush(WAIT_S)
    cache.stats()
    assert not directory.exists(), "it may be the mount point of a volume that is gone for now"
    assert len(warnings_in(caplog)) == len(set(warnings_in(caplog)))
    other = open_cache()
    assert save(other, 3)
    assert save(cache, 2)
    assert read(cache, 3)
    assert read(other, 2)
    assert_sound(other)


def test_a_volume_that_comes_back_is_used_again(open_cache, save, read, directory, assert_sound) -> None:
    cache = open_cache()
    assert save(cache, 1)
    directory.rename(directory.with_name("unmounted"))
    assert not read(cache, 1)
    assert not save(cache, 2)
    assert cache.flush(WAIT_S)
    directory.with_name("unmounted").rename(directory)
    assert save(cache, 2)
    assert save(cache, 1)
    assert read(cache, 1)
    assert read(cache, 2)
    assert_sound(cache)


# The index


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal", "-shm")], ids=["alone", "with its log"])
def test_an_index_deleted_while_in_use_is_made_anew(
    open_cache, save, read, directory, assert_sound, suffixes: tuple[str, ...]
) -> None:
    cache, bystander = open_cache(), open_cache()
    assert save(cache, 1)
    for suffix in suffixes:
        (directory / f"index.sqlite3{suffix}").unlink()
    cache.has_block(block_hash(1))
    assert read(cache, 1)
    assert save(cache, 2, parent=1)
    assert save(bystander, 3, parent=2)
    for each in (cache, bystander, open_cache()):
        assert [each.has_block(block_hash(number)) and read(each, number) for number in (1, 2, 3)] == [True] * 3
    bystander.close()
    cache.close()
    assert_sound(open_cache())


@pytest.mark.parametrize("content", [b"", b"garbage" * 10_000, None], ids=["empty", "garbage", "its first half"])
def test_a_damaged_index_is_made_anew_at_opening(
    open_cache, save, read, directory, assert_sound, content: bytes | None
) -> None:
    cache = open_cache()
    assert save(cache, 1)
    assert save(cache, 2, parent=1)
    cache.close()
    index = directory / "index.sqlite3"
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2] if content is None else content)
    cache = open_cache()
    assert read(cache, 1)
    assert read(cache, 2)
    assert cache.has_block(block_hash(2))
    assert_sound(cache)


def test_an_index_overwritten_while_in_use_raises_nothing_and_is_made_anew(
    open_cache, save, read, directory, assert_sound
) -> None:
    cache = open_cache()
    assert save(cache, 1)
    for path in directory.glob("index.sqlite3*"):
        if not path.name.endswith("-shm"):  # mapped: overwriting that could kill the process, whoever wrote it
            with open(path, "r+b") as file:
                file.write(b"\xa5" * path.stat().st_size)
    for number in (2, 3):
        cache.has_block(block_hash(number))
        save(cache, number)
        read(cache, number)
        cache.touch([block_hash(number)])
    assert cache.flush(WAIT_S)
    cache.stats()
    cache.close()
    cache = open_cache()
    assert save(cache, 4)
    assert [read(cache, number) for number in (1, 4)] == [True, True]
    assert_sound(cache)


def test_random_damage_to_the_index_never_makes_for_a_wrong_answer(
    open_cache, save, read, directory, monkeypatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    cache = open_cache()
    for number in range(20):
        assert save(cache, number, parent=number - 1 if number % 5 else None)
    cache.close()
    index = directory / "index.sqlite3"
    intact = index.read_bytes()
    generator = random.Random(7)
    for _ in range(40):
        damaged = bytearray(intact)
        at = generator.randrange(len(damaged))
        damaged[at : at + 16] = generator.randbytes(len(damaged[at : at + 16]))
        index.write_bytes(damaged)
        cache = open_cache()
        for number in range(20):
            cache.has_block(block_hash(number))
            read(cache, number)
        save(cache, 21)
        cache.touch([block_hash(number) for number in range(20)])
        assert cache.flush(WAIT_S)
        cache.stats()
        cache.close()
        for leftover in directory.glob("index.sqlite3*"):
            leftover.unlink()
    index.write_bytes(intact)
    assert sum(read(open_cache(), number) for number in range(20)) == 20, "no valid file was thrown away"


# Block files


def boundaries(content: bytes) -> list[int]:
    """Lengths that cut a block file at, just before and just after the borders of its parts."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    borders = {0, 8, content.index(b'"checksum":"') + 12, 8 + length, len(content)}
    borders |= {8 + length + at for name, entry in header.items() if name[0] != "_" for at in entry["data_offsets"]}
    lengths = {border + offset for border in borders for offset in (-1, 0, 1)}
    return sorted(size for size in lengths if 0 <= size < len(content))


def test_a_file_truncated_at_any_structural_boundary_is_detected(
    open_cache, save, read, path_of, assert_sound, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    cache = open_cache()
    assert save(cache, 1)
    lengths = boundaries(path_of(1).read_bytes())
    assert len(lengths) >= 11
    for count, length in enumerate(lengths, start=1):
        os.truncate(path_of(1), length)
        assert cache.load_block(block_hash(1), TOKENS) is None, length
        assert cache.flush(WAIT_S)
        assert not cache.has_block(block_hash(1))
        assert not path_of(1).exists()
        assert cache.stats().corrupt_blocks == count
        assert save(cache, 1)
        assert read(cache, 1)
    assert len(warnings_in(caplog)) == 1
    assert_sound(cache)


def test_a_thousand_flipped_bits_are_all_detected_and_none_served(
    open_cache, save, read, path_of, assert_sound, monkeypatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    cache = open_cache()
    generator = random.Random(3)
    num_files = 5
    for number in range(num_files):
        assert save(cache, number, parent=number - 1 if number else None)
    served = []
    for flip in range(1000):
        number = flip % num_files
        path = path_of(number)
        content = bytearray(path.read_bytes())
        bit = generator.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        if cache.load_block(block_hash(number), TOKENS) is not None:
            served.append((number, bit))
        assert cache.flush(WAIT_S)
        assert not cache.has_block(block_hash(number)), bit
        assert save(cache, number, parent=number - 1 if number else None)
    assert served == []
    assert cache.stats().corrupt_blocks == 1000
    assert all(read(cache, number) for number in range(num_files))
    assert_sound(cache)


def test_a_damaged_block_does_not_take_those_after_it(open_cache, save, read, path_of, assert_sound) -> None:
    cache = open_cache()
    for number in range(4):
        assert save(cache, number, parent=number - 1 if number else None)
    os.truncate(path_of(1), 100)
    assert not read(cache, 1)
    assert cache.flush(WAIT_S)
    assert [path_of(number).exists() for number in range(4)] == [True, False, True, True]
    assert save(cache, 1, parent=0)
    assert all(read(cache, number) for number in range(4))
    assert_sound(cache)


def test_a_foreign_safetensors_file_is_a_miss_and_stays_until_the_block_is_written(
    open_cache, save, read, path_of, assert_sound
) -> None:
    cache = open_cache()
    assert save(cache, 1)
    save_file({"weight": np.zeros(10, dtype=np.float32)}, path_of(1), metadata={"format": "pt"})
    path_of(1).chmod(0o600)
    foreign = path_of(1).read_bytes()
    assert not read(cache, 1)
    assert cache.flush(WAIT_S)
    assert not cache.has_block(block_hash(1))
    assert path_of(1).read_bytes() == foreign
    assert cache.stats().corrupt_blocks == 1
    assert save(cache, 1)
    assert read(cache, 1)
    assert_sound(cache)


# The clock


def test_a_clock_set_back_changes_neither_order_nor_content(
    open_cache, save, read, path_of, directory, assert_sound, monkeypatch
) -> None:
    sample = open_cache()
    assert save(sample, 0)
    size = 3 * path_of(0).stat().st_size
    assert sample.clear() == 1
    sample.close()
    now_s = time.time()
    cache = open_cache(size=size)
    gone = []
    for number, offset_s in enumerate([0, -(10**9), 3600, -now_s, 10**9, -(10**6)], start=1):
        monkeypatch.setattr(time, "time", lambda offset_s=offset_s: now_s + offset_s)
        held = {n for n in range(10) if cache.has_block(block_hash(n))}
        assert save(cache, number)
        gone += sorted(held - {n for n in range(10) if cache.has_block(block_hash(n))})
        if number == 3:
            cache.touch([block_hash(1)])
            assert cache.flush(WAIT_S)
            cache.close()
            cache = open_cache(size=size)
    assert gone == [2, 3, 1]
    assert all(read(cache, number) for number in (4, 5, 6))
    assert_sound(cache)
