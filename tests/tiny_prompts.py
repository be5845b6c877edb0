"""Prompts of random tokens for the models of `tiny_models`, and blocks that such prompts fill several of."""

from __future__ import annotations

import random

from tiny_models import VOCAB_SIZE

BLOCK_SIZE = 16


def tokens(count: int, seed: int = 1) -> list[int]:
    """Random token ids; the longer of two lists of one seed begins with the shorter."""
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)
