"""Why did I miss? Where a prompt leaves the stored sequence that it shares most with.

A changed timestamp, a tool's reordered keys, a trimmed history: the report shows the first tokens that differ. What
this engine has stored itself is remembered whole; what is on disk from before is found by its blocks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omlx_core.cache.neighbour import Neighbour, num_shared_tokens
from omlx_core.engine.results import Divergence

_MAX_SEQUENCES = 64
_MAX_TOKENS = 4_000_000
_WINDOW_TOKENS = 8  # how much of either sequence a report shows


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

    def find_neighbour(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> Neighbour | None:
        """The sequence that a prompt shares most with, the newest of several; None if it shares nothing with any.

        Args:
            token_ids: the prompt.
            extra_keys: what else it must share with that sequence.
        """
        prompt = np.asarray(token_ids, np.uint32)
        with self._lock:
            candidates = [known.token_ids for known in reversed(self._sequences) if known.extra_keys == extra_keys]
        shared = [num_shared_tokens(prompt, known) for known in candidates]
        position = max(shared, default=0)
        return Neighbour(position, candidates[shared.index(position)][position:]) if position else None


def find_divergence(
    token_ids: Sequence[int],
    recent: Neighbour | None,
    find_stored: Callable[[], Neighbour | None],
    decode: Callable[[list[int]], str] | None = None,
) -> Divergence | None:
    """Where a prompt leaves the sequence that it shares most with.

    Args:
        token_ids: the prompt.
        recent: the nearest of those that are remembered.
        find_stored: finds the nearest on disk; asked only if it may tell more.
        decode: makes text of tokens, if the report is to have it.

    Returns:
        None if the prompt continues that sequence, or is its beginning, or shares nothing with any.
    """
    nearest = recent
    if recent is None or (recent.position < len(token_ids) and len(recent.next_ids)):
        stored = find_stored()
        if stored is not None and (recent is None or stored.position > recent.position):
            nearest = stored
    if nearest is None or not nearest.position:
        return None
    here = list(token_ids[nearest.position : nearest.position + _WINDOW_TOKENS])
    there = nearest.next_ids[:_WINDOW_TOKENS].tolist()
    if not here or not there:
        return None
    texts = (None, None) if decode is None else (decode(here), decode(there))
    return Divergence(nearest.position, tuple(here), tuple(there), *texts)


def _continues(sequence: _Sequence, known: _Sequence) -> bool:
    length = len(known.token_ids)
    return (
        known.extra_keys == sequence.extra_keys
        and length <= len(sequence.token_ids)
        and num_shared_tokens(sequence.token_ids, known.token_ids) == length
    )
