"""Pinned prefixes: sequences whose blocks are held, so that the hot tier doesn't evict them.

Together they take no more than a share of the hot tier. What isn't pinned never pushes out what is; of the pinned
prefixes, the one that was pinned or asked for least recently makes room for the next.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.parts import PartKey

Needs = Callable[[int], Iterable[PartKey]]
"""The parts, besides rows, that a restore of so many blocks needs."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that stays in RAM.

    Attributes:
        num_tokens: its tokens, in whole blocks.
        size_bytes: what they take, together with what it shares with other pinned ones.
    """

    num_tokens: int
    size_bytes: int


class PinnedPrefixes:
    """Holds the blocks of prefixes. Thread-safe.

    Args:
        paged: the hot tier.
        max_bytes: most bytes that all of them may take; None is no limit.
    """

    def __init__(self, paged: PagedCacheManager, max_bytes: int | None) -> None:
        self._paged = paged
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tables: list[BlockTable] = []  # least recently used first

    def pin(self, table: BlockTable, num_tokens: int, needs: Needs = lambda _: ()) -> int:
        """Hold the beginning of a sequence, as far as it is in RAM and fits by itself.

        A pinned prefix that it goes on from is replaced by it.

        Args:
            table: the sequence; it keeps its own references.
            num_tokens: how much of it.
            needs: the parts, besides rows, that a restore of that many blocks needs. Those that the table lacks are
                passed over.

        Returns:
            How many tokens of it are pinned now.
        """
        num_blocks = min(num_tokens // self._paged.block_size, table.num_committed)
        in_ram = itertools.takewhile(lambda block: block.payload is not None, table.blocks[:num_blocks])
        num_blocks = sum(1 for _ in in_ram)
        with self._lock:
            pinned = self._hold(table, num_blocks, needs)
            if not pinned.blocks:
                return 0
            known = next((known for known in self._tables if _goes_on_from(known, pinned)), None)
            if known is not None:
                self._tables.remove(known)
                self._tables.append(known)
                released = [pinned]
            else:
                released = [known for known in self._tables if _goes_on_from(pinned, known)]
                self._tables = [known for known in self._tables if known not in released]
                while self._tables and self._exceeds([*self._tables, pinned]):
                    released.append(self._tables.pop(0))
                self._tables.append(pinned)
        num_pinned = pinned.num_tokens
        for unpinned in released:
            self._paged.free_block_table(unpinned)
        return num_pinned

    def unpin(self, token_ids: Sequence[int] | None = None, extra_keys: tuple[str, ...] = ()) -> int:
        """Let go of the prefixes that a sequence begins with; they stay cached until they are evicted.

        Args:
            token_ids: the sequence; None stands for all.
            extra_keys: those that they were stored under.

        Returns:
            How many there were.
        """
        with self._lock:
            released = [
                table
                for table in self._tables
                if token_ids is None
                or (table.extra_keys == extra_keys and table.token_ids == list(token_ids[: table.num_tokens]))
            ]
            self._tables = [table for table in self._tables if table not in released]
        for table in released:
            self._paged.free_block_table(table)
        return len(released)

    def prefixes(self) -> list[PinnedPrefix]:
        """The pinned prefixes, least recently used first."""
        with self._lock:
            return [PinnedPrefix(table.num_tokens, _size_bytes([table])) for table in self._tables]

    def _hold(self, table: BlockTable, num_blocks: int, needs: Needs) -> BlockTable:
        """As many blocks of a table as would fit if they were the only ones, with their parts."""
        while True:
            parts = [key for key in (needs(num_blocks) if num_blocks else ()) if key in table.parts]
            held = self._paged.hold_prefix(table, num_blocks, parts)
            if not num_blocks or not self._exceeds([held]):
                return held
            self._paged.free_block_table(held)
            num_blocks -= 1

    def _exceeds(self, tables: Sequence[BlockTable]) -> bool:
        return self._max_bytes is not None and _size_bytes(tables) > self._max_bytes


def _goes_on_from(table: BlockTable, beginning: BlockTable) -> bool:
    """Whether a prefix is another one, or more of it, with all the parts that are held of that."""
    return (
        table.extra_keys == beginning.extra_keys
        and table.tokens[: len(beginning.tokens)] == beginning.tokens
        and beginning.parts.keys() <= table.parts.keys()
    )


def _size_bytes(tables: Iterable[BlockTable]) -> int:
    """The bytes of some prefixes in RAM; what they share counts once."""
    blocks = {block.block_id: block for table in tables for block in (*table.blocks, *table.parts.values())}
    return sum(block.payload.size_bytes for block in blocks.values() if block.payload is not None)
