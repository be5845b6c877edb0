"""A prefix between its match and its restore, while some of it is read from SSD."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.parts import PartKey, PrefixContent
from omlx_core.cache.payload import BlockBuffers, LoadedBlock, Place

Content = LoadedBlock | Future[LoadedBlock | None]


class PendingRestore:
    """The content of a matched prefix, some of which may still be on its way from the SSD tier.

    Attributes:
        table: the matched blocks, up to the last one at which every layer can be restored.
        num_matched_blocks: how many blocks of the prompt a tier has; those behind the table's lack a part.
        rows: the rows of each block, or the read that gets them.
        parts: the parts that a restore needs, or the reads.
        buffers: where what is read goes; None if each block has memory of its own.
    """

    def __init__(
        self,
        table: BlockTable,
        num_matched_blocks: int,
        rows: Sequence[Content],
        parts: Mapping[PartKey, Content],
        buffers: BlockBuffers | None = None,
    ) -> None:
        self.table = table
        self.num_matched_blocks = num_matched_blocks
        self.rows = rows
        self.parts = parts
        self.buffers = buffers

    @property
    def num_hot_blocks(self) -> int:
        """How many of the table's blocks were in RAM, with all that is needed of them, when they were matched."""
        cold = {position for position, content in enumerate(self.rows) if isinstance(content, Future)}
        cold |= {key.position for key, content in self.parts.items() if isinstance(content, Future)}
        return len(self.table.blocks) - len(cold & set(range(len(self.table.blocks))))

    def read_of(self, place: Place) -> Future[LoadedBlock | None] | None:
        """The read that gets the block of a place, done or not; None if there is none."""
        content: Content | None = None
        if isinstance(place, PartKey):
            content = self.parts.get(place)
        elif isinstance(place, int) and place < len(self.rows):
            content = self.rows[place]
        return content if isinstance(content, Future) else None

    def is_ready(self) -> bool:
        """Whether `TieredCache.finish_restore` would return without waiting."""
        return all(future.done() for future in self._futures())

    def notify(self, callback: Callable[[], None]) -> None:
        """Call back, from an I/O thread, whenever a read has finished."""
        for future in self._futures():
            future.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Give up what has not begun to be read. What is being read ends by itself, in memory that it keeps alive."""
        for future in self._futures():
            future.cancel()

    def content(self) -> PrefixContent:
        """What could be read: the rows up to the first block that could not, and parts.

        Waits for all reads: none may write to the buffers any more once they are in use.
        """
        loaded: list[LoadedBlock | None] = [
            content.result() if isinstance(content, Future) else content for content in self.rows
        ]
        rows = [rows for rows in itertools.takewhile(lambda rows: rows is not None, loaded) if rows is not None]
        parts = {
            key: content.result() if isinstance(content, Future) else content for key, content in self.parts.items()
        }
        return PrefixContent(rows, {key: part for key, part in parts.items() if part is not None}, self.buffers)

    def _futures(self) -> list[Future[Any]]:
        return [content for content in (*self.rows, *self.parts.values()) if isinstance(content, Future)]


def lost() -> Future[Any]:
    """Content that can't be had."""
    future: Future[Any] = Future()
    future.set_result(None)
    return future


def is_lost(content: Content) -> bool:
    """Whether content is known not to be had; not that which is still being read."""
    return isinstance(content, Future) and content.done() and (content.cancelled() or content.result() is None)
