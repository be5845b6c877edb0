"""How many requests an engine has, and how many more it takes."""

from __future__ import annotations

import threading

from omlx_core.errors import EngineBusyError, EngineClosedError


class Occupancy:
    """Counts the requests of an engine; for any thread.

    Args:
        max_waiting: most that may wait in line.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._is_closed = False
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._num_active = 0

    @property
    def num_active(self) -> int:
        """Requests that are not answered yet, in line or not."""
        return self._num_active

    @property
    def num_waiting(self) -> int:
        """Of these, those in line: not decoding yet."""
        return self._num_waiting

    def enter(self, num_requests: int) -> None:
        """Count requests as active, and as in line.

        Raises:
            EngineBusyError: too many wait already; nothing has changed.
            EngineClosedError: no more are taken.
        """
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine is being closed: make a new one")
            if self._num_waiting + num_requests > self._max_waiting:
                raise EngineBusyError(
                    f"{self._num_waiting} requests wait in line, and no more than max_waiting_requests="
                    f"{self._max_waiting} may: ask again later, or raise that setting"
                )
            self._num_waiting += num_requests
            self._num_active += num_requests

    def leave_line(self, num_requests: int) -> None:
        """They are being answered."""
        with self._changed:
            self._num_waiting -= num_requests

    def leave(self, num_requests: int = 1) -> None:
        """They have been answered."""
        with self._changed:
            self._num_active -= num_requests
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more, and wait until the last has been answered."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._num_active)
