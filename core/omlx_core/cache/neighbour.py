"""The stored sequence that a prompt shares most with: what a miss is to be explained by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK_TOKENS = 4096  # two sequences that differ early are told apart early


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Where a prompt and a stored sequence part.

    Attributes:
        position: how many tokens both begin with.
        next_ids: how the stored one goes on from there, as far as it is known; of type uint32. Empty where it ends.
    """

    position: int
    next_ids: npt.NDArray[np.uint32]


def nearest_of(
    token_ids: Sequence[int], position: int, followers: Sequence[npt.NDArray[np.uint32]]
) -> Neighbour | None:
    """Which of several goes on most like a prompt; of equals, the first.

    Args:
        token_ids: the prompt.
        position: how many tokens all share with it already.
        followers: how each goes on from there.

    Returns:
        None if nothing is shared.
    """
    rest = np.asarray(token_ids[position : position + max(map(len, followers), default=0)], np.uint32)
    shared = [num_shared_tokens(rest, follower) for follower in followers]
    num_shared = max(shared, default=0)
    if not position + num_shared:
        return None
    next_ids = followers[shared.index(num_shared)][num_shared:] if followers else np.empty(0, np.uint32)
    return Neighbour(position + num_shared, next_ids)


def num_shared_tokens(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> int:
    """How many tokens two sequences both begin with."""
    length = min(len(a), len(b))
    for start in range(0, length, _CHUNK_TOKENS):
        chunk = slice(start, min(start + _CHUNK_TOKENS, length))
        differs = a[chunk] != b[chunk]
        if differs.any():
            return start + int(differs.argmax())
    return length
