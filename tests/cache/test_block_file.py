from __future__ import annotations

import itertools
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from omlx_core.cache import block_file as block_file_module
from omlx_core.cache.block_file import (
    encode_block,
    read_block,
    read_block_identity,
    read_block_into,
    read_block_layout,
    write_block_file,
)
from omlx_core.cache.block_header import BlockIdentity, encode_token_ids
from omlx_core.cache.parts import PARTS, ROWS
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.errors import BlockFileError, CorruptBlockError

IDENTITY = BlockIdentity(b"n" * 32, b"h" * 32, b"p" * 32, 7, encode_token_ids([1, 2, 2**32 - 1]))
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "BOOL": 1, "I64": 8}


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> BlockTensor:
    size = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 2, size, dtype=np.uint8).data
    return BlockTensor(dtype, shape, data.toreadonly())


def read(path: Path) -> tuple[BlockIdentity, BlockPayload]:
    with open(path, "rb", buffering=0) as file:
        return read_block(file)


@pytest.fixture
def block_file(tmp_path: Path) -> Path:
    payload = BlockPayload({"keys": tensor("BF16", (2, 3, 5), 1), "key_scale": tensor("F32", (), 2)})
    write_block_file(tmp_path / "block.safetensors", encode_block(IDENTITY, payload))
    return tmp_path / "block.safetensors"


def rewrite_header(path: Path, change: dict[str, object]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"].update(change)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@settings(max_examples=50, deadline=None)
@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        max_size=5,
    ),
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=9),
    part=st.sampled_from([ROWS, *PARTS]),
)
def test_reads_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, specs, tokens, part) -> None:
    path = tmp_path_factory.mktemp("block") / "block.safetensors"
    payload = BlockPayload(
        {name: tensor(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(specs.items())}
    )
    identity = BlockIdentity(b"n" * 32, b"h" * 32, None, 0, encode_token_ids(tokens), part)
    block = encode_block(identity, payload)
    write_block_file(path, block)

    assert path.stat().st_size == block.size_bytes
    assert read(path) == (identity, payload)
    with open(path, "rb", buffering=0) as file:
        assert read_block_identity(file) == identity


def test_zero_dimensional_and_empty_tensors_keep_their_type_and_shape(tmp_path: Path) -> None:
    shapes = {"scalar": ("U32", ()), "empty": ("BF16", (0, 4)), "full": ("F16", (3,)), "inner": ("F32", (2, 0, 3))}
    payload = BlockPayload({name: tensor(*spec) for name, spec in shapes.items()})
    write_block_file(tmp_path / "b", encode_block(IDENTITY, payload))

    read_tensors = read(tmp_path / "b")[1].tensors
    assert {name: (t.dtype, t.shape) for name, t in read_tensors.items()} == shapes


def test_the_tensors_read_are_read_only_views_of_one_buffer(block_file: Path) -> None:
    views = [tensor.data for tensor in read(block_file)[1].tensors.values()]
    assert all(view.readonly and view.format == "B" for view in views)
    assert len({id(view.obj) for view in views}) == 1


def test_wider_elements_come_first_so_that_every_tensor_is_aligned(tmp_path: Path) -> None:
    shapes = {"a": ("U8", (3,)), "b": ("F16", (3,)), "c": ("I64", (1,)), "d": ("F32", (3,))}
    write_block_file(
        tmp_path / "b", encode_block(IDENTITY, BlockPayload({name: tensor(*spec) for name, spec in shapes.items()}))
    )
    for read_tensor in read(tmp_path / "b")[1].tensors.values():
        address = np.frombuffer(read_tensor.data, dtype=np.uint8).ctypes.data
        assert address % ITEM_BYTES[read_tensor.dtype] == 0


def test_any_safetensors_reader_can_open_it(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    payload = BlockPayload(
        {
            "values": BlockTensor("F32", values.shape, memoryview(values.tobytes())),
            "scalar": tensor("U32", ()),
            "none": tensor("F16", (0, 2)),
        }
    )
    write_block_file(tmp_path / "b.safetensors", encode_block(IDENTITY, payload))

    with safe_open(tmp_path / "b.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("values"), values)
        assert file.get_tensor("scalar").shape == ()
        assert file.get_tensor("none").shape == (0, 2)
        assert file.metadata()["block_hash"] == IDENTITY.block_hash.hex()
        assert file.metadata()["num_tokens"] == "3"
        assert file.metadata()["part"] == "rows"


def test_any_single_flipped_bit_is_detected(block_file: Path) -> None:
    content = bytearray(block_file.read_bytes())
    for bit in range(0, 8 * len(content), 7):  # every byte, every position in a byte
        content[bit // 8] ^= 1 << bit % 8
        block_file.write_bytes(content)
        with pytest.raises(BlockFileError):
            read(block_file)
        content[bit // 8] ^= 1 << bit % 8


def test_changed_padding_of_the_header_is_detected(block_file: Path) -> None:
    content = block_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    assert len(text) < length, "the fixture's header must have padding"
    block_file.write_bytes(content[:8] + text + b"\n" * (length - len(text)) + content[8 + length :])
    with pytest.raises(CorruptBlockError, match="checksum"):
        read(block_file)


def test_truncation_and_extension_at_each_boundary_is_corruption(block_file: Path) -> None:
    content = block_file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    assert len(content) == header_end + 60 + 4
    for end in (0, 7, 8, 9, header_end - 1, header_end, header_end + 1, header_end + 4, len(content) - 1):
        block_file.write_bytes(content[:end])
        with pytest.raises(CorruptBlockError):
            read(block_file)
    block_file.write_bytes(content + b"\0")
    with pytest.raises(CorruptBlockError):
        read(block_file)


def test_a_header_length_beyond_the_file_allocates_nothing(block_file: Path) -> None:
    content = block_file.read_bytes()
    for length in (len(content) - 7, 2**40, 2**64 - 1):
        block_file.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(CorruptBlockError, match="header of"):
            read(block_file)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"\xff", b'{"a": 1e999'])
def test_a_header_that_is_not_json_is_corruption(block_file: Path, text: bytes) -> None:
    block_file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CorruptBlockError, match="JSON"):
        read(block_file)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_no_content_makes_it_fail_in_another_way(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "b"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(BlockFileError):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"block_hash": "00"},
        {"parent_hash": "xyz"},
        {"parent_hash": ""},
        {"depth": "-1"},
        {"depth": "seven"},
        {"depth": 7.5},
        {"token_ids": "?"},
        {"num_tokens": "4"},
        {"namespace": None},
    ],
    ids=str,
)
def test_malformed_metadata_is_corruption(block_file: Path, change: dict[str, object]) -> None:
    rewrite_header(block_file, change)
    with pytest.raises(CorruptBlockError):
        read(block_file)


@pytest.mark.parametrize("part", ["", "state", None, ["rows"]])
def test_an_unknown_part_is_corruption_before_the_data_is_read(block_file: Path, part: object) -> None:
    rewrite_header(block_file, {"part": part})
    with open(block_file, "rb", buffering=0) as file, pytest.raises(CorruptBlockError, match="no part of a block"):
        read_block_identity(file)


def test_consistent_metadata_that_was_changed_is_corruption(block_file: Path) -> None:
    rewrite_header(block_file, {"depth": "8"})
    with pytest.raises(CorruptBlockError, match="checksum"):
        read(block_file)


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_format_version_is_not_corruption(block_file: Path, version: str) -> None:
    rewrite_header(block_file, {"format_version": version})
    with pytest.raises(BlockFileError, match=f"version '{version}'") as caught:
        read(block_file)
    assert not isinstance(caught.value, CorruptBlockError)


def test_a_foreign_safetensors_file_is_not_corruption(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(BlockFileError, match="not a file of the format") as caught:
        read(tmp_path / "w")
    assert not isinstance(caught.value, CorruptBlockError)


def test_writing_never_replaces_a_file_and_keeps_others_out(block_file: Path) -> None:
    before = block_file.read_bytes()
    with pytest.raises(FileExistsError):
        write_block_file(block_file, encode_block(IDENTITY, BlockPayload({})))
    assert block_file.read_bytes() == before
    assert stat.S_IMODE(block_file.stat().st_mode) == 0o600


def test_a_short_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = encode_block(IDENTITY, BlockPayload({}))
    status = os.stat_result((0o600, 0, 0, 1, 0, 0, block.size_bytes - 1, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda fd: status)
    with pytest.raises(BlockFileError, match="after writing"):
        write_block_file(tmp_path / "b", block)


def test_a_write_that_stops_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.arange(3000, dtype=np.uint8)
    names = [f"layer.{number}" for number in range(1500)]  # more buffers than a system takes at once
    payload = BlockPayload({name: BlockTensor("U8", (2,), content[i : i + 2].data) for i, name in enumerate(names)})
    payload = BlockPayload({**payload.tensors, "all": BlockTensor("U8", (3000,), content.data)})
    limits = itertools.cycle([7, 1, 2048, 1000])

    def write_some(fd: int, buffers: list[memoryview]) -> int:
        assert len(buffers) <= 1024
        return os.write(fd, b"".join(buffers)[: next(limits)])

    monkeypatch.setattr(os, "writev", write_some)
    write_block_file(tmp_path / "b", encode_block(IDENTITY, payload))
    assert read(tmp_path / "b") == (IDENTITY, payload)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("keys", BlockTensor("F31", (1,), memoryview(b"abcd"))),
        ("keys", BlockTensor("F32", (2,), memoryview(b"abcd"))),
        ("__metadata__", BlockTensor("F32", (1,), memoryview(b"abcd"))),
    ],
)
def test_a_tensor_that_does_not_fill_its_shape_is_refused(name: str, bad: BlockTensor) -> None:
    with pytest.raises(BlockFileError, match=name):
        encode_block(IDENTITY, BlockPayload({name: bad}))


def test_a_token_id_beyond_32_bits_is_refused() -> None:
    with pytest.raises(OverflowError):
        encode_token_ids([2**32])


# Straight to where it belongs.

PIECES = st.lists(st.integers(0, 400), min_size=1, max_size=40)


def scattered(path: Path, piece_bytes: list[int]) -> tuple[BlockIdentity, bytes]:
    """What a file's data is, read into pieces of memory of these sizes, and of whatever is missing to the whole."""
    pieces: list[memoryview] = []

    def place(layout):
        sizes = [*piece_bytes, sum(spec.size_bytes for spec in layout.values()) - sum(piece_bytes)]
        pieces.extend(memoryview(bytearray(size)) for size in sizes)
        return pieces

    with open(path, "rb", buffering=0) as file:
        identity, size_bytes = read_block_into(file, place)
    assert size_bytes == sum(map(len, pieces))
    return identity, b"".join(pieces)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    payload = BlockPayload({f"{number}.keys": tensor("F16", (4, 8, 256), number) for number in range(3)})
    write_block_file(path, encode_block(IDENTITY, payload))
    return path


@settings(max_examples=30, deadline=None)
@given(piece_bytes=PIECES, most_bytes=st.integers(1, 5000), batch_bytes=st.integers(1, 5000), batch=st.integers(1, 7))
def test_any_pieces_of_memory_are_filled_however_little_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, piece_bytes, most_bytes, batch_bytes, batch
) -> None:
    path = tmp_path_factory.mktemp("block") / "block.safetensors"
    payload = BlockPayload({"keys": tensor("F16", (4, 8, 256), 1), "scale": tensor("F32", (4,), 2)})
    write_block_file(path, encode_block(IDENTITY, payload))
    num_pieces: list[int] = []

    def read_little(fd, buffers):
        num_pieces.append(len(buffers))
        little = [buffer[:most_bytes] for buffer in buffers[:1]]
        return readv(fd, little)

    readv = os.readv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "readv", read_little)
        patch.setattr(block_file_module, "_BYTES_PER_READ", batch_bytes)
        patch.setattr(block_file_module, "_MAX_BUFFERS", batch)
        identity, data = scattered(path, piece_bytes)
    assert (identity, data) == (IDENTITY, bytes(payload.tensors["scale"].data) + bytes(payload.tensors["keys"].data))
    assert max(num_pieces) <= batch


def test_more_pieces_than_one_call_takes_are_filled(large_file: Path) -> None:
    _, data = scattered(large_file, [7] * 5000)
    assert data == large_file.read_bytes()[-len(data) :]


@pytest.mark.parametrize("damage", ["flipped first", "flipped last", "short", "torn", "long", "empty"])
def test_damage_is_found_after_a_read_to_its_place_too(large_file: Path, damage: str) -> None:
    content = bytearray(large_file.read_bytes())
    data_at = 8 + int.from_bytes(content[:8], "little")
    if damage.startswith("flipped"):
        content[data_at if damage == "flipped first" else -1] ^= 1
    elif damage == "torn":
        content[-1000:] = bytes(1000)
    else:
        content = {"short": content[:-1], "long": content + b"x", "empty": content[:0]}[damage]
    large_file.write_bytes(content)
    with pytest.raises(CorruptBlockError):
        scattered(large_file, [100] * 10)


def test_a_file_that_shrinks_while_it_is_read_is_damaged(large_file: Path) -> None:
    def place(layout):
        os.truncate(large_file, large_file.stat().st_size - 10)
        return [memoryview(bytearray(sum(spec.size_bytes for spec in layout.values())))]

    with open(large_file, "rb", buffering=0) as file, pytest.raises(CorruptBlockError, match="ends 10 bytes early"):
        read_block_into(file, place)


def test_memory_of_another_size_is_refused_before_anything_is_read(large_file: Path) -> None:
    memory = bytearray(100)
    with open(large_file, "rb", buffering=0) as file, pytest.raises(BlockFileError, match="another size"):
        read_block_into(file, lambda _: [memoryview(memory)])
    assert memory == bytes(100)


def test_a_block_without_a_place_is_read_as_a_payload(large_file: Path) -> None:
    with open(large_file, "rb", buffering=0) as file:
        assert read_block_into(file, lambda _: None) == read(large_file)


def test_a_header_is_verified_though_its_layout_is_known(large_file: Path) -> None:
    read(large_file)
    with open(large_file, "rb", buffering=0) as file:
        layout = read_block_layout(file)
    assert [(name, spec.dtype, spec.shape) for name, spec in layout.items()] == [
        (f"{number}.keys", "F16", (4, 8, 256)) for number in range(3)
    ]
    content = bytearray(large_file.read_bytes())
    content[content.index(b'"depth":"7"') + 9 : content.index(b'"depth":"7"') + 10] = b"8"
    large_file.write_bytes(content)
    with pytest.raises(CorruptBlockError, match="checksum"):
        read(large_file)
