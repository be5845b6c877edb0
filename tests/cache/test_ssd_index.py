from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omlx_core.cache.block_file import encode_block, write_block_file
from omlx_core.cache.block_hash import BlockHash, NamespaceHash
from omlx_core.cache.block_header import BlockIdentity
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW, Part
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.ssd_index import SSDIndex
from omlx_core.cache.ssd_index_view import INDEX_NAME, SCHEMA_VERSION
from omlx_core.cache.ssd_layout import IndexEntry, UnpublishedFile, block_path, temporary_path
from omlx_core.errors import BlockFileError, CacheDirectoryError

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)


def entry(
    block_hash: BlockHash,
    parent: IndexEntry | None = None,
    *,
    last_used: int = 1,
    size: int = 10,
    part: Part = ROWS,
) -> IndexEntry:
    return IndexEntry(
        NAMESPACE,
        block_hash,
        None if parent is None else parent.block_hash,
        0 if parent is None else parent.depth + 1,
        size,
        0.0,
        last_used,
        part,
    )


def insert(index: SSDIndex, *entries: IndexEntry) -> None:
    with index.transaction():
        for each in entries:
            index.insert(each)


def eviction_order(index: SSDIndex) -> list[BlockHash]:
    with index.transaction():
        everything = index.current_totals().size_bytes
        return [each.block_hash for each in index.least_recently_used(everything) or []]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[SSDIndex]:
    index = SSDIndex(tmp_path)
    yield index
    index.close()


def test_evicts_least_recently_used_first_and_leaves_before_their_parents(
    index: SSDIndex, make_hash: Callable[[object], BlockHash]
) -> None:
    root = entry(make_hash("root"))
    child = entry(make_hash("child"), root)
    leaf = entry(make_hash("leaf"), child)
    older, newer = entry(make_hash("older"), last_used=0), entry(make_hash("newer"), last_used=2)
    insert(index, newer, root, child, leaf, older)
    assert eviction_order(index) == [each.block_hash for each in (older, leaf, child, root, newer)]


def test_eviction_stops_once_enough_is_free_and_keeps_what_it_must(
    index: SSDIndex, make_hash: Callable[[object], BlockHash]
) -> None:
    blocks = [entry(make_hash(number), last_used=number, size=10) for number in range(4)]
    insert(index, *blocks)
    with index.transaction():
        keep = index.ancestors(blocks[1])
        assert index.least_recently_used(11, keep) == [blocks[0], blocks[2]]
        assert index.least_recently_used(31, keep) is None


def test_checkpoints_are_evicted_by_themselves_least_recently_used_and_deepest_first(
    index: SSDIndex, make_hash: Callable[[object], BlockHash]
) -> None:
    root = entry(make_hash("root"))
    child = entry(make_hash("child"), root)
    window = entry(make_hash("window"), child, part=WINDOW)
    checkpoints = [
        entry(make_hash("unused"), child, last_used=0, part=CHECKPOINT),
        entry(make_hash("deep"), child, part=CHECKPOINT),
        entry(make_hash("shallow"), root, part=CHECKPOINT),
    ]
    insert(index, root, child, window, *checkpoints[::-1])
    with index.transaction():
        assert index.least_recently_used(21, only_checkpoints=True) == checkpoints
        assert index.least_recently_used(10, only_checkpoints=True) == checkpoints[:1]
        assert index.least_recently_used(0, only_checkpoints=True) == []
        assert index.least_recently_used(31, only_checkpoints=True) is None


@pytest.mark.parametrize(("only_checkpoints", "by_use"), [(False, "blocks_by_use"), (True, "checkpoints_by_use")])
def test_who_leaves_first_is_read_off_an_index_whatever_the_number_of_blocks(
    index: SSDIndex, make_hash: Callable[[object], BlockHash], only_checkpoints: bool, by_use: str
) -> None:
    insert(index, entry(make_hash(1)), entry(make_hash(2), part=CHECKPOINT))
    statements: list[str] = []
    with index.transaction():
        index._connection.set_trace_callback(statements.append)
        index.least_recently_used(10, only_checkpoints=only_checkpoints)
        index._connection.set_trace_callback(None)
        [statement] = statements
        plan = index._connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
    assert [step[3] for step in plan] == [f"SCAN blocks USING INDEX {by_use}"]


def test_touching_a_leaf_stamps_its_whole_chain_alike(
    index: SSDIndex, make_hash: Callable[[object], BlockHash]
) -> None:
    root = entry(make_hash("root"), last_used=1)
    leaf = entry(make_hash("leaf"), root, last_used=1)
    insert(index, root, leaf, entry(make_hash("other"), last_used=2))
    with index.transaction():
        assert index.stamp(NAMESPACE, [leaf.block_hash]) == 3
    assert eviction_order(index) == [make_hash("other"), leaf.block_hash, root.block_hash]


def test_touching_skips_blocks_that_are_not_published(
    index: SSDIndex, make_hash: Callable[[object], BlockHash]
) -> None:
    root = entry(make_hash("root"), last_used=1)
    insert(index, root, entry(make_hash("other"), last_used=2))
    with index.transaction():
        index.stamp(NAMESPACE, [root.block_hash, make_hash("evicted")])
    assert eviction_order(index) == [make_hash("other"), root.block_hash]


def test_a_run_of_children_shares_one_stamp(index: SSDIndex, make_hash: Callable[[object], BlockHash]) -> None:
    root = entry(make_hash("root"), last_used=1)
    insert(index, root, entry(make_hash("other"), last_used=2))
    with index.transaction():
        first = index.stamp_for_child(root, NAMESPACE)
        parent = index.get(NAMESPACE, root.block_hash)
        assert parent is not None
        assert (first, parent.last_used, index.stamp_for_child(parent, NAMESPACE)) == (3, 3, 3)


@settings(max_examples=40, deadline=None)
@given(
    parents=st.lists(st.integers(-1, 20), min_size=1, max_size=12),
    touches=st.lists(st.lists(st.integers(0, 11), max_size=4), max_size=8),
)
def test_whatever_is_touched_no_parent_leaves_before_its_child(
    tmp_path_factory: pytest.TempPathFactory, parents: list[int], touches: list[list[int]]
) -> None:
    index = SSDIndex(tmp_path_factory.mktemp("index"))
    blocks: list[IndexEntry] = []
    try:
        for number, wanted in enumerate(parents):
            with index.transaction():
                found = index.get(NAMESPACE, blocks[wanted % number].block_hash) if number and wanted >= 0 else None
                stamp = index.stamp_for_child(found, NAMESPACE)
                blocks.append(entry(BlockHash(bytes([number]) * 32), found, last_used=stamp))
                index.insert(blocks[-1])
            for touch in touches[number : number + 1]:
                with index.transaction():
                    index.stamp(NAMESPACE, [BlockHash(bytes([each]) * 32) for each in touch])
        order = eviction_order(index)
        assert len(order) == len(blocks)
        for block in blocks:
            if block.parent_hash is not None:
                assert order.index(block.block_hash) < order.index(block.parent_hash)
    finally:
        index.close()


def test_totals_count_blocks_and_unpublished_files(index: SSDIndex, make_hash: Callable[[object], BlockHash]) -> None:
    insert(index, entry(make_hash(1), size=10), entry(make_hash(2), size=20))
    with index.transaction():
        index.add_unpublished(UnpublishedFile(OTHER, make_hash(3), "owner", 5))
        assert index.remove(NAMESPACE, make_hash(1))
        assert not index.remove(NAMESPACE, make_hash(1))
    assert (index.totals().num_blocks, index.totals().size_bytes) == (1, 25)
    with index.transaction():
        index.remove_unpublished(OTHER, make_hash(3), "owner")
    assert index.totals().size_bytes == 20


def test_totals_count_checkpoints_apart(index: SSDIndex, make_hash: Callable[[object], BlockHash]) -> None:
    insert(
        index,
        entry(make_hash(1), size=1),
        entry(make_hash(2), size=2, part=CHECKPOINT),
        entry(make_hash(3), size=4, part=CHECKPOINT),
        entry(make_hash(4), size=8, part=WINDOW),
    )
    files = [
        UnpublishedFile(OTHER, make_hash(5), "owner", 16, CHECKPOINT),
        UnpublishedFile(OTHER, make_hash(6), "", 32),
    ]
    with index.transaction():
        for file in files:
            index.add_unpublished(file)
        assert set(index.unpublished()) == set(files)
        assert index.counted_totals() == (4, 63, 22)
    assert (index.totals().size_bytes, index.totals().checkpoint_bytes) == (63, 22)
    with index.transaction():
        index.remove(NAMESPACE, make_hash(3))
        index.remove(NAMESPACE, make_hash(4))
        index.remove_unpublished(OTHER, make_hash(5), "owner")
        assert index.counted_totals() == (2, 35, 2)
    assert (index.totals().size_bytes, index.totals().checkpoint_bytes) == (35, 2)


def test_a_failed_transaction_changes_nothing(index: SSDIndex, make_hash: Callable[[object], BlockHash]) -> None:
    with pytest.raises(BlockFileError, match="UNIQUE"):
        insert(index, entry(make_hash(1)), entry(make_hash(1)))
    assert not index.contains(NAMESPACE, make_hash(1))
    assert index.totals().num_blocks == 0
    insert(index, entry(make_hash(1)))


def test_namespaces_do_not_see_each_other(index: SSDIndex, make_hash: Callable[[object], BlockHash]) -> None:
    insert(index, entry(make_hash(1)))
    assert index.contains(NAMESPACE, make_hash(1))
    assert not index.contains(OTHER, make_hash(1))


def test_another_index_of_the_folder_sees_a_block_at_once(
    index: SSDIndex, tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    second = SSDIndex(tmp_path)
    try:
        assert not second.contains(NAMESPACE, make_hash(1))
        insert(index, entry(make_hash(1)))
        assert second.contains(NAMESPACE, make_hash(1))
    finally:
        second.close()


def test_a_closed_index_finds_nothing_and_keeps_its_last_totals(
    tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    index = SSDIndex(tmp_path)
    insert(index, entry(make_hash(1), size=10))
    index.close()
    assert not index.contains(NAMESPACE, make_hash(1))
    assert index.totals().size_bytes == 10


def test_the_index_is_for_its_owner_only(index: SSDIndex, tmp_path: Path) -> None:
    insert(index, entry(BlockHash(b"h" * 32)))
    files = list(tmp_path.glob("index.*"))
    assert {file.name for file in files} >= {INDEX_NAME, f"{INDEX_NAME}-wal"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_an_index_of_a_newer_version_is_refused_and_kept(tmp_path: Path) -> None:
    SSDIndex(tmp_path).close()
    connection = sqlite3.connect(tmp_path / INDEX_NAME)
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    before = (tmp_path / INDEX_NAME).read_bytes()
    with pytest.raises(CacheDirectoryError, match="upgrade"):
        SSDIndex(tmp_path)
    assert (tmp_path / INDEX_NAME).read_bytes() == before


def test_an_index_of_an_older_version_is_made_anew_from_the_files(
    tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    connection = sqlite3.connect(tmp_path / INDEX_NAME)
    connection.execute("CREATE TABLE blocks (namespace, hash, parent, depth, size_bytes, created_s, last_used)")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION - 1}")
    connection.close()
    write_chain(tmp_path, [make_hash(1), make_hash(2)], written_s=[0, 0])
    index = SSDIndex(tmp_path)
    try:
        assert eviction_order(index) == [make_hash(2), make_hash(1)]
    finally:
        index.close()


def test_an_index_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(CacheDirectoryError, match="another folder"):
        SSDIndex(tmp_path)


def write_chain(directory: Path, hashes: list[BlockHash], *, written_s: list[float]) -> None:
    parent = None
    for depth, (block_hash, seconds) in enumerate(zip(hashes, written_s, strict=True)):
        path = block_path(directory, NAMESPACE, block_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_block_file(path, encode_block(BlockIdentity(NAMESPACE, block_hash, parent, depth, b""), BlockPayload({})))
        os.utime(path, (seconds, seconds))
        parent = block_hash


def damage_delete(path: Path) -> None:
    path.unlink()


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def damage_first_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * 3996 + content[4096:])


def damage_table_dropped(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE totals")
    connection.close()


@pytest.mark.parametrize(
    "damage", [damage_delete, damage_empty, damage_garbage, damage_first_page, damage_table_dropped]
)
@pytest.mark.parametrize("log_left_over", [False, True])
def test_a_lost_or_damaged_index_is_made_anew_from_the_files(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make_hash: Callable[[object], BlockHash],
    damage: Callable[[Path], None],
    log_left_over: bool,
) -> None:
    index = SSDIndex(tmp_path)
    insert(index, entry(make_hash("no file")))
    index.close()
    old, new = [make_hash(("old", n)) for n in range(3)], [make_hash(("new", n)) for n in range(2)]
    # The root of `new` was written before all of `old`, but its leaf after.
    write_chain(tmp_path, old, written_s=[20, 30, 40])
    write_chain(tmp_path, new, written_s=[10, 50])
    damage(tmp_path / INDEX_NAME)
    if log_left_over:
        (tmp_path / f"{INDEX_NAME}-wal").write_bytes(b"an earlier log")

    index = SSDIndex(tmp_path)
    try:
        assert "missing or damaged; 5 blocks found" in caplog.text
        assert eviction_order(index) == [*reversed(old), *reversed(new)]
        assert index.totals().num_blocks == 5
        assert index.totals().size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
        with index.transaction():
            child = index.get(NAMESPACE, new[1])
        assert child is not None
        assert (child.parent_hash, child.depth, child.created_s) == (new[0], 1, 50)
    finally:
        index.close()
    assert sqlite3.connect(tmp_path / INDEX_NAME).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_rebuilding_leaves_alone_what_is_not_a_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make_hash: Callable[[object], BlockHash]
) -> None:
    good, renamed, cut, foreign = (make_hash(name) for name in ("good", "renamed", "cut", "foreign"))
    for block_hash in (good, renamed, cut, foreign):
        write_chain(tmp_path, [block_hash], written_s=[0])
    paths = {each: block_path(tmp_path, NAMESPACE, each) for each in (good, renamed, cut, foreign)}
    paths[renamed].write_bytes(paths[good].read_bytes())
    paths[cut].write_bytes(paths[cut].read_bytes()[:-1])
    text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    paths[foreign].write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    paths[good].with_name("notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    index = SSDIndex(tmp_path)
    try:
        assert eviction_order(index) == [good]
        assert "3 files" in caplog.text
        assert all(path.read_bytes() == content for path, content in before.items())
    finally:
        index.close()


def test_rebuilding_counts_temporary_files(tmp_path: Path, make_hash: Callable[[object], BlockHash]) -> None:
    path = temporary_path(tmp_path, NAMESPACE, make_hash(1), "0123abcd-7-89ef")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    path.with_name("other.tmp").write_bytes(b"1")
    index = SSDIndex(tmp_path)
    try:
        with index.transaction():
            assert index.unpublished() == [UnpublishedFile(NAMESPACE, make_hash(1), "0123abcd-7-89ef", 5)]
    finally:
        index.close()


def test_damage_found_while_in_use_is_repaired_by_the_next_opening(
    tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    index = SSDIndex(tmp_path)
    insert(index, *(entry(make_hash(number), last_used=number) for number in range(500)))
    index.close()
    content = (tmp_path / INDEX_NAME).read_bytes()
    (tmp_path / INDEX_NAME).write_bytes(content[: len(content) // 2] + b"\xff" * (len(content) // 2))
    write_chain(tmp_path, [make_hash("kept")], written_s=[0])

    index = SSDIndex(tmp_path)
    try:
        with pytest.raises(BlockFileError, match="malformed"):
            eviction_order(index)
    finally:
        index.close()
    index = SSDIndex(tmp_path)
    try:
        assert eviction_order(index) == [make_hash("kept")]
    finally:
        index.close()


def write_and_insert(index: SSDIndex, directory: Path, block_hash: BlockHash) -> None:
    write_chain(directory, [block_hash], written_s=[0])
    insert(index, entry(block_hash))


@pytest.mark.parametrize(
    "damage", [damage_delete, damage_garbage, damage_first_page, lambda path: path.rename(path.with_suffix(".away"))]
)
def test_an_index_that_goes_while_in_use_is_made_anew_by_a_later_transaction(
    index: SSDIndex, tmp_path: Path, make_hash: Callable[[object], BlockHash], damage: Callable[[Path], None]
) -> None:
    write_and_insert(index, tmp_path, make_hash(1))
    index.checkpoint()
    damage(tmp_path / INDEX_NAME)
    for _ in range(2):
        index.contains(NAMESPACE, make_hash(1))
        with contextlib.suppress(BlockFileError), index.transaction():
            index.stamp(NAMESPACE, [make_hash(1)])
    assert index.contains(NAMESPACE, make_hash(1))
    write_and_insert(index, tmp_path, make_hash(2))
    second = SSDIndex(tmp_path)
    try:
        assert second.totals().num_blocks == index.totals().num_blocks == 2
    finally:
        second.close()


def test_an_index_that_another_process_has_made_anew_is_followed(
    index: SSDIndex, tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    write_and_insert(index, tmp_path, make_hash(1))
    (tmp_path / INDEX_NAME).unlink()
    second = SSDIndex(tmp_path)
    try:
        write_and_insert(second, tmp_path, make_hash(2))
        write_and_insert(index, tmp_path, make_hash(3))
        for each in (1, 2, 3):
            assert index.contains(NAMESPACE, make_hash(each))
            assert second.contains(NAMESPACE, make_hash(each))
    finally:
        second.close()


def test_a_folder_that_is_gone_is_a_typed_error_until_it_is_back(
    tmp_path: Path, make_hash: Callable[[object], BlockHash]
) -> None:
    directory = tmp_path / "kv"
    directory.mkdir()
    index = SSDIndex(directory)
    try:
        insert(index, entry(make_hash(1)))
        directory.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(BlockFileError, match="can't be opened"), index.transaction():
                pass
        assert not directory.exists()
        assert not index.contains(NAMESPACE, make_hash(1))
        (tmp_path / "away").rename(directory)
        with index.transaction():
            assert index.get(NAMESPACE, make_hash(1)) is not None
        assert index.contains(NAMESPACE, make_hash(1))
    finally:
        index.close()
