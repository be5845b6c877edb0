"""What LlamaIndex leaves behind, put away before another test is warned of it."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def llama_index_leaves_nothing() -> Iterator[None]:
    """Gives a test an event loop that is closed after it, and collects what else is left open.

    Where LlamaIndex runs a coroutine of its own, it does so on the thread's current loop. Python makes one if there is
    none, and nobody closes that: the warning comes whenever it is replaced and collected, in whatever test that is.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
