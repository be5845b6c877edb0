from __future__ import annotations

import random
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy

from omlx_core.cache import ssd_budget, ssd_export
from omlx_core.cache.block_hash import BlockHash, NamespaceHash, hash_block, iter_block_hashes
from omlx_core.cache.parts import CHECKPOINT, ROWS, WINDOW, Part, hash_part
from omlx_core.cache.ssd_budget import SaveOutcome
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.ssd_export import ImportReport
from omlx_core.cache.ssd_layout import block_path
from omlx_core.errors import (
    BlockFileError,
    CorruptBlockError,
    ForeignExportError,
    InvalidRequestError,
    MissingBlocksError,
)

NAMESPACE = NamespaceHash(b"n" * 32)
OTHER = NamespaceHash(b"o" * 32)
BLOCK_SIZE = 4
PROMPT = list(range(100, 114))  # three blocks and a half

OpenCache = Callable[..., PagedSSDCacheManager]


def chain_of(token_ids: Sequence[int], extra_keys: Sequence[str] = ()) -> list[BlockHash]:
    return list(iter_block_hashes(NAMESPACE, token_ids, BLOCK_SIZE, extra_keys))


def tokens_of(token_ids: Sequence[int], position: int) -> Sequence[int]:
    return token_ids[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]


@pytest.fixture
def store(make_payload: Callable[..., Any]) -> Callable[..., list[BlockHash]]:
    """Save the full blocks of a prompt."""

    def save(cache: PagedSSDCacheManager, token_ids: Sequence[int], extra_keys: Sequence[str] = ()) -> list[BlockHash]:
        hashes = chain_of(token_ids, extra_keys)
        for position, block_hash in enumerate(hashes):
            parent_hash = hashes[position - 1] if position else None
            tokens = tokens_of(token_ids, position)
            assert cache.save_block(block_hash, parent_hash, tokens, make_payload(tokens[-1], 200))
        return hashes

    return save


@pytest.fixture
def store_part(make_payload: Callable[..., Any]) -> Callable[..., BlockHash]:
    """Save a part of a block, or what pretends to be one."""

    def save(cache: PagedSSDCacheManager, block_hash: BlockHash, part: Part, *, named: Part | None = None) -> BlockHash:
        part_hash = hash_part(block_hash, named or part)
        assert cache.save_block(part_hash, block_hash, (), make_payload(7, 100), part=part)
        return part_hash

    return save


@pytest.fixture
def source(open_cache: OpenCache, tmp_path: Path, store: Callable[..., Any]) -> PagedSSDCacheManager:
    cache = open_cache()
    store(cache, PROMPT)
    return cache


@pytest.fixture
def open_target(tmp_path: Path) -> Any:
    caches = []

    def make(*, size: int = 10**9, namespace: NamespaceHash = NAMESPACE, **options: Any) -> PagedSSDCacheManager:
        options = {"description": {"model": "tiny"}, **options}
        caches.append(PagedSSDCacheManager(tmp_path / "target", max_size_bytes=size, namespace=namespace, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prefix.safetensors"


def assert_holds(cache: PagedSSDCacheManager, original: PagedSSDCacheManager, token_ids: Sequence[int]) -> None:
    for position, block_hash in enumerate(chain_of(token_ids)):
        payload = cache.load_block(block_hash, tokens_of(token_ids, position))
        assert payload is not None
        assert payload == original.load_block(block_hash, tokens_of(token_ids, position))


# Round trip


def test_a_prompt_is_exported_and_imported_elsewhere(source, open_target, path) -> None:
    assert source.export(path, token_ids=PROMPT) == 3
    target = open_target()
    report = target.import_(path)
    assert (report.num_blocks, report.blocks_written, report.blocks_present, report.refusal) == (3, 3, 0, None)
    assert_holds(target, source, PROMPT)
    stats = target.stats()
    assert (stats.num_blocks, stats.blocks_written) == (3, 3)
    assert stats.bytes_written == stats.bytes_written_ever == report.bytes_written == stats.size_bytes
    assert target.check().is_clean


def test_parts_are_exported_with_their_blocks_and_stay_what_they_are(source, open_target, store_part, path) -> None:
    first, second, third = chain_of(PROMPT)
    store_part(source, second, CHECKPOINT)
    store_part(source, third, WINDOW)
    assert source.export(path, block_hashes=[second]) == 3
    assert source.export(path, token_ids=PROMPT) == 5
    target = open_target()
    assert target.import_(path).blocks_written == 5
    assert {entry.block_hash: entry.part for entry in target.entries()} == {
        **dict.fromkeys((first, second, third), ROWS),
        hash_part(second, CHECKPOINT): CHECKPOINT,
        hash_part(third, WINDOW): WINDOW,
    }
    assert target.stats().checkpoint_bytes == source.stats().checkpoint_bytes > 0
    assert target.check().is_clean


def test_a_prompt_is_found_in_a_folder_whose_oldest_entries_are_parts(open_cache, store, store_part, path) -> None:
    cache = open_cache()
    [*_, tip] = store(cache, PROMPT)
    store_part(cache, tip, CHECKPOINT)
    assert cache.flush()
    assert next(cache.entries()).part == CHECKPOINT
    assert cache.export(path, token_ids=PROMPT) == 4


def test_importing_again_changes_nothing(source, open_target, path) -> None:
    source.export(path, token_ids=PROMPT)
    target = open_target()
    target.import_(path)
    before = list(target.entries())
    assert target.import_(path) == ImportReport(3, 0, 0, 3, None)
    assert [entry.created_s for entry in target.entries()] == [entry.created_s for entry in before]


def test_blocks_are_exported_with_all_before_them_and_once_each(source, open_target, store, path) -> None:
    branch = [*PROMPT[:4], *range(500, 508)]
    tips = [store(source, branch)[-1], chain_of(PROMPT)[1]]
    assert source.export(path, block_hashes=tips) == 4
    target = open_target()
    assert target.import_(path).blocks_written == 4
    assert_holds(target, source, branch)
    assert_holds(target, source, PROMPT[:8])
    assert not target.has_block(chain_of(PROMPT)[2])


def test_what_is_still_queued_is_exported_too(open_cache, store, path) -> None:
    cache = open_cache()
    store(cache, PROMPT)
    assert cache.export(path, token_ids=PROMPT) == 3


def test_a_read_only_cache_can_export(source, open_cache, path) -> None:
    source.close()
    assert open_cache(read_only=True).export(path, token_ids=PROMPT) == 3


def test_extra_keys_are_needed_and_not_given_away(source, open_target, store, path) -> None:
    store(source, PROMPT, ("secret salt",))
    with pytest.raises(InvalidRequestError, match="extra keys"):
        source.export(path, block_hashes=chain_of(PROMPT, ("secret salt",)))
    assert source.export(path, token_ids=PROMPT, extra_keys=("secret salt",)) == 3
    assert b"secret salt" not in path.read_bytes()
    target = open_target()
    with pytest.raises(InvalidRequestError, match="cache salt"):
        target.import_(path)
    assert target.stats().num_blocks == 0
    assert target.import_(path, extra_keys=("secret salt",)).blocks_written == 3
    assert target.has_block(chain_of(PROMPT, ("secret salt",))[2])


def test_any_safetensors_reader_can_take_it_apart(source, path) -> None:
    source.export(path, token_ids=PROMPT)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == "omlx-kv-prefix"
        assert set(file.keys()) == {block_hash.hex() for block_hash in chain_of(PROMPT)}
        block = safetensors.numpy.load(file.get_tensor(chain_of(PROMPT)[1].hex()).tobytes())
    payload = source.load_block(chain_of(PROMPT)[1], tokens_of(PROMPT, 1))
    assert payload is not None
    assert block["layer.0.keys"].tobytes() == bytes(payload.tensors["layer.0.keys"].data)


# What is refused


def test_missing_blocks_are_counted(source, open_cache, store, path) -> None:
    long = [*PROMPT[:12], *range(900, 908)]
    with pytest.raises(MissingBlocksError, match="2 of 5 blocks are not on disk"):
        source.export(path, token_ids=long)
    with pytest.raises(MissingBlocksError, match="no block of this model"):
        open_cache(namespace=OTHER).export(path, token_ids=PROMPT)
    assert not path.exists()


def test_a_prompt_that_fills_no_block_can_not_be_exported(source, path) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to export"):
        source.export(path, token_ids=PROMPT[:3])


@pytest.mark.parametrize("what", [{}, {"block_hashes": [], "token_ids": []}])
def test_what_to_export_is_named_in_one_way(source, path, what: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="either by block_hashes or by token_ids"):
        source.export(path, **what)


def test_a_block_evicted_while_exporting_is_a_typed_error_that_leaves_nothing(
    source, path, directory, monkeypatch
) -> None:
    find = ssd_export._with_ancestors_and_parts

    def find_then_evict(*arguments: Any) -> Any:
        found = find(*arguments)
        block_path(directory, NAMESPACE, chain_of(PROMPT)[1]).unlink()
        return found

    monkeypatch.setattr(ssd_export, "_with_ancestors_and_parts", find_then_evict)
    with pytest.raises(MissingBlocksError, match="block 2 of 3"):
        source.export(path, token_ids=PROMPT)
    assert list(path.parent.glob("*prefix*")) == []


def test_a_damaged_block_is_not_exported_and_the_file_that_was_there_stays(source, path, directory) -> None:
    source.flush()
    damaged = block_path(directory, NAMESPACE, chain_of(PROMPT)[1])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.write_text("mine")
    with pytest.raises(CorruptBlockError):
        source.export(path, token_ids=PROMPT)
    assert path.read_text() == "mine"
    assert {each.name for each in path.parent.iterdir()} == {path.name, directory.name}


def test_an_export_is_for_its_owner_only(source, path) -> None:
    source.export(path, token_ids=PROMPT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_export_of_another_model_is_refused_by_name(source, open_target, path) -> None:
    source.export(path, token_ids=PROMPT)
    target = open_target(namespace=OTHER, description={"model": "other"})
    with pytest.raises(ForeignExportError, match=r"'tiny' .*'other'.* differ in model"):
        target.import_(path)
    assert target.stats().num_blocks == 0


def test_any_damage_to_an_export_is_found_before_anything_changes(source, open_target, path) -> None:
    source.export(path, token_ids=PROMPT)
    content = path.read_bytes()
    target = open_target()
    random_numbers = random.Random(1)
    bits = {random_numbers.randrange(8 * len(content)) for _ in range(150)} | set(range(0, 72, 5))
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises((BlockFileError, ForeignExportError)):
            target.import_(path)
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(BlockFileError):
            target.import_(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CorruptBlockError):
        target.import_(path)
    assert target.stats().bytes_written_ever == 0
    path.write_bytes(content)
    assert target.import_(path).blocks_written == 3


def test_a_file_of_another_kind_is_a_typed_error(source, directory, path) -> None:
    source.flush()
    with pytest.raises(BlockFileError, match="not a file of the format omlx-kv-prefix"):
        source.import_(block_path(directory, NAMESPACE, chain_of(PROMPT)[0]))
    with pytest.raises(FileNotFoundError):
        source.import_(path)


def test_a_block_that_does_not_follow_its_parent_is_refused(source, open_target, path, monkeypatch) -> None:
    find = ssd_export._with_ancestors_and_parts
    monkeypatch.setattr(ssd_export, "_with_ancestors_and_parts", lambda *arguments: find(*arguments)[::-1])
    source.export(path, token_ids=PROMPT)
    target = open_target()
    with pytest.raises(CorruptBlockError, match="doesn't follow"):
        target.import_(path)
    assert target.stats().num_blocks == 0


@pytest.mark.parametrize(("part", "named"), [(WINDOW, CHECKPOINT), (CHECKPOINT, WINDOW)])
def test_a_part_that_is_not_what_its_name_says_is_refused(
    source, open_target, store_part, path, monkeypatch, part: Part, named: Part
) -> None:
    store_part(source, chain_of(PROMPT)[2], part, named=named)
    with pytest.raises(CorruptBlockError, match=f"is not the {part} of its parent"):
        source.export(path, token_ids=PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(ssd_export, "_verify_hash", lambda *arguments: None)
        source.export(path, token_ids=PROMPT)
    target = open_target()
    with pytest.raises(CorruptBlockError, match=f"is not the {part} of its parent"):
        target.import_(path)
    assert target.stats().num_blocks == 0


def test_a_checkpoint_that_pretends_to_be_rows_is_refused(source, store_part, path) -> None:
    store_part(source, chain_of(PROMPT)[2], ROWS, named=CHECKPOINT)
    with pytest.raises(InvalidRequestError, match="isn't named after its tokens"):
        source.export(path, token_ids=PROMPT)


def test_a_block_that_follows_a_checkpoint_is_refused(
    source, open_target, store_part, path, make_payload, monkeypatch
) -> None:
    checkpoint = store_part(source, chain_of(PROMPT)[2], CHECKPOINT)
    block_hash = hash_block(checkpoint, [1, 2, 3, 4])
    assert source.save_block(block_hash, checkpoint, [1, 2, 3, 4], make_payload())
    find = ssd_export._with_ancestors_and_parts
    monkeypatch.setattr(ssd_export, "_with_ancestors_and_parts", lambda *args: list(dict.fromkeys(find(*args))))
    source.export(path, block_hashes=[block_hash])
    target = open_target()
    with pytest.raises(CorruptBlockError, match="doesn't follow"):
        target.import_(path)
    assert target.stats().num_blocks == 0


# Limits


@pytest.mark.parametrize(
    ("limits", "refusal"),
    [
        ({"size": 1400}, SaveOutcome.TOO_LARGE),
        ({"write_budget_bytes": 1400}, SaveOutcome.WRITE_BUDGET),
        ({"min_free_bytes": 1}, SaveOutcome.FREE_SPACE),
    ],
)
def test_importing_keeps_to_the_limits_and_says_so(
    source, open_target, path, monkeypatch, limits: dict[str, int], refusal: SaveOutcome
) -> None:
    source.export(path, token_ids=PROMPT)
    monkeypatch.setattr(ssd_budget, "free_space_bytes", lambda directory: 0)
    target = open_target(**limits)
    report = target.import_(path)
    assert report.refusal is refusal
    assert report.blocks_written == (0 if refusal is SaveOutcome.FREE_SPACE else 2)
    assert target.stats().num_blocks == report.blocks_written
    assert target.check().is_clean


def test_an_import_that_is_cut_short_goes_on_where_it_stopped(source, open_target, path) -> None:
    source.export(path, token_ids=PROMPT)
    assert open_target(write_budget_bytes=1400).import_(path).blocks_written == 2
    target = open_target()
    report = target.import_(path)
    assert (report.blocks_written, report.blocks_present, report.refusal) == (1, 2, None)
    assert_holds(target, source, PROMPT)
