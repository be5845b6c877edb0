"""A tiny model of every architecture of mlx-lm."""

from __future__ import annotations

from integration_tests.architectures.build import build_tiny
from integration_tests.architectures.measure import describe, leaves
from integration_tests.architectures.table import (
    ARCHITECTURES,
    CUT_DEPENDENT,
    CUT_TOLERANCE,
    FAMILIES,
    NOT_TRIED,
    UNKNOWN_CACHE,
    UNLIKE_ALONE_IN_BATCH,
)

__all__ = [
    "ARCHITECTURES",
    "CUT_DEPENDENT",
    "CUT_TOLERANCE",
    "FAMILIES",
    "NOT_TRIED",
    "UNKNOWN_CACHE",
    "UNLIKE_ALONE_IN_BATCH",
    "build_tiny",
    "describe",
    "leaves",
]
