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
# A model of this size ends neither an answer nor a text within JSON by itself: these tokens are made likelier.
END_TOKEN_ID = 2
QUOTES = ('"', '",', '."', '!"', '?"', '"}')


class DemandingChatOMLX(ChatOMLX):
    """Demands a call of its tools, which a model of this size doesn't make by itself."""

    def bind_tools(self, tools, **options):
        return super().bind_tools(tools, tool_choice="any", parallel_tool_calls=False, **options)


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
        tokenizer = default_pool().get(OTHER_NAME).tokenizer
        quotes = {tokenizer.encode(quote, add_special_tokens=False)[0]: 3.0 for quote in QUOTES}
        return {
            "model": self.sample_model,
            "kv_cache": CACHE,
            "max_tokens": 160,
            "logit_bias": {END_TOKEN_ID: 6.0, **quotes},
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

    @pytest.mark.xfail(
        reason="SmolLM2-135M was trained on no tools, and answers in prose where no call is demanded", strict=False
    )
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: ChatOMLX) -> None:
        super().test_agent_loop(model)

    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop_whose_calls_are_demanded(self, model: ChatOMLX) -> None:
        super().test_agent_loop(DemandingChatOMLX(**dict(model)))
