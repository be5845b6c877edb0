"""Brings to RAM what was read from SSD straight into a request's own memory, behind the requests' backs.

The request that restores a prefix waits for nothing but its rows. Copies of them for the requests to come are made here
afterwards, block by block, from the files again: they are in the page cache now, and no array of a running model needs
to be kept from changing meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.ssd_cache import PagedSSDCacheManager

logger = logging.getLogger(__name__)


class Promoter:
    """One thread, at work while there is something to bring to RAM.

    Args:
        paged: the hot tier.
        ssd: the SSD tier.
    """

    def __init__(self, paged: PagedCacheManager, ssd: PagedSSDCacheManager) -> None:
        self._paged = paged
        self._ssd = ssd
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omlx-promote")
        self._lock = threading.Lock()
        self._has_finished = threading.Condition(self._lock)
        self._num_tables = 0
        self._is_closing = False

    def submit(self, table: BlockTable, positions: Sequence[int], size_bytes: int) -> None:
        """Bring blocks of a table to RAM, in order, as far as there is room. Returns at once.

        Args:
            table: holds them; a fork of it does until it is done.
            positions: which of its blocks.
            size_bytes: payload bytes of each.
        """
        with self._lock:
            self._num_tables += 1
        self._thread.submit(self._promote, self._paged.fork_block_table(table), positions, size_bytes)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was submitted is in RAM, or found to have no room there.

        Returns:
            False if the time was too short.
        """
        with self._lock:
            return self._has_finished.wait_for(lambda: self._num_tables == 0, timeout_s)

    def close(self) -> None:
        """Stop before the next block. Idempotent; nothing may be submitted any more."""
        self._is_closing = True
        self._thread.shutdown()

    def _promote(self, table: BlockTable, positions: Sequence[int], size_bytes: int) -> None:
        try:
            for position in positions:
                block = table.blocks[position]
                if self._is_closing or block.block_hash is None:
                    return
                if not self._paged.wants(block, size_bytes):
                    continue
                payload = self._ssd.load_block(block.block_hash, table.tokens[position])
                if payload is not None:
                    self._paged.promote(block, payload)
        except Exception:  # the request that had them restored has them; the next one reads them again
            logger.exception("blocks could not be brought to RAM")
        finally:
            self._paged.free_block_table(table)
            with self._lock:
                self._num_tables -= 1
                self._has_finished.notify_all()
