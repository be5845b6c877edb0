from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omlx_core.cache import ssd_cache
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_check import FindingKind
from omlx_core.cache.ssd_layout import block_path
from omlx_core.errors import CacheDirectoryError, InvalidRequestError

NAMESPACE = NamespaceHash(b"n" * 32)
TOKENS = (1, 2, 3, 4)
NOBODY = 65534


def snapshot(directory: Path) -> dict[str, Any]:
    """Everything about a folder that writing could change."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mode,
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"",
        )
        for path in [directory, *directory.rglob("*")]
    }


KILLED_WRITER = """
import os, pathlib, signal, sys
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
cache = PagedSSDCacheManager(
    pathlib.Path(sys.argv[1]), max_size_bytes=10**9, namespace=bytes.fromhex(sys.argv[2]), description={}
)
payload = BlockPayload({"keys": BlockTensor("U8", (4,), memoryview(b"1234"))})
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.save_block(bytes.fromhex(sys.argv[3]), None, (1, 2, 3, 4), payload, kill)
cache.flush()
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(ssd_cache.__file__).parents[2])},
    )


@pytest.fixture
def read_only(open_cache: Callable[..., PagedSSDCacheManager]) -> Callable[[], PagedSSDCacheManager]:
    return lambda: open_cache(read_only=True)


def use(cache: PagedSSDCacheManager, block_hash: BlockHash, payload: Any) -> None:
    """Do everything that could tempt a cache to write."""
    cache.touch([block_hash])
    assert not cache.save_block(BlockHash(b"s" * 32), None, TOKENS, payload)
    assert cache.flush()
    list(cache.entries())
    cache.stats()
    cache.check()
    cache.close()


def test_serves_a_folder_and_leaves_it_as_it_is(
    open_cache, read_only, save, make_hash, make_payload, directory
) -> None:
    writer = open_cache()
    save(writer, "a")
    save(writer, "ab", "a")
    writer.close()
    before = snapshot(directory)
    cache = read_only()
    assert cache.has_block(make_hash("ab"))
    assert not cache.has_block(make_hash("x"))
    assert cache.load_block(make_hash("ab"), TOKENS) is not None
    assert cache.load_block(make_hash("ab"), (9, 9, 9, 9)) is None
    assert cache.load_block(make_hash("x"), TOKENS) is None
    assert cache.check().is_clean
    assert [entry.block_hash for entry in cache.entries()] == [make_hash("ab"), make_hash("a")]
    stats = cache.stats()
    assert (stats.num_blocks, stats.blocks_read, stats.corrupt_blocks) == (2, 1, 0)
    assert stats.size_bytes == stats.bytes_written_ever == writer.stats().size_bytes
    use(cache, make_hash("a"), make_payload())
    assert snapshot(directory) == before


def test_leaves_what_a_killed_writer_left_and_still_sees_all_of_it(
    read_only, make_hash, make_payload, directory
) -> None:
    run_python(KILLED_WRITER, directory, NAMESPACE.hex(), make_hash(1).hex())
    assert (directory / "index.sqlite3-wal").stat().st_size
    before = snapshot(directory)
    cache = read_only()
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.stats().num_blocks == 1
    use(cache, make_hash(1), make_payload())
    assert snapshot(directory) == before


def test_a_missing_folder_is_an_empty_cache_until_it_is_there(
    open_cache, read_only, save, make_hash, make_payload, directory
) -> None:
    cache = read_only()
    assert not cache.has_block(make_hash(1))
    assert cache.load_block(make_hash(1), TOKENS) is None
    assert cache.stats() == ssd_cache.SSDCacheStats()
    use(cache, make_hash(1), make_payload())
    assert not directory.exists()
    save(open_cache(), 1)
    assert cache.load_block(make_hash(1), TOKENS) is not None


def test_a_missing_or_damaged_index_costs_figures_only(
    open_cache, read_only, save, make_hash, make_payload, directory
) -> None:
    writer = open_cache()
    save(writer, 1)
    writer.close()
    (directory / "index.sqlite3").unlink()
    before = snapshot(directory)
    cache = read_only()
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.stats().num_blocks == 0
    assert [finding.kind for finding in cache.check().findings] == [FindingKind.UNLISTED_BLOCK]
    assert snapshot(directory) == before
    (directory / "index.sqlite3").write_bytes(b"garbage" * 100)
    assert cache.load_block(make_hash(1), TOKENS) is not None
    assert cache.stats().num_blocks == 0
    assert [finding.kind for finding in cache.check().findings] == [FindingKind.DAMAGED_INDEX]


def test_sees_what_another_process_writes_and_evicts_at_once(open_cache, read_only, save, make_hash) -> None:
    cache = read_only()
    writer = open_cache()
    for number in range(3):
        assert save(writer, number)
        assert cache.has_block(make_hash(number))
        assert cache.load_block(make_hash(number), TOKENS) is not None
        assert cache.stats().num_blocks == number + 1
        assert cache.check().is_clean
    writer.clear()
    assert not cache.has_block(make_hash(0))
    assert cache.load_block(make_hash(0), TOKENS) is None
    assert (cache.stats().num_blocks, cache.stats().corrupt_blocks) == (0, 0)


def test_a_writer_opened_while_one_reads_can_write_afterwards(
    open_cache, read_only, save, make_hash, directory
) -> None:
    """SQLite keeps what a process has opened for reading only from being written by the same process."""
    run_python(KILLED_WRITER, directory, NAMESPACE.hex(), make_hash(1).hex())
    cache = read_only()
    entries = cache.entries()
    next(entries)
    writer = open_cache()
    assert not save(writer, 2)
    entries.close()
    assert save(writer, 2)
    assert cache.stats().num_blocks == 2


def test_a_damaged_block_is_counted_hidden_kept_and_found_again_once_written_anew(
    open_cache, read_only, save, make_hash, directory
) -> None:
    writer = open_cache()
    save(writer, 1)
    path = block_path(directory, NAMESPACE, make_hash(1))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cache = read_only()
    for _ in range(2):
        assert cache.load_block(make_hash(1), TOKENS) is None
        assert not cache.has_block(make_hash(1))
    assert path.exists()
    assert cache.stats().corrupt_blocks == 2
    assert writer.load_block(make_hash(1), TOKENS) is None
    save(writer, 1)
    assert cache.has_block(make_hash(1))
    assert cache.load_block(make_hash(1), TOKENS) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, path: cache.check(repair=True),
        lambda cache, path: cache.clear(),
        lambda cache, path: cache.import_(path),
    ],
)
def test_maintenance_that_would_write_is_refused(read_only, tmp_path, directory, change: Callable[..., Any]) -> None:
    with pytest.raises(InvalidRequestError, match="without read_only"):
        change(read_only(), tmp_path / "export")
    assert not directory.exists()


def test_a_folder_that_others_can_write_to_is_refused(read_only, directory) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(CacheDirectoryError, match="chmod go-w"):
        read_only()


READER = f"""
import json, os, pathlib, sys
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

def use(directory, namespace, block_hash):
    cache = PagedSSDCacheManager(
        directory, max_size_bytes=10**9, namespace=namespace, description={{}}, read_only=True
    )
    payload = cache.load_block(block_hash, (1, 2, 3, 4))
    kinds = sorted({{finding.kind for finding in cache.check().findings}})
    entries = list(cache.entries())
    cache.close()
    return [payload is not None, cache.stats().num_blocks, len(entries), kinds]

arguments = pathlib.Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])
if os.geteuid() == 0:
    use(*arguments)  # imports everything, which the other user might not be able to read
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})  # modes don't bind root
try:
    (arguments[0] / "probe").touch()
except PermissionError:
    print(json.dumps(use(*arguments)))
"""


@pytest.fixture
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if "killed" not in request.fixturenames:
        yield tmp_path / "kv"
        return
    # Where another user can reach it.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "kv"
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o700)


@pytest.mark.parametrize("killed", [False, True])
def test_serves_a_folder_that_cannot_be_written(open_cache, save, make_hash, directory, killed: bool) -> None:
    if killed:
        run_python(KILLED_WRITER, directory, NAMESPACE.hex(), make_hash(1).hex())
    else:
        writer = open_cache()
        save(writer, 1)
        writer.close()
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = run_python(READER, directory, NAMESPACE.hex(), make_hash(1).hex())
    assert done.stderr == ""
    assert json.loads(done.stdout) == [True, 1, 1, [FindingKind.PERMISSIONS]]
