"""Lets threads that work in the background give way to those that compute."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_NICENESS = 10


def yield_to_others() -> None:
    """Have the calling thread take only what processor time others leave, where a thread has a priority of its own.

    That is Linux. Elsewhere `os.setpriority` is about the whole process, and nothing is done.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
