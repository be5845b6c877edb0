"""What the cold tier counts, and says once."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

from omlx_core.cache.events import EventBus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SSDCacheStats:
    """What the cold tier holds, and what this process did with it.

    Attributes:
        num_blocks: published blocks in the folder, over all namespaces.
        size_bytes: bytes in the folder that count towards the budget, files being written included.
        checkpoint_bytes: those of checkpoints among them, which count towards their share too.
        bytes_written_last_day: bytes of files written to the folder in the last 24 hours, by all processes.
        bytes_written_ever: bytes of files written to the folder so far, by all processes.
        bytes_written: bytes of block files published by this process.
        bytes_read: bytes of payload returned to callers.
        blocks_written: block files published by this process.
        blocks_read: blocks returned to callers.
        evictions: blocks evicted by this process.
        corrupt_blocks: published blocks found damaged, missing or unreadable.
        write_errors: blocks not published because of the disk or the index.
        refused_by_write_budget: blocks not written because the day's write budget was used up.
        refused_by_free_space: blocks not written because too little space was free on the volume.
        queued_blocks: blocks waiting to be written.
        queued_bytes: bytes of their payloads.
    """

    num_blocks: int = 0
    size_bytes: int = 0
    checkpoint_bytes: int = 0
    bytes_written_last_day: int = 0
    bytes_written_ever: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    blocks_written: int = 0
    blocks_read: int = 0
    evictions: int = 0
    corrupt_blocks: int = 0
    write_errors: int = 0
    refused_by_write_budget: int = 0
    refused_by_free_space: int = 0
    queued_blocks: int = 0
    queued_bytes: int = 0


class StatsKeeper:
    """Counts, tells of what others may want to hear, and warns of each kind of trouble once. Any thread.

    Args:
        events: where to tell of blocks written, evicted and found corrupt.
    """

    def __init__(self, events: EventBus | None = None) -> None:
        self._events = EventBus() if events is None else events
        self._lock = threading.Lock()
        self._stats = SSDCacheStats()
        self._warned: set[str] = set()

    @property
    def current(self) -> SSDCacheStats:
        """The counters at this moment."""
        return self._stats

    def count(self, **changes: int) -> None:
        """Add to the counters of those names."""
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + change for name, change in changes.items()}
            )

    def count_written(self, num_blocks: int, size_bytes: int) -> None:
        """Count block files published."""
        self.count(blocks_written=num_blocks, bytes_written=size_bytes)
        self._events.publish("spill", "cold", num_blocks=num_blocks, size_bytes=size_bytes)

    def count_evicted(self, num_blocks: int, size_bytes: int) -> None:
        """Count blocks evicted, with the bytes of their files."""
        self.count(evictions=num_blocks)
        self._events.publish("evict", "cold", num_blocks=num_blocks, size_bytes=size_bytes)

    def count_corrupt(self) -> None:
        """Count a published block found damaged, missing or unreadable."""
        self.count(corrupt_blocks=1)
        self._events.publish("corrupt", "cold", num_blocks=1, size_bytes=0)

    def warn(self, kind: str, message: str, *args: object) -> None:
        """Log a warning the first time, and for those who look for details from then on."""
        with self._lock:
            is_first = kind not in self._warned
            self._warned.add(kind)
        logger.log(logging.WARNING if is_first else logging.DEBUG, message, *args)
