"""Why did I miss? Where a prompt leaves the recent sequence that it shares most with.

A changed timestamp, a tool's reordered keys, a trimmed history: the report shows the first tokens that differ.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omlx_core.engine.results import Divergence

_MAX_SEQUENCES = 64
_MAX_TOKENS = 4_000_000
_WINDOW_TOKENS = 8  # how much of either sequence a report shows
_CHUNK_TOKENS = 4096  # two sequences that differ early are told apart early


@dataclass(frozen=True, slots=True)
class _Sequence:
    extra_keys: tuple[str, ...]
    token_ids: npt.NDArray[np.uint32]


class RecentSequences:
    """The token ids of what was stored last; thread-safe.

    Args:
        max_sequences: most that are kept.
        max_tokens: most tokens of all of them; 4 bytes each.
    """

    def __init__(self, max_sequences: int = _MAX_SEQUENCES, max_tokens: int = _MAX_TOKENS) -> None:
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._sequences: deque[_Sequence] = deque()
        self._num_tokens = 0

    def add(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> None:
        """Keep a sequence; what it continues is forgotten for it, and the oldest for want of room."""
        sequence = _Sequence(extra_keys, np.asarray(token_ids, np.uint32))
        with self._lock:
            kept = [known for known in self._sequences if not _continues(sequence, known)]
            self._sequences = deque([*kept, sequence])
            self._num_tokens = sum(len(known.token_ids) for known in self._sequences)
            while len(self._sequences) > self._max_sequences or self._num_tokens > self._max_tokens:
                self._num_tokens -= len(self._sequences.popleft().token_ids)

    def find_divergence(
        self,
        token_ids: Sequence[int],
        extra_keys: tuple[str, ...] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> Divergence | None:
        """Where a prompt leaves the sequence that it shares most with, the newest of several.

        Args:
            token_ids: the prompt.
            extra_keys: what else it must share with that sequence.
            decode: makes text of tokens, if the report is to have it.

        Returns:
            None if it continues that sequence, or is its beginning, or shares nothing with any.
        """
        prompt = np.asarray(token_ids, np.uint32)
        with self._lock:
            candidates = [known.token_ids for known in reversed(self._sequences) if known.extra_keys == extra_keys]
        shared = [_num_shared(prompt, known) for known in candidates]
        position = max(shared, default=0)
        if not position:
            return None
        nearest = candidates[shared.index(position)]
        if position in (len(prompt), len(nearest)):
            return None
        here, there = (each[position : position + _WINDOW_TOKENS].tolist() for each in (prompt, nearest))
        texts = (None, None) if decode is None else (decode(here), decode(there))
        return Divergence(position, tuple(here), tuple(there), *texts)


def _continues(sequence: _Sequence, known: _Sequence) -> bool:
    length = len(known.token_ids)
    return (
        known.extra_keys == sequence.extra_keys
        and length <= len(sequence.token_ids)
        and _num_shared(sequence.token_ids, known.token_ids) == length
    )


def _num_shared(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> int:
    """How many tokens two sequences both begin with."""
    length = min(len(a), len(b))
    for start in range(0, length, _CHUNK_TOKENS):
        chunk = slice(start, min(start + _CHUNK_TOKENS, length))
        differs = a[chunk] != b[chunk]
        if differs.any():
            return start + int(differs.argmax())
    return length
