"""docs/architectures.md: what the tests found, as a table; written at the end of a run that tried everything."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from integration_tests.architectures.situations import (
    BLOCK_SIZE,
    FIRST_ANSWER_TOKENS,
    SHARED_TOKENS,
    TAIL_TOKENS,
    TRUNK_TOKENS,
)
from integration_tests.architectures.table import (
    ARCHITECTURES,
    CUT_DEPENDENT,
    CUT_TOLERANCE,
    NOT_TRIED,
    UNKNOWN_CACHE,
    UNLIKE_ALONE_IN_BATCH,
)

PROPERTY = "architectures"
"""The name under which a test records the rows of its architectures, which found nothing wrong."""


class Row(TypedDict):
    """What the page says of one architecture; no more than can be sent between processes.

    Attributes:
        caches: its prompt cache.
        parts: of a block; none if it runs uncached.
        is_batched: whether its requests are decoded together.
        reused: tokens, by situation.
    """

    caches: str
    parts: list[str]
    is_batched: bool
    reused: dict[str, int]


class PageWriter:
    """A pytest plugin that collects the rows of all tests, those of xdist's workers too, and writes the page.

    Args:
        path: where the page is. It is left alone unless there is a row for every architecture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the rows that a test has recorded."""
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    self._rows.update(value)

    def pytest_sessionfinish(self) -> None:
        """Write the page if it is complete."""
        if self._rows.keys() == ARCHITECTURES.keys():
            self._path.write_text(render(self._rows), encoding="utf-8")


def render(rows: Mapping[str, Row]) -> str:
    """The page, from a row for every architecture."""
    names = sorted(rows, key=str.lower)
    cached = [name for name in names if rows[name]["parts"]]
    uncached = [name for name in names if not rows[name]["parts"]]
    reasons = {**CUT_DEPENDENT, **UNKNOWN_CACHE}
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    return _PAGE.format(
        **{f"{name.replace('-', '_')}_version": version for name, version in versions.items()},
        num_tried=len(rows),
        num_all=len(rows) + len(NOT_TRIED),
        trunk=TRUNK_TOKENS,
        first_answer=FIRST_ANSWER_TOKENS,
        block_size=BLOCK_SIZE,
        cached=_table(
            ("architecture", "caches", "parts", "RAM", "new process from SSD", *SHARED_TOKENS, "decoding"),
            [(name, *_cells(name, rows[name])) for name in cached],
            num_left=5,
        ),
        uncached=_table(
            ("architecture", "caches", "decoding", "why"),
            [(name, rows[name]["caches"], _decoding(rows[name]), reasons[name]) for name in uncached],
        ),
        not_tried=_table(("architecture", "why"), _sorted(NOT_TRIED)),
        one_after_the_other=_table(("architecture", "why"), _sorted(UNLIKE_ALONE_IN_BATCH)),
        shared={_key(situation): count for situation, count in SHARED_TOKENS.items()},
        tail={_key(situation): count for situation, count in TAIL_TOKENS.items()},
    )


def _cells(name: str, row: Row) -> tuple[str, ...]:
    exactness = f"within {CUT_TOLERANCE[name]:.0e}".replace("e-0", "e-") if name in CUT_TOLERANCE else "bit-identical"
    reused = (str(row["reused"][situation]) for situation in SHARED_TOKENS)
    return row["caches"], ", ".join(row["parts"]), exactness, exactness, *reused, _decoding(row)


def _key(situation: str) -> str:
    """A name for ``str.format``."""
    return situation.replace(" ", "_")


def _sorted(reasons: Mapping[str, str]) -> list[tuple[str, ...]]:
    return sorted(reasons.items(), key=lambda item: item[0].lower())


def _decoding(row: Row) -> str:
    return "batched" if row["is_batched"] else "one after the other"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], num_left: int | None = None) -> str:
    """A table in Markdown; columns after the first ``num_left`` that hold numbers are set right."""
    rules = (
        "--:" if num_left is not None and num_left <= index < len(head) - 1 else "---" for index in range(len(head))
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, tuple(rules), *rows))


_PAGE = """\
# Architectures

`integration_tests/test_architectures.py` builds a tiny model, with random weights in float32, of {num_tried} of the
{num_all} architectures of mlx-lm, and compares answers that begin with a restored prefix with those of an engine that
has no cache. It runs on MLX's CPU backend with its reference BLAS, where equal work gives equal bits, and writes this
page if it finds nothing wrong.

Made with mlx {mlx_version} and mlx-lm {mlx_lm_version}. To make it anew: `make test`, or, for this page alone,

```sh
OMLX_OPENBLAS=0 .venv/bin/python -m pytest integration_tests/test_architectures.py
```

## What is asked

A prompt of {trunk} tokens is answered with {first_answer}, in blocks of {block_size}. Then the same engine is asked
what follows (**RAM**). Another engine stores that prompt and its answer on SSD and is closed, and a new process opens a
new engine for each question (**new process from SSD**).

| question | shares with the first prompt and its answer | goes on with |
|---|---|---|
| exact repeat | {shared[exact_repeat]} tokens, all of the prompt | nothing |
| next turn | {shared[next_turn]} tokens, the answer included | {tail[next_turn]} others |
| branch in a block | {shared[branch_in_a_block]} tokens | {tail[branch_in_a_block]} others |
| branch at a boundary | {shared[branch_at_a_boundary]} tokens | {tail[branch_at_a_boundary]} others |
| second branch there | {shared[second_branch_there]} tokens | {tail[second_branch_there]} yet others |

## What came of it

Token ids are equal everywhere. Log-probabilities are equal to the last bit (bit-identical) or, in architectures that
scan in chunks counted from where a piece of the prompt begins, within 1e-5: there mlx-lm itself rounds otherwise when a
prompt is cut elsewhere.

Below each question stand the prompt tokens that it reused, the same number from RAM and from SSD:

- At least one token of a prompt is always computed, and only whole blocks are reused.
- An answer is computed token by token. The next turn reuses its blocks only where reading them in a prompt gives the
  same bits.
- A recurrent state (a checkpoint) can be restored only where it was kept. The first prompt to branch off reuses nothing
  and keeps it there; the second reuses it.

The caches are those of the tiny model; others of the same architecture may have more kinds of layers, or fewer.
`RotatingKVCache(48)` is a window of 48 tokens, `ChunkedKVCache(48)` attention in chunks of 48, `ArraysCache(2)` a
recurrent state of two arrays, `CacheList` several caches in one layer. [state.md](state.md) says what the parts of a
block are.

{cached}

## Not cached

These answer the same questions, from the beginning each time, and the log says why.

{uncached}

## Decoded one after the other

Other requests are decoded together, in mlx-lm's batch. It answers these architectures otherwise than alone, or not at
all, when prompts differ in length.

{one_after_the_other}

## Not tried

{not_tried}
"""
