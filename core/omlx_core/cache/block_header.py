"""The header of a block file: what is in the file, and the checksum that proves it.

::

    8 bytes   length of the header, little-endian
    header    JSON: "__metadata__" first, then one entry per tensor; padded with spaces to a multiple of 8
    data      the tensors' elements, widest element type first, so that each is aligned to its own size

``__metadata__`` starts with ``checksum``: the XXH3-128 of **every other byte of the file**, in order: length, header
without the checksum's 32 hex digits, data. A changed bit anywhere is therefore a mismatch, in the padding too.
"""

from __future__ import annotations

import array
import base64
import binascii
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from omlx_core.cache.block_hash import HASH_SIZE_BYTES, BlockHash, NamespaceHash
from omlx_core.cache.parts import PARTS, ROWS, Part
from omlx_core.cache.payload import BlockLayout, TensorSpec
from omlx_core.errors import BlockFileError, CorruptBlockError

FORMAT_NAME = "omlx-kv-block"
FORMAT_VERSION = 2
MAX_HEADER_BYTES = 16 * 1024**2

_CHECKSUM_DIGITS = 32
_METADATA_KEY = b'{"__metadata__":'
_HEADER_START = _METADATA_KEY + b'{"checksum":"'
_MAX_KNOWN_LAYOUTS = 64
ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class BlockIdentity:
    """What a block file says about the block in it.

    Attributes:
        namespace: the root of the block's chain.
        block_hash: the block's name.
        parent_hash: the block before it; None for the first one of a chain.
        depth: number of blocks before it.
        token_ids: its tokens as little-endian uint32; see `encode_token_ids`.
        part: what of a block it is; the parent of any part but the rows is the block itself.
    """

    namespace: NamespaceHash
    block_hash: BlockHash
    parent_hash: BlockHash | None
    depth: int
    token_ids: bytes
    part: Part = ROWS

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""
        return len(self.token_ids) // 4


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """The header of one block file, without its length."""

    raw: bytes
    identity: BlockIdentity
    layout: BlockLayout  # in the order of the data
    data_size_bytes: int


def encode_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32.

    Raises:
        OverflowError: a token id doesn't fit 32 bits.
    """
    tokens = array.array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def encode_header(metadata: Mapping[str, str], tensors: Mapping[str, Any], data: Sequence[memoryview]) -> bytes:
    """The start of a safetensors file: length and header, with a checksum over all of that and `data`.

    Args:
        metadata: the other entries of ``__metadata__``.
        tensors: the tensors' entries, by name.
        data: what the checksum is to cover besides.

    Raises:
        BlockFileError: the header is too long.
    """
    header = {"__metadata__": {"checksum": "0" * _CHECKSUM_DIGITS, **metadata}, **tensors}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise BlockFileError(f"a header of {len(text)} bytes exceeds {MAX_HEADER_BYTES}: use smaller blocks")
    head = len(text).to_bytes(8, "little") + text
    digits_at = 8 + len(_HEADER_START)
    return head[:digits_at] + _checksum(text, data) + head[digits_at + _CHECKSUM_DIGITS :]


def start_digest(header: bytes) -> xxhash.xxh3_128:
    """The checksum of a file so far: of its header, and the length in front of it. The data is to be added."""
    digest = xxhash.xxh3_128(len(header).to_bytes(8, "little"))
    digest.update(header[: len(_HEADER_START)])
    digest.update(header[len(_HEADER_START) + _CHECKSUM_DIGITS :])
    return digest


def _checksum(header: bytes, data: Sequence[memoryview]) -> bytes:
    digest = start_digest(header)
    for view in data:
        digest.update(view)
    return str(digest.hexdigest()).encode()


def compare_digest(header: bytes, digest: xxhash.xxh3_128) -> None:
    """Compare a file's checksum with the one in its header.

    Raises:
        CorruptBlockError: they differ.
    """
    expected = header[len(_HEADER_START) : len(_HEADER_START) + _CHECKSUM_DIGITS]
    if digest.hexdigest().encode() != expected:
        raise CorruptBlockError("the checksum doesn't match")


def parse_json(raw: bytes, format_name: str, format_version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header of a known format as metadata and tensors; its checksum isn't verified.

    Raises:
        CorruptBlockError, BlockFileError: as `parse_header`.
    """
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise CorruptBlockError(f"the header is not JSON: {exc}") from exc
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != format_name:
        raise BlockFileError(f"not a file of the format {format_name}")
    if metadata.get("format_version") != str(format_version):
        raise BlockFileError(f"format version {metadata.get('format_version')!r}, this is {format_version}")
    if not raw.startswith(_HEADER_START):
        raise CorruptBlockError("the header doesn't start with the checksum")
    return metadata, header


# The blocks of a model differ in their metadata only. What follows that, as it is in the file, is looked up here: to
# parse it again takes longer than to read a small block.
_known_layouts: dict[bytes, tuple[BlockLayout, int]] = {}


def parse_header(raw: bytes, size_bytes: int) -> BlockHeader:
    """What a block file's header says; its checksum isn't verified.

    Args:
        raw: the header, without its length.
        size_bytes: of the whole file.

    Raises:
        CorruptBlockError: it can't be what was written.
        BlockFileError: it's some other safetensors file, or of a version that this one doesn't know.
    """
    metadata_end = raw.find(b"}") + 1  # it is flat, and no string in it has a brace
    known = _known_layouts.get(raw[metadata_end:]) if raw.startswith(_HEADER_START) else None
    try:
        if known is None:
            metadata, entries = parse_json(raw, FORMAT_NAME, FORMAT_VERSION)
            known = _parse_layout(entries)
        else:
            alone = raw[:metadata_end] + b"}"
            metadata, _ = parse_json(alone, FORMAT_NAME, FORMAT_VERSION)
        identity = _parse_identity(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CorruptBlockError(f"the header is malformed: {exc!r}") from exc
    layout, data_size_bytes = known
    if 8 + len(raw) + data_size_bytes != size_bytes:
        raise CorruptBlockError(f"{size_bytes} bytes, where the header says {8 + len(raw) + data_size_bytes}")
    if len(_known_layouts) >= _MAX_KNOWN_LAYOUTS:
        _known_layouts.clear()
    _known_layouts[raw[metadata_end:]] = known
    return BlockHeader(raw, identity, layout, data_size_bytes)


def _parse_identity(metadata: dict[str, Any]) -> BlockIdentity:
    try:
        token_ids = base64.b64decode(metadata["token_ids"], validate=True)
    except binascii.Error as exc:
        raise ValueError(f"token_ids: {exc}") from exc
    if len(token_ids) != 4 * int(metadata["num_tokens"]):
        raise ValueError(f"{len(token_ids)} bytes of token ids for {metadata['num_tokens']} tokens")
    depth = int(metadata["depth"])
    parent = metadata["parent_hash"]
    if depth < 0 or (depth == 0) != (parent == ""):
        raise ValueError(f"depth {depth} with parent {parent!r}")
    part = metadata["part"]
    if part not in (ROWS, *PARTS):
        raise ValueError(f"{part!r} is no part of a block")
    return BlockIdentity(
        namespace=NamespaceHash(_parse_hash(metadata["namespace"])),
        block_hash=BlockHash(_parse_hash(metadata["block_hash"])),
        parent_hash=BlockHash(_parse_hash(parent)) if parent else None,
        depth=depth,
        token_ids=token_ids,
        part=Part(part),
    )


def _parse_hash(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != HASH_SIZE_BYTES:
        raise ValueError(f"{text!r} is not a hash of {HASH_SIZE_BYTES} bytes")
    return digest


def _parse_layout(entries: Mapping[str, dict[str, Any]]) -> tuple[BlockLayout, int]:
    """The tensors in the order of the data, and its size in bytes."""
    placed = [(*_parse_tensor(name, entry), name) for name, entry in entries.items()]
    placed.sort(key=lambda item: item[:2])
    end = 0
    for start, stop, _, name in placed:
        if start != end:
            raise CorruptBlockError(f"tensor {name!r} starts at {start}, not at {end}")
        end = stop
    return {name: spec for _, _, spec, name in placed}, end


def _parse_tensor(name: str, entry: dict[str, Any]) -> tuple[int, int, TensorSpec]:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor {name!r} of shape {shape} at {start}:{end}")
    if tensor_bytes(dtype, shape) != end - start:
        raise ValueError(f"tensor {name!r} of {dtype} and shape {shape} in {end - start} bytes")
    return start, end, TensorSpec(dtype, shape, end - start)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Size of a tensor in bytes; None for an element type that isn't known."""
    element_bytes = ELEMENT_BYTES.get(dtype)
    return None if element_bytes is None else element_bytes * math.prod(shape)
