"""Blocks that gathered while the writer was at work are written together, and fail apart."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ssd_audit import audit_directory

from omlx_core.cache import ssd_publisher
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.file_threads import FileThreads
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_layout import block_path

NAMESPACE = NamespaceHash(b"n" * 32)
TOKENS = (1, 2, 3, 4)
WAIT_S = 30.0

SaveTogether = Callable[..., dict[str, bool]]


@contextmanager
def held_up(cache: PagedSSDCacheManager) -> Iterator[None]:
    """Keep the writer busy with telling of a block that can't be written, until the end."""
    is_waiting, may_go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        is_waiting.set()
        may_go_on.wait(WAIT_S)

    cache.save_block(BlockHash(b"o" * 32), BlockHash(b"p" * 32), TOKENS, BlockPayload({}), wait)
    assert is_waiting.wait(WAIT_S)
    try:
        yield
    finally:
        may_go_on.set()


@pytest.fixture
def save_together(make_hash: Callable[[object], BlockHash], make_payload: Callable[..., BlockPayload]) -> SaveTogether:
    """Store blocks, each named by its path from the root, at once; whether each came to be on disk."""

    def store(cache: PagedSSDCacheManager, *names: str, tokens: dict[str, Any] | None = None) -> dict[str, bool]:
        told: list[tuple[str, bool]] = []
        with held_up(cache):
            for name in names:
                assert cache.save_block(
                    make_hash(name),
                    make_hash(name[:-1]) if len(name) > 1 else None,
                    (tokens or {}).get(name, TOKENS),
                    make_payload(len(name)),
                    lambda _, is_on_disk, name=name: told.append((name, is_on_disk)),
                )
        assert cache.flush(WAIT_S)
        assert [name for name, _ in told] == list(names), "told in another order"
        return dict(told)

    return store


@pytest.fixture
def file_bytes(open_cache, save_together, directory) -> int:
    cache = open_cache()
    assert save_together(cache, "s", "st") == {"s": True, "st": True}
    size_bytes = max(path.stat().st_size for path in directory.glob("*/??/*"))
    assert cache.clear() == 2
    cache.close()
    return size_bytes


@pytest.fixture
def path_of(directory, make_hash) -> Callable[[str], Path]:
    return lambda name: block_path(directory, NAMESPACE, make_hash(name))


@pytest.fixture
def fail_writing(monkeypatch, path_of) -> Callable[..., None]:
    """Let the writing of some blocks' files fail, halfway."""
    write = ssd_publisher.write_block_file

    def arrange(*names: str) -> None:
        def write_or_fail(path: Path, block: Any) -> None:
            if any(path.name.startswith(path_of(name).stem) for name in names):
                path.write_bytes(b"a part of it")
                raise OSError(errno.EIO, "injected")
            write(path, block)

        monkeypatch.setattr(ssd_publisher, "write_block_file", write_or_fail)

    return arrange


def held(cache: PagedSSDCacheManager, make_hash: Callable[[object], BlockHash], *names: str) -> set[str]:
    return {name for name in names if cache.has_block(make_hash(name))}


def assert_sound(cache: PagedSSDCacheManager, directory: Path) -> None:
    assert cache.flush(WAIT_S)
    assert cache.check().is_clean
    assert audit_directory(directory) == []


def test_files_are_written_side_by_side(cache, save_together, monkeypatch, directory) -> None:
    write = ssd_publisher.write_block_file
    all_are_being_written = threading.Barrier(4)

    def write_with_others(path: Path, block: Any) -> None:
        all_are_being_written.wait(WAIT_S)
        write(path, block)

    monkeypatch.setattr(ssd_publisher, "write_block_file", write_with_others)
    assert all(save_together(cache, "a", "ab", "abc", "x").values())
    assert_sound(cache, directory)


def test_blocks_written_together_appear_together(cache, save_together, make_hash, monkeypatch) -> None:
    seen: list[set[str]] = []
    insert = cache._index.insert

    def insert_and_look(entry: Any) -> None:
        insert(entry)
        seen.append({name for name in ("a", "ab") if cache._index.contains(NAMESPACE, make_hash(name))})

    monkeypatch.setattr(cache._index, "insert", insert_and_look)
    assert all(save_together(cache, "a", "ab").values())
    assert seen == [set(), set()]
    assert held(cache, make_hash, "a", "ab") == {"a", "ab"}


def test_a_file_that_fails_loses_itself_and_its_descendants_only(
    cache, save_together, make_hash, fail_writing, directory, path_of, monkeypatch
) -> None:
    fail_writing("ab")
    told = save_together(cache, "a", "ab", "abc", "abcd", "ax", "y")
    assert told == {"a": True, "ab": False, "abc": False, "abcd": False, "ax": True, "y": True}
    assert held(cache, make_hash, *told) == {"a", "ax", "y"}
    assert cache.stats().write_errors == 1
    assert_sound(cache, directory)
    monkeypatch.undo()
    assert all(save_together(cache, "ab", "abc", "abcd").values())
    assert_sound(cache, directory)


def test_a_block_that_cannot_be_laid_out_loses_itself_and_its_descendants_only(cache, save_together, directory) -> None:
    told = save_together(cache, "a", "ab", "abc", "x", tokens={"ab": (2**32,)})
    assert told == {"a": True, "ab": False, "abc": False, "x": True}
    assert_sound(cache, directory)


@pytest.mark.parametrize("broken", ["replace", "sync_directory"])
def test_a_name_that_is_not_durable_loses_its_block_and_its_descendants_only(
    cache, save_together, directory, path_of, monkeypatch, broken: str
) -> None:
    # Files of other folders, which are synced apart.
    assert len({path_of(name).parent for name in ("a", "ab", "abc", "x")}) == 4
    if broken == "replace":
        replace = Path.replace

        def replace_or_fail(path: Path, target: Path) -> Path:
            if target == path_of("ab"):
                raise OSError(errno.EIO, "injected")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replace_or_fail)
    else:
        sync = ssd_publisher.sync_directory

        def sync_or_fail(path: Path) -> None:
            if path == path_of("ab").parent:
                raise OSError(errno.EIO, "injected")
            sync(path)

        monkeypatch.setattr(ssd_publisher, "sync_directory", sync_or_fail)
    told = save_together(cache, "a", "ab", "abc", "x")
    assert told == {"a": True, "ab": False, "abc": False, "x": True}
    assert not path_of("ab").exists()
    assert not path_of("abc").exists()
    assert cache.stats().write_errors == 1
    assert_sound(cache, directory)


def test_an_index_that_fails_leaves_nothing_of_any_block(cache, save_together, directory, monkeypatch, path_of) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(cache._index, "insert", fail)
        assert save_together(cache, "a", "ab", "x") == {"a": False, "ab": False, "x": False}
    assert cache.stats().write_errors == 3
    assert cache.stats().size_bytes == 0
    assert [path_of(name).exists() for name in ("a", "ab", "x")] == [False] * 3
    assert_sound(cache, directory)


def test_what_has_no_room_beside_the_others_is_written_after_them(
    open_cache, save_together, make_hash, file_bytes, directory, caplog
) -> None:
    cache = open_cache(size=3 * file_bytes)
    names = [str(number) for number in range(7)]
    assert all(save_together(cache, *names).values())
    assert held(cache, make_hash, *names) == {"4", "5", "6"}
    assert cache.stats().evictions == 4
    assert caplog.records == []
    assert_sound(cache, directory)


def test_no_block_makes_room_by_taking_the_parent_of_one_written_with_it(
    open_cache, save_together, make_hash, file_bytes, directory
) -> None:
    cache = open_cache(size=3 * file_bytes)
    assert all(save_together(cache, "a", "z").values())
    told = save_together(cache, "ab", "x", "y")
    assert all(told.values())
    assert held(cache, make_hash, "a", "ab", "x", "y", "z") == {"a", "x", "y"}
    assert_sound(cache, directory)


def test_a_block_queued_twice_is_written_once(cache, save_together, make_hash, make_payload, directory) -> None:
    told: list[bool] = []
    with held_up(cache):
        for _ in range(2):
            assert cache.save_block(make_hash("a"), None, TOKENS, make_payload(), lambda _, ok: told.append(ok))
    assert cache.flush(WAIT_S)
    assert told == [True, True]
    assert cache.stats().blocks_written == 1
    assert cache.stats().write_errors == 0
    assert_sound(cache, directory)


# The threads


def test_each_action_fails_for_itself() -> None:
    def fail(number: int) -> None:
        raise OSError(number, "injected")

    done: list[int] = []
    threads = FileThreads(3)
    errors = threads.run([lambda: fail(1), lambda: done.append(2), lambda: fail(3), lambda: done.append(4)])
    threads.close()
    assert [error and error.errno for error in errors] == [1, None, 3, None]
    assert sorted(done) == [2, 4]


def test_where_no_thread_can_be_started_the_caller_does_the_work(monkeypatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ran_on: list[threading.Thread] = []
    threads = FileThreads(4)
    assert threads.run([lambda: ran_on.append(threading.current_thread())] * 5) == [None] * 5
    threads.close()
    assert set(ran_on) == {threading.current_thread()}
    assert len(ran_on) == 5


def test_what_was_done_is_not_kept_in_memory() -> None:
    class Payload:
        pass

    all_are_in_hand = threading.Barrier(4)
    freed = [threading.Event() for _ in range(4)]

    def action(event: threading.Event) -> Callable[[], object]:
        payload = Payload()
        weakref.finalize(payload, event.set)
        return lambda: (payload, all_are_in_hand.wait(WAIT_S))

    threads = FileThreads(4)
    assert threads.run([action(event) for event in freed]) == [None] * 4
    assert all(event.wait(WAIT_S) for event in freed)
    threads.close()
