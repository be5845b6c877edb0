"""A few threads that write files side by side, so that one's wait for the disk isn't added to the next one's.

A file system gathers what is synced at the same moment: on ext4, sixteen files of 4 MiB synced by four threads took as
long as one file of 64 MiB, and twice as long one after the other.

No `concurrent.futures` pool: the interpreter's end waits for its threads, so a hanging disk would keep it from ending,
and refuses it new work before the last blocks have been written.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence


class FileThreads:
    """Runs actions side by side. One thread may call it at a time, which takes part in the work.

    The other threads start with the first work for more than one. Where none can be started, as at the end of the
    interpreter, the caller does all of it.

    Args:
        num_threads: how many, the caller among them.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, actions: Sequence[Callable[[], object]]) -> list[Exception | None]:
        """Run all actions and wait for them; in which order they run is not said.

        Returns:
            What each of them raised.
        """
        jobs = [_Job(action) for action in actions]
        self._start(len(jobs) - 1)
        for job in jobs:
            self._jobs.put(job)
        with contextlib.suppress(queue.Empty):
            while (job_in_hand := self._jobs.get_nowait()) is not None:
                job_in_hand.run()
        return [job.result() for job in jobs]

    def close(self) -> None:
        """End the threads. Called again, does nothing."""
        for _ in self._threads:
            self._jobs.put(None)
        self._threads = []

    def _start(self, num_wanted: int) -> None:
        while len(self._threads) < min(num_wanted, self._num_threads - 1):
            thread = threading.Thread(target=self._work, name="omlx-ssd-file", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return
            self._threads.append(thread)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # or what it wrote would stay in memory until the next one comes


class _Job:
    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._error: Exception | None = None
        self._is_done = threading.Event()

    def run(self) -> None:
        try:
            self._action()
        except Exception as exc:  # whatever it is, it is this job's and the caller's to judge
            self._error = exc
        finally:
            self._is_done.set()

    def result(self) -> Exception | None:
        self._is_done.wait()
        return self._error
