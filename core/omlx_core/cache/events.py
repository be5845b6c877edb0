"""What happens in the cache, told to whoever wants to know: counts and sizes, never tokens or text.

Events are delivered in order on a thread of their own, so that a slow listener delays nobody's answer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

EventKind = Literal["hit", "miss", "store", "evict", "spill", "restore", "corrupt"]
Tier = Literal["hot", "cold"]


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """One thing that happened to blocks of one model.

    Attributes:
        kind: ``"hit"``: a request matched blocks in that tier; ``"miss"``: full blocks of its prompt were in
            neither, and are computed; ``"store"``: kept in RAM; ``"spill"``: written to SSD; ``"restore"``: read
            from SSD and kept in RAM again; ``"evict"``: removed from that tier to make room; ``"corrupt"``: found
            damaged, missing or unreadable on SSD.
        tier: where.
        num_blocks: how many blocks.
        size_bytes: bytes of their content; of their files, in the cold tier.
        namespace: the model's namespace, in hexadecimal digits.
    """

    kind: EventKind
    tier: Tier
    num_blocks: int
    size_bytes: int
    namespace: str


Listener = Callable[[CacheEvent], None]


class EventBus:
    """Passes events on to listeners. Costs a look at an empty tuple while there are none.

    Args:
        namespace: set in every event.
    """

    def __init__(self, namespace: bytes = b"") -> None:
        self._namespace = namespace.hex()
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[CacheEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have a listener called with every event from now on.

        Returns:
            A function that ends the subscription.
        """
        with self._lock:
            self._listeners = (*self._listeners, listener)
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="omlx-events", daemon=True)
                self._thread.start()

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return unsubscribe

    def publish(self, kind: EventKind, tier: Tier, *, num_blocks: int, size_bytes: int) -> None:
        """Tell the listeners, later and elsewhere; any thread, never blocks."""
        if self._listeners and num_blocks:
            self._events.put(CacheEvent(kind, tier, num_blocks, size_bytes, self._namespace))

    def close(self) -> None:
        """Deliver what was published, and stop. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._events.put(None)
            if thread is not threading.current_thread():
                thread.join()

    def _deliver(self) -> None:
        while (event := self._events.get()) is not None:
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    logger.exception("a listener to cache events failed")
