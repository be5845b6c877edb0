"""One block, one file: a safetensors file that proves its own content. `block_header` says what is in it.

It is written directly rather than through ``safetensors.serialize_file``: that one makes a temporary file of its own (a
second name to clean up after a crash), reports a full disk without an errno, and tells the size only afterwards, while
the budget must know it before.

Any safetensors reader can open the file; this module's own reader checks more than they do, and never maps the file,
so that a truncation under way is an error rather than a SIGBUS.
"""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omlx_core.cache.block_header import (
    ELEMENT_BYTES,
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    BlockHeader,
    BlockIdentity,
    compare_digest,
    encode_header,
    parse_header,
    parse_json,
    start_digest,
    tensor_bytes,
)
from omlx_core.cache.payload import BlockLayout, BlockPayload, BlockTensor
from omlx_core.errors import BlockFileError, CorruptBlockError

BLOCK_SUFFIX = ".safetensors"

_MAX_BUFFERS = 1024  # in one call; IOV_MAX of Linux and macOS
_BYTES_PER_READ = 1024**2


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block file that isn't written yet: its buffers in order, the payload's own memory among them."""

    buffers: tuple[bytes | memoryview, ...]
    size_bytes: int


def encode_block(identity: BlockIdentity, payload: BlockPayload) -> EncodedBlock:
    """Lay out a block's file in memory, without copying the payload.

    Raises:
        BlockFileError: a tensor's type isn't known to safetensors, or its bytes don't fill its shape.
    """
    ordered = sorted(payload.tensors.items(), key=lambda item: (-ELEMENT_BYTES.get(item[1].dtype, 0), item[0]))
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
        if tensor_bytes(tensor.dtype, tensor.shape) != tensor.size_bytes or name == "__metadata__":
            raise BlockFileError(
                f"tensor {name!r} ({tensor.dtype}, shape {tensor.shape}, {tensor.size_bytes} bytes) can't be "
                f"written: its type must be one of {', '.join(ELEMENT_BYTES)} and its bytes fill its shape"
            )
        start, end = end, end + tensor.size_bytes
        tensors[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = [tensor.data for _, tensor in ordered]
    head = encode_header(metadata, tensors, data)
    return EncodedBlock((head, *data), len(head) + end)


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
    return _read_header(file).identity


def read_block_layout(file: io.FileIO) -> BlockLayout:
    """Read what a block file says its tensors are, in the order of its data; raises as `read_block_identity` does."""
    return _read_header(file).layout


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
    header = _read_header(file)
    pieces = place(header.layout)
    if pieces is None:
        return header.identity, _read_payload(file, header)
    if sum(len(piece) for piece in pieces) != header.data_size_bytes:
        raise BlockFileError(f"memory of another size than the {header.data_size_bytes} bytes of a block")
    digest = start_digest(header.raw)
    for batch in _batches(pieces):
        _scatter_into(file, batch)
        # While they are in the CPU's cache.
        for piece in batch:
            digest.update(piece)
    compare_digest(header.raw, digest)
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


def _read_payload(file: io.FileIO, header: BlockHeader) -> BlockPayload:
    # Not a bytearray: that would fill the memory with zeros first.
    buffer = np.empty(header.data_size_bytes, dtype=np.uint8).data
    _read_into(file, buffer)
    digest = start_digest(header.raw)
    digest.update(buffer)
    compare_digest(header.raw, digest)
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
    metadata, tensors = parse_json(raw, format_name, format_version)
    compare_digest(raw, start_digest(raw))
    return metadata, tensors


def _read_raw_header(file: io.FileIO, size_bytes: int) -> bytes:
    if size_bytes < 8:
        raise CorruptBlockError(f"{size_bytes} bytes are too few for a header")
    prefix = bytearray(8)
    _read_into(file, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    # Before anything is allocated: a length is only believed if the file can hold it.
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise CorruptBlockError(f"a header of {length} bytes in a file of {size_bytes} bytes")
    raw = bytearray(length)
    _read_into(file, memoryview(raw))
    return bytes(raw)


def _read_header(file: io.FileIO, size_bytes: int | None = None) -> BlockHeader:
    if size_bytes is None:
        size_bytes = os.fstat(file.fileno()).st_size
    return parse_header(_read_raw_header(file, size_bytes), size_bytes)
