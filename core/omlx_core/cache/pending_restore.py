"""A prefix between its match and its restore, while some of it is read from SSD."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.parts import PartKey, PrefixContent
from omlx_core.cache.payload import BlockPayload

Content = BlockPayload | Future[BlockPayload | None]


class PendingRestore:
    """The content of a matched prefix, some of which may still be on its way from the SSD tier.

    Attributes:
        table: the matched blocks, up to the last one at which every layer can be restored.
        num_matched_blocks: how many blocks of the prompt a tier has; those behind the table's lack a part.
    """

    def __init__(
        self, table: BlockTable, num_matched_blocks: int, rows: list[Content], parts: dict[PartKey, Content]
    ) -> None:
        self.table = table
        self.num_matched_blocks = num_matched_blocks
        self._rows = rows
        self._parts = parts
        self._cold = {position for position, content in enumerate(rows) if isinstance(content, Future)}
        self._cold |= {key.position for key, content in parts.items() if isinstance(content, Future)}

    @property
    def num_hot_blocks(self) -> int:
        """How many of the table's blocks were in RAM, with all that is needed of them, when they were matched."""
        return len(self.table.blocks) - len(self._cold & set(range(len(self.table.blocks))))

    @property
    def is_hot(self) -> bool:
        """Whether all of it was in RAM when it was matched."""
        return not self._cold

    def replaces(self, earlier: PendingRestore) -> None:
        """Count as read from SSD what an earlier match of the same prompt has read."""
        self._cold |= earlier._cold

    def is_ready(self) -> bool:
        """Whether `TieredCache.finish_restore` would return without waiting."""
        return all(future.done() for future in self._futures())

    def notify(self, callback: Callable[[], None]) -> None:
        """Call back, from an I/O thread, whenever a read has finished."""
        for future in self._futures():
            future.add_done_callback(lambda _: callback())

    def content(self) -> PrefixContent:
        """What could be read: the rows up to the first block that could not, and parts. Waits for reads that run."""
        rows = list(itertools.takewhile(lambda payload: payload is not None, map(_wait, self._rows)))
        parts = {key: _wait(content) for key, content in self._parts.items()}
        return PrefixContent(
            [payload for payload in rows if payload is not None],
            {key: payload for key, payload in parts.items() if payload is not None},
        )

    def _futures(self) -> list[Future[BlockPayload | None]]:
        return [content for content in (*self._rows, *self._parts.values()) if isinstance(content, Future)]


def _wait(content: Content) -> BlockPayload | None:
    return content.result() if isinstance(content, Future) else content


def lost() -> Content:
    """Content that can't be had."""
    future: Future[BlockPayload | None] = Future()
    future.set_result(None)
    return future
