"""The suite for function-calling LLMs on the real model."""

from __future__ import annotations

from typing import Any

import pytest

from integration_tests.llama_index_conformance import FunctionCallingLLMConformance
from omlx_core import CacheSettings
from omlx_core.engine.shared import close_shared_engines
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.llama_index import OMLX

CACHE = CacheSettings(block_size=16)


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    yield
    close_shared_engines()


class TestOMLX(FunctionCallingLLMConformance):
    @pytest.fixture(autouse=True)
    def _use_sample_model(self, sample_model):
        self.sample_model = sample_model

    def make_llm(self, **options: Any) -> OMLX:
        return OMLX(model=self.sample_model, kv_cache=CACHE, **options)

    def make_thinking_llm(self) -> OMLX:
        # The sample model doesn't think: this is what the engine gives of one that does.
        return OMLX(engine=FakeEngine([FakeAnswer(["Par", "is."], reasoning="A country's seat of government …")]))

    def num_active_requests(self, llm: OMLX) -> int:
        return llm.get_engine().num_active_requests
