"""Adapters hold their model while it answers, so that no pool unloads it meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage

from omlx_core import ModelPool
from omlx_core.engine import shared
from omlx_core.testing import FakeEngine
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.llama_index import OMLX


class WatchedEngine(FakeEngine):
    """Notes how many hold a lease of it when a request begins, at each piece, and when it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.num_leases: list[int] = []

    def _note(self) -> None:
        engines = shared.default_pool()._engines
        with engines.changed:
            self.num_leases.append(engines._models.find("some/model").num_leases)

    def stream(self, prompt: Any, **options: Any) -> Any:
        self._note()
        chunks = super().stream(prompt, **options)

        def stream() -> Any:
            try:
                for chunk in chunks:
                    self._note()
                    yield chunk
            finally:
                chunks.close()
                self._note()

        return stream()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> WatchedEngine:
    engine = WatchedEngine()
    monkeypatch.setattr(shared, "_pool", ModelPool(load_engine=lambda spec, _: engine))
    return engine


FORMS = [
    *((ChatOMLX, form, "Hi") for form in ("invoke", "stream", "ainvoke", "astream")),
    *((OMLX, form, "Hi") for form in ("complete", "stream_complete", "acomplete", "astream_complete")),
    *((OMLX, form, [ChatMessage("Hi")]) for form in ("chat", "stream_chat", "achat", "astream_chat")),
]


@pytest.mark.parametrize(("adapter", "form", "prompt"), FORMS, ids=[form for _, form, _ in FORMS])
async def test_the_model_stays_loaded_from_the_beginning_of_a_request_to_its_end(engine, adapter, form, prompt):
    given = getattr(adapter(model="some/model"), form)(prompt)
    if hasattr(given, "__await__"):
        given = await given
    if hasattr(given, "__anext__"):
        _ = [piece async for piece in given]
    elif hasattr(given, "__next__"):
        _ = list(given)
    assert engine.num_leases
    assert set(engine.num_leases) == {1}
    assert shared.default_pool().unload("some/model", timeout_s=0)


@pytest.mark.parametrize("adapter", [ChatOMLX, OMLX])
def test_a_stream_that_is_closed_early_gives_the_model_back(engine, adapter):
    llm = adapter(model="some/model")
    stream = llm.stream("Hi") if adapter is ChatOMLX else llm.stream_complete("Hi")
    next(stream)
    assert not shared.default_pool().unload("some/model", timeout_s=0)
    stream.close()
    assert shared.default_pool().unload("some/model", timeout_s=0)
