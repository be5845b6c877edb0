"""Chain hashes: a block's identity is its tokens and everything before them.

``hash(block) = SHA-256(parent hash ‖ token ids as little-endian uint32 ‖ extra keys)``; the first block's parent is
the *namespace*, a fingerprint of everything else that shapes a KV value. Two blocks of equal hash therefore follow
equal prefixes of the same model, which is what makes one interchangeable with the other. vLLM's prefix cache
(``vllm/v1/core/kv_cache_utils.py``) uses the same chain; unlike it, nothing here is seeded per process, because the
hashes name files that outlive it.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NewType

import numpy as np

BlockHash = NewType("BlockHash", bytes)
"""32 bytes that name a full block."""

NamespaceHash = NewType("NamespaceHash", bytes)
"""32 bytes that name a model, its tokenizer, its cache layout and the format: the root of every chain."""

HASH_SIZE_BYTES = 32


def hash_namespace(description: Mapping[str, Any]) -> NamespaceHash:
    """Hash what distinguishes one namespace from another.

    Args:
        description: JSON-serialisable facts; the order of keys doesn't matter.
    """
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return NamespaceHash(hashlib.sha256(canonical.encode()).digest())


def hash_block(
    parent: BlockHash | NamespaceHash, token_ids: Sequence[int] | np.ndarray, extra_keys: Sequence[str] = ()
) -> BlockHash:
    """Hash one full block.

    Args:
        parent: the preceding block's hash, or the namespace for the first block.
        token_ids: the block's tokens, integers in ``[0, 2**32)``.
        extra_keys: what else must be equal for the block to be shared, such as a caller's cache salt.

    Raises:
        OverflowError: a token id doesn't fit 32 bits.
        TypeError: a token id isn't an integer.
    """
    tokens = as_uint32(token_ids)
    # The lengths keep (tokens, keys) apart from any other split of the same bytes.
    content = [parent, len(tokens).to_bytes(4, "little"), tokens.tobytes()]
    for key in extra_keys:
        encoded = key.encode(errors="surrogatepass")  # a salt out of JSON may hold half a surrogate pair
        content += (len(encoded).to_bytes(4, "little"), encoded)
    return BlockHash(hashlib.sha256(b"".join(content)).digest())


def iter_block_hashes(
    namespace: NamespaceHash,
    token_ids: Sequence[int] | np.ndarray,
    block_size: int,
    extra_keys: Sequence[str] = (),
) -> Iterator[BlockHash]:
    """Yield the chain hash of each full block of ``token_ids``, lazily: a miss at block 1 hashes no block 2."""
    tokens = as_uint32(token_ids)
    parent: BlockHash | NamespaceHash = namespace
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block_hash = hash_block(parent, tokens[start : start + block_size], extra_keys)
        yield block_hash
        parent = block_hash


def as_uint32(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids as little-endian 32-bit integers; what would wrap around or be rounded is refused.

    A cast alone isn't enough: of arrays, and with NumPy 1 of lists too, it silently gives another sequence.

    Raises:
        OverflowError: a token id doesn't fit 32 bits.
        TypeError: a token id isn't an integer.
    """
    if isinstance(token_ids, (list, tuple)):
        # Several times faster than NumPy, which looks at every element to find a type; out of range is told below.
        with contextlib.suppress(OverflowError):
            return np.frombuffer(array.array("I", token_ids), np.uint32).astype("<u4", copy=False)
    tokens = np.asarray(token_ids)
    if tokens.dtype == np.dtype("<u4") or not tokens.size:
        return tokens.astype("<u4", copy=False)
    # Integers beyond 64 bits come as objects.
    if tokens.dtype.kind not in "iuO":
        raise TypeError(f"token ids must be integers, not {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= 2**32:
        raise OverflowError(f"token ids range from {tokens.min()} to {tokens.max()}: they must be in [0, 2**32)")
    return tokens.astype("<u4")
