"""LangChain's standard suite on the real model: everything in it that a text model can be asked is switched on."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from omlx_core import CacheSettings
from omlx_core.engine.shared import close_shared_engines, default_pool
from omlx_plugins.langchain import ChatOMLX

OTHER_NAME = "the-same-model-by-another-name"
CACHE = CacheSettings(block_size=16)
END_TOKEN_ID = 2


@pytest.fixture(scope="module", autouse=True)
def other_name(sample_model):
    default_pool().add(OTHER_NAME, sample_model, cache=CACHE)
    yield
    close_shared_engines()


class TestChatOMLX(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _use_sample_model(self, sample_model):
        type(self).sample_model = sample_model

    sample_model = ""

    @property
    def chat_model_class(self) -> type[ChatOMLX]:
        return ChatOMLX

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # A model of this size says the same over and over, and goes on calling, if nothing keeps it from that.
        return {
            "model": self.sample_model,
            "kv_cache": CACHE,
            "max_tokens": 160,
            "repetition_penalty": 1.2,
            "logit_bias": {END_TOKEN_ID: 6.0},
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return OTHER_NAME

    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], list[Any]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        llm = ChatOMLX(**{**self.chat_model_params, "max_tokens": 4})
        messages = [SystemMessage("These are the rules of the house. " * 8), HumanMessage("Which?")]
        llm.warm(messages)
        if stream:
            first, *rest = llm.stream(messages)
            answer: AIMessageChunk = sum(rest, first)
        else:
            answer = llm.invoke(messages)
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    @pytest.mark.xfail(reason="a model of 135M parameters seldom calls a tool that it needn't call", strict=False)
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: ChatOMLX) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="a model of 135M parameters doesn't copy Chinese from its prompt", strict=False)
    def test_unicode_tool_call_integration(self, model: ChatOMLX) -> None:
        super().test_unicode_tool_call_integration(model)

    @pytest.mark.xfail(reason="a model of 135M parameters never ends a text that may be of any length", strict=False)
    def test_structured_output_optional_param(self, model: ChatOMLX) -> None:
        super().test_structured_output_optional_param(model)
