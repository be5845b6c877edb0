"""The one thread of an engine that touches MLX: it runs what it is sent, and its worker's steps in between.

It starts with the first message. An exception ends a message or a step, not the thread. Should something end it all
the same, whoever waits for an answer is told, and the next message starts another.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from omlx_core.mlx_backend import mx

from omlx_core.errors import EngineClosedError, EngineError, EngineForkedError, OMLXError

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Worker(Protocol):
    """What the thread does between messages."""

    def step(self) -> float | None:
        """Do a little.

        Returns:
            Seconds until the next step is worth while, unless a message comes first; None: not before one comes.
        """
        ...

    def fail(self, error: OMLXError) -> None:
        """Give up everything under way, with an error that its callers get."""
        ...

    def close(self) -> None:
        """The last call: let go of what belongs to the thread."""
        ...


class MLXThread:
    """Runs one worker. Its methods are for any thread.

    Args:
        name: for the thread and the log.
        worker: called on the thread only.
    """

    def __init__(self, name: str, worker: Worker) -> None:
        self._name = name
        self._worker = worker
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def send(self, message: Callable[[], None]) -> None:
        """Have something run on the thread, soon and in order; it must not raise.

        Raises:
            EngineClosedError: `close` was called.
            EngineForkedError: this is not the process that the thread belongs to.
        """
        self._check_process()
        with self._lock:
            if self._is_closed:
                raise EngineClosedError(f"the engine of {self._name} is closed: make a new one")
            self._inbox.put(message)
            if self._thread is None:
                self._start()

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Run a function on the thread, and return or raise what it does.

        Raises:
            EngineClosedError, EngineForkedError: as `send`.
        """
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

        self.send(run)
        return future.result()

    def wake(self) -> None:
        """Have the worker step soon, even if it said that there is nothing to do."""
        self._inbox.put(_nothing)

    def close(self) -> None:
        """Fail what is under way, stop the thread and wait for it. Idempotent; does nothing in a forked process."""
        if os.getpid() != self._process_id:
            return
        with self._lock:
            thread = self._thread
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._process_id:
            raise EngineForkedError(
                f"the engine of {self._name} was made in process {self._process_id} and is used in process "
                f"{os.getpid()}: threads and device memory don't survive a fork; make the engine after it, or start "
                "processes with the method 'spawn'"
            )

    def _start(self) -> None:
        """Start a thread; the lock is held."""
        self._thread = threading.Thread(target=self._run, name=f"omlx-mlx-{self._name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as exc:  # not an Exception: those end a step only
            logger.critical("the MLX thread of %s has died", self._name, exc_info=True)
            error = EngineError(f"the MLX thread of {self._name} has died ({type(exc).__name__}: {exc}): ask again")
            error.__cause__ = exc
            self._worker.fail(error)
            with self._lock:
                self._thread = None
                if not self._inbox.empty() and not self._is_closed:
                    self._start()
        finally:
            # MLX aborts the process now and then if a thread ends with streams of its own (ml-explore/mlx#4110).
            mx.clear_streams()

    def _serve(self) -> None:
        wait_s: float | None = 0.0
        while self._take_messages(wait_s):
            try:
                wait_s = self._worker.step()
            except Exception as exc:
                logger.exception("a step of the engine failed")
                self._worker.fail(as_engine_error(exc))
                wait_s = 0.0
        self._worker.fail(EngineClosedError("the engine was closed while the request ran"))
        self._worker.close()

    def _take_messages(self, wait_s: float | None) -> bool:
        """Run what has arrived, waiting for the first if there is nothing else to do; False when it is time to go."""
        block = wait_s is None or wait_s > 0
        while True:
            try:
                message = self._inbox.get(block=block, timeout=wait_s if block else None)
            except queue.Empty:
                return True
            block = False
            if message is None:
                return False
            message()
            del message  # it holds a request, and this frame may wait for long


def _nothing() -> None:
    pass


def as_engine_error(exc: Exception) -> OMLXError:
    """An error of this project's tree as it is, any other wrapped."""
    if isinstance(exc, OMLXError):
        return exc
    error = EngineError(f"the request failed inside the engine: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error
