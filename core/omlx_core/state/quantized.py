"""Quantized keys and values: mlx-lm's `QuantizedKVCache`, from a given length of the sequence on.

mlx-lm converts a cache between two steps of a prompt, so what an answer is computed from depends on where the prompt
happened to be cut. Here the change is made at one length, a block boundary, whatever the steps: tokens before it are
computed on, and kept as, full-precision rows, and quantized when the sequence grows past it. Restored or read anew, a
sequence is in the same state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.models.cache import KVCache, QuantizedKVCache

from omlx_core.state.handlers import JoinedRowsHandler, leaves_of, rebuild
from omlx_core.state.protocols import Arrays, FetchRows

# What `mx.quantize` returns for each of keys and values, in its order.
_QUANTIZED_PARTS = ("packed", "scales", "biases")


@dataclass(frozen=True, slots=True)
class KVQuantization:
    """How keys and values are quantized, by `mx.quantize`.

    Attributes:
        bits: bits per element.
        group_size: elements of a head that share a scale and a bias.
        start_tokens: length of a sequence from which on it is quantized; a block boundary.
    """

    bits: int
    group_size: int
    start_tokens: int

    def apply(self, prompt_cache: list[Any]) -> None:
        """Quantize the full-attention layers of a prompt cache in place, if it is long enough and they are not yet.

        To be called before each step. Windows are left as they are: they don't grow with the sequence.
        """
        leaves = leaves_of(prompt_cache)
        due = {path: leaf for path, leaf in leaves.items() if self.is_due(leaf)}
        if due:
            quantized = {path: leaf.to_quantized(self.group_size, self.bits) for path, leaf in due.items()}
            prompt_cache[:] = rebuild(prompt_cache, {**leaves, **quantized})

    def is_due(self, leaf: Any) -> bool:
        """Whether a leaf is to be quantized before it takes more tokens."""
        return type(leaf) is KVCache and leaf.offset >= self.start_tokens


class QuantizedHandler(JoinedRowsHandler):
    """Full attention whose keys and values are quantized once the sequence is long enough.

    The rows of a block are named ``keys`` and ``values`` before that length, and after it ``keys_packed`` (32-bit
    words), ``keys_scales``, ``keys_biases`` and likewise for the values, each ``[1, kv_heads, tokens, …]``.
    """

    def __init__(self, quantization: KVQuantization) -> None:
        self._quantization = quantization

    def describe(self, leaf: Any) -> str:
        """The family and the quantization."""
        del leaf
        how = self._quantization
        return f"quantized(bits={how.bits}, group_size={how.group_size}, start={how.start_tokens})"

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        """Copies of the rows ``[start, stop)``; None for full-precision rows that have been quantized since."""
        if type(leaf) is KVCache:
            return super().rows(leaf, start, stop)
        if start < self._quantization.start_tokens:
            return None
        return {
            f"{member}_{part}": mx.contiguous(array[..., start:stop, :])
            for member in ("keys", "values")
            for part, array in zip(_QUANTIZED_PARTS, getattr(leaf, member), strict=True)
        }

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        """A `KVCache` up to the length of the change, a `QuantizedKVCache` past it."""
        how = self._quantization
        if num_tokens <= how.start_tokens:
            return super().restore(leaf, fetch, num_tokens, capacity)
        restored = QuantizedKVCache(group_size=how.group_size, bits=how.bits)
        pieces = fetch(0, num_tokens)
        room = -(-max(capacity, num_tokens + 1) // restored.step) * restored.step - num_tokens
        for member in ("keys", "values"):
            quantized = [self._quantized(piece, member) for piece in pieces]
            arrays = []
            for rows in zip(*quantized, strict=True):
                shape = list(rows[0].shape)
                shape[2] = room
                arrays.append(mx.concatenate([*rows, mx.zeros(shape, rows[0].dtype)], axis=2))
            setattr(restored, member, tuple(arrays))
        restored.offset = num_tokens
        return restored

    def _quantized(self, piece: Arrays, member: str) -> list[mx.array]:
        """One piece's rows. Each row is quantized by itself, so a piece gives what the whole would have given."""
        if member in piece:
            how = self._quantization
            return list(mx.quantize(piece[member], group_size=how.group_size, bits=how.bits))
        return [piece[f"{member}_{part}"] for part in _QUANTIZED_PARTS]
