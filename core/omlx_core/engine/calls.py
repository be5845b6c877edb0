"""How callers wait for answers: as iterators, on threads and on event loops."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial

from omlx_core.engine.request import Emit, Request
from omlx_core.engine.results import GenerationChunk, GenerationResult
from omlx_core.engine.scheduler import Scheduler
from omlx_core.errors import CacheInvariantError

MakeRequest = Callable[[Emit], Request]
_Arrived = tuple[int, GenerationChunk | BaseException]


def run(scheduler: Scheduler, make_requests: Sequence[MakeRequest]) -> Generator[tuple[int, GenerationChunk]]:
    """Answer one prompt as many times as there are requests.

    Starts with the first chunk asked for. Closing the iterator cancels what isn't complete.

    Yields:
        Every chunk of every answer, with the answer's index.
    """
    arrived: queue.SimpleQueue[_Arrived] = queue.SimpleQueue()
    requests = _submit(scheduler, make_requests, arrived.put)
    num_running = len(requests)
    try:
        while num_running:
            index, chunk = _or_raise(arrived.get())
            num_running -= chunk.result is not None
            yield index, chunk
    finally:
        if num_running:
            _cancel(scheduler, requests)


async def arun(
    scheduler: Scheduler, make_requests: Sequence[MakeRequest]
) -> AsyncGenerator[tuple[int, GenerationChunk]]:
    """`run` on an event loop; cancelling the task cancels what isn't complete, too."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[_Arrived] = asyncio.Queue()

    def put(item: _Arrived) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits for this any more
            with contextlib.suppress(NameError):  # refused before there were requests
                _cancel(scheduler, requests)

    requests = _submit(scheduler, make_requests, put)
    num_running = len(requests)
    try:
        while num_running:
            index, chunk = _or_raise(await arrived.get())
            num_running -= chunk.result is not None
            yield index, chunk
    finally:
        if num_running:
            _cancel(scheduler, requests)


def results_of(arrived: Sequence[tuple[int, GenerationChunk]], num_results: int) -> list[GenerationResult]:
    """The results among chunks, in the order of their answers.

    Raises:
        CacheInvariantError: one is missing.
    """
    results = {index: chunk.result for index, chunk in arrived if chunk.result is not None}
    if len(results) != num_results:
        raise CacheInvariantError(f"of {num_results} answers {num_results - len(results)} have ended without a result")
    return [results[index] for index in range(num_results)]


def _submit(
    scheduler: Scheduler, make_requests: Sequence[MakeRequest], put: Callable[[_Arrived], None]
) -> list[Request]:
    """Put the first request in line, with the others as its further samples."""

    def emit(index: int, chunk: GenerationChunk | BaseException) -> None:
        put((index, chunk))

    requests = [make(partial(emit, index)) for index, make in enumerate(make_requests)]
    requests[0].samples = requests
    scheduler.submit(requests[0])
    return requests


def _cancel(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    for request in requests:
        request.cancel()
    scheduler.wake()


def _or_raise(arrived: _Arrived) -> tuple[int, GenerationChunk]:
    index, chunk = arrived
    if isinstance(chunk, BaseException):
        raise chunk
    return index, chunk
