"""Stops an engine between two steps, so that a test decides what happens when."""

from __future__ import annotations

import threading


class MlxThreadGate:
    """Holds an engine's MLX thread between two steps."""

    def __init__(self, engine):
        self._entered, self._opened = threading.Event(), threading.Event()
        self._holder = threading.Thread(target=engine._scheduler.thread.call, args=(self._hold,))

    def _hold(self):
        self._entered.set()
        self._opened.wait(30)

    def __enter__(self):
        self._holder.start()
        assert self._entered.wait(30)

    def __exit__(self, *_):
        self._opened.set()
        self._holder.join()
