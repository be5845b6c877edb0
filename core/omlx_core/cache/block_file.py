"""One block, one file: a safetensors file that proves its own content.

::

    8 bytes   length of the header, little-endian
    header    JSON: "__metadata__" first, then one entry per tensor; padded with spaces to a multiple of 8
    data      the tensors' elements, widest element type first, so that each is aligned to its own size

``__metadata__`` starts with ``checksum``: the XXH3-128 of **every other byte of the file**, in order: length, header
without the checksum's 32 hex digits, data. A changed bit anywhere is therefore a mismatch, in the padding too. The
file is written directly rather than through ``safetensors.serialize_file``: that one makes a temporary file of its own
(a second name to clean up after a crash), reports a full disk without an errno, and tells the size only afterwards,
while the budget must know it before.

Any safetensors reader can open the file; this module's own reader checks more than they do, and never maps the file,
so that a truncation under way is an error rather than a SIGBUS.
"""

from __future__ import annotations

import array
import base64
import binascii
import fcntl
import io
import itertools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from omlx_core.cache.block_hash import HASH_SIZE_BYTES, BlockHash, NamespaceHash
from omlx_core.cache.parts import PARTS, ROWS, Part
from omlx_core.cache.payload import BlockLayout, BlockPayload, BlockTensor, TensorSpec
from omlx_core.errors import BlockFileError, CorruptBlockError

FORMAT_NAME = "omlx-kv-block"
FORMAT_VERSION = 2
BLOCK_SUFFIX = ".safetensors"

_MAX_HEADER_BYTES = 16 * 1024**2
_MAX_BUFFERS = 1024  # in one call; IOV_MAX of Linux and macOS
_CHECKSUM_DIGITS = 32
_METADATA_KEY = b'{"__metadata__":'
_HEADER_START = _METADATA_KEY + b'{"checksum":"'
_BYTES_PER_READ = 1024**2
_MAX_KNOWN_LAYOUTS = 64
_ELEMENT_BYTES = {
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
class EncodedBlock:
    """A block file that isn't written yet: its buffers in order, the payload's own memory among them."""

    buffers: tuple[bytes | memoryview, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Header:
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


def encode_block(identity: BlockIdentity, payload: BlockPayload) -> EncodedBlock:
    """Lay out a block's file in memory, without copying the payload.

    Raises:
        BlockFileError: a tensor's type isn't known to safetensors, or its bytes don't fill its shape.
    """
    ordered = sorted(payload.tensors.items(), key=lambda item: (-_ELEMENT_BYTES.get(item[1].dtype, 0), item[0]))
    metadata = {
        "format": FORMAT_NAME,
        "format_version": str(FORMAT_VERSION),
        "namespace": identity.namespace.hex(),
        "block_hash": identity.block_hash.hex(),
        "parent_hash": identity.parent_hash.hex() if identity.parent_hash is not None else "",
        "depth": str(identity.depth),
        "part": identity.part,
        "num_tokens": str(identity.num_tokens),
        "token_ids": base64.b64encode(identity.token_ids).decode(),
    }
    tensors: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        if _tensor_bytes(tensor.dtype, tensor.shape) != tensor.size_bytes or name == "__metadata__":
            raise BlockFileError(
                f"tensor {name!r} ({tensor.dtype}, shape {tensor.shape}, {tensor.size_bytes} bytes) can't be "
                f"written: its type must be one of {', '.join(_ELEMENT_BYTES)} and its bytes fill its shape"
            )
        start, end = end, end + tensor.size_bytes
        tensors[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = [tensor.data for _, tensor in ordered]
    head = encode_header(metadata, tensors, data)
    return EncodedBlock((head, *data), len(head) + end)


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
    if len(text) > _MAX_HEADER_BYTES:
        raise BlockFileError(f"a header of {len(text)} bytes exceeds {_MAX_HEADER_BYTES}: use smaller blocks")
    head = len(text).to_bytes(8, "little") + text
    digits_at = 8 + len(_HEADER_START)
    return head[:digits_at] + _checksum(text, data) + head[digits_at + _CHECKSUM_DIGITS :]


def write_block_file(path: Path, block: EncodedBlock) -> None:
    """Write a block to a new file and make its content durable; its name is not (see `sync_directory`).

    Raises:
        OSError: the file exists, or could not be written in full. A part of it may be left.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(fd, block.buffers)
        size_bytes = os.fstat(fd).st_size
        if size_bytes != block.size_bytes:
            raise BlockFileError(f"{path} has {size_bytes} bytes after writing {block.size_bytes}")
        sync_file(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, buffers: Sequence[bytes | memoryview]) -> None:
    # Straight from the payload's memory, in one call as a rule: each call has to wait for the interpreter afterwards.
    # Systems cap a single write near 2 GiB.
    waiting = deque(memoryview(buffer) for buffer in buffers if len(buffer))
    while waiting:
        _drop_front(waiting, os.writev(fd, list(itertools.islice(waiting, _MAX_BUFFERS))))


def _drop_front(buffers: deque[memoryview], num_bytes: int) -> None:
    """Take away what a call has dealt with, which may end within a buffer."""
    while buffers and num_bytes >= len(buffers[0]):
        num_bytes -= len(buffers.popleft())
    if num_bytes:
        buffers[0] = buffers[0][num_bytes:]


def read_block_identity(file: io.FileIO) -> BlockIdentity:
    """Read who a block file says it is, without reading or verifying its data.

    Args:
        file: the file, open for reading at its start.

    Raises:
        CorruptBlockError: the header can't be what was written.
        BlockFileError: it's some other safetensors file, or of a version that this one doesn't know.
        OSError: the file could not be read.
    """
    return _read_header(file, None).identity


def read_block_layout(file: io.FileIO) -> BlockLayout:
    """Read what a block file says its tensors are, in the order of its data; raises as `read_block_identity` does."""
    return _read_header(file, None).layout


def read_block(file: io.FileIO, size_bytes: int | None = None) -> tuple[BlockIdentity, BlockPayload]:
    """Read a block file and verify every byte of it.

    Args:
        file: the file, open for reading at its start.
        size_bytes: read that many bytes from where the file stands, as one that is part of another; None for all.

    Returns:
        The block's identity, for the caller to compare with what it asked for, and its tensors: read-only views of
        one buffer.

    Raises:
        CorruptBlockError: the content is not what was written.
        BlockFileError: it's some other safetensors file, or of a version that this one doesn't know.
        OSError: the file could not be read.
    """
    header = _read_header(file, size_bytes)
    return header.identity, _read_payload(file, header)


def read_block_into(
    file: io.FileIO, place: Callable[[BlockLayout], Sequence[memoryview] | None]
) -> tuple[BlockIdentity, BlockPayload | int]:
    """Read a block file straight to where its elements belong, and verify every byte of it.

    Args:
        file: the file, open for reading at its start.
        place: gives, for the file's tensors in the order of its data, the writable pieces of memory that they fill
            one after the other; None to have a payload after all.

    Returns:
        The block's identity, for the caller to compare with what it asked for, and the bytes put in place or the
        payload.

    Raises:
        CorruptBlockError: the content is not what was written; the memory may hold some of it.
        BlockFileError: it's some other safetensors file, or of a version that this one doesn't know, or the pieces
            of memory are not as large as the data.
        OSError: the file could not be read; the memory may hold some of it.
    """
    header = _read_header(file, None)
    pieces = place(header.layout)
    if pieces is None:
        return header.identity, _read_payload(file, header)
    if sum(len(piece) for piece in pieces) != header.data_size_bytes:
        raise BlockFileError(f"memory of another size than the {header.data_size_bytes} bytes of a block")
    digest = _start_digest(header.raw)
    for batch in _batches(pieces):
        _scatter_into(file, batch)
        # While they are in the CPU's cache.
        for piece in batch:
            digest.update(piece)
    _compare_digest(header.raw, digest)
    return header.identity, header.data_size_bytes


def sync_file(fd: int) -> None:
    """Put a file's content on the medium. On macOS plain fsync stops at the drive's cache."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # not every file system has it
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(fd)
    finally:
        os.close(fd)


def _start_digest(header: bytes) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128(len(header).to_bytes(8, "little"))
    digest.update(header[: len(_HEADER_START)])
    digest.update(header[len(_HEADER_START) + _CHECKSUM_DIGITS :])
    return digest


def _checksum(header: bytes, data: Sequence[memoryview]) -> bytes:
    digest = _start_digest(header)
    for view in data:
        digest.update(view)
    return str(digest.hexdigest()).encode()


def _compare_digest(header: bytes, digest: xxhash.xxh3_128) -> None:
    expected = header[len(_HEADER_START) : len(_HEADER_START) + _CHECKSUM_DIGITS]
    if digest.hexdigest().encode() != expected:
        raise CorruptBlockError("the checksum doesn't match")


def _read_payload(file: io.FileIO, header: _Header) -> BlockPayload:
    # Not a bytearray: that would fill the memory with zeros first.
    buffer = np.empty(header.data_size_bytes, dtype=np.uint8).data
    _read_into(file, buffer)
    digest = _start_digest(header.raw)
    digest.update(buffer)
    _compare_digest(header.raw, digest)
    data, tensors, end = buffer.toreadonly(), {}, 0
    for name, spec in header.layout.items():
        start, end = end, end + spec.size_bytes
        tensors[name] = BlockTensor(spec.dtype, spec.shape, data[start:end])
    return BlockPayload(tensors)


def _batches(pieces: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Pieces for one call each: no more than the system takes, nor than stays in the CPU's cache."""
    batch: list[memoryview] = []
    size_bytes = 0
    for piece in pieces:
        if batch and (len(batch) == _MAX_BUFFERS or size_bytes + len(piece) > _BYTES_PER_READ):
            yield batch
            batch, size_bytes = [], 0
        batch.append(piece)
        size_bytes += len(piece)
    if batch:
        yield batch


def _scatter_into(file: io.FileIO, pieces: Sequence[memoryview]) -> None:
    left = deque(piece for piece in pieces if len(piece))
    while left:
        count = os.readv(file.fileno(), list(left))
        if not count:
            raise CorruptBlockError(f"the file ends {sum(map(len, left))} bytes early")
        _drop_front(left, count)


def _read_into(file: io.FileIO, buffer: memoryview) -> None:
    # One call as a rule; systems cap a single read near 2 GiB.
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CorruptBlockError(f"the file ends {len(buffer) - done} bytes early")
        done += count


def read_sealed_header(file: io.FileIO, format_name: str, format_version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and verify a header that `encode_header` made without data.

    Returns:
        Its metadata and the tensors' entries, by name.

    Raises:
        CorruptBlockError: it is not what was written.
        BlockFileError: the file is of another format or version.
        OSError: the file could not be read.
    """
    raw = _read_raw_header(file, os.fstat(file.fileno()).st_size)
    metadata, tensors = _parse_json(raw, format_name, format_version)
    _compare_digest(raw, _start_digest(raw))
    return metadata, tensors


def _read_raw_header(file: io.FileIO, size_bytes: int) -> bytes:
    if size_bytes < 8:
        raise CorruptBlockError(f"{size_bytes} bytes are too few for a header")
    prefix = bytearray(8)
    _read_into(file, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    # Before anything is allocated: a length is only believed if the file can hold it.
    if length > min(_MAX_HEADER_BYTES, size_bytes - 8):
        raise CorruptBlockError(f"a header of {length} bytes in a file of {size_bytes} bytes")
    raw = bytearray(length)
    _read_into(file, memoryview(raw))
    return bytes(raw)


def _parse_json(raw: bytes, format_name: str, format_version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header of a known format as metadata and tensors; its checksum isn't verified."""
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


def _read_header(file: io.FileIO, size_bytes: int | None) -> _Header:
    if size_bytes is None:
        size_bytes = os.fstat(file.fileno()).st_size
    raw = _read_raw_header(file, size_bytes)
    metadata_end = raw.find(b"}") + 1  # it is flat, and no string in it has a brace
    known = _known_layouts.get(raw[metadata_end:]) if raw.startswith(_HEADER_START) else None
    try:
        if known is None:
            metadata, entries = _parse_json(raw, FORMAT_NAME, FORMAT_VERSION)
            known = _parse_layout(entries)
        else:
            alone = raw[:metadata_end] + b"}"
            metadata, _ = _parse_json(alone, FORMAT_NAME, FORMAT_VERSION)
        identity = _parse_identity(metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CorruptBlockError(f"the header is malformed: {exc!r}") from exc
    layout, data_size_bytes = known
    if 8 + len(raw) + data_size_bytes != size_bytes:
        raise CorruptBlockError(f"{size_bytes} bytes, where the header says {8 + len(raw) + data_size_bytes}")
    if len(_known_layouts) >= _MAX_KNOWN_LAYOUTS:
        _known_layouts.clear()
    _known_layouts[raw[metadata_end:]] = known
    return _Header(raw, identity, layout, data_size_bytes)


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
    if _tensor_bytes(dtype, shape) != end - start:
        raise ValueError(f"tensor {name!r} of {dtype} and shape {shape} in {end - start} bytes")
    return start, end, TensorSpec(dtype, shape, end - start)


def _tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Size of a tensor in bytes; None for an element type that isn't known."""
    element_bytes = _ELEMENT_BYTES.get(dtype)
    return None if element_bytes is None else element_bytes * math.prod(shape)
