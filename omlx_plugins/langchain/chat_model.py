"""LangChain's chat model over the engine."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from omlx_core import GenerationResult, Usage
from omlx_core.errors import InvalidPromptError
from omlx_plugins.base import BaseOMLX, require_tokenizer, reuse_metadata, token_texts
from omlx_plugins.langchain.messages import to_engine_messages

if TYPE_CHECKING:
    from omlx_core import Engine


class ChatOMLX(BaseOMLX, BaseChatModel):
    """A local chat model with a paged two-tier KV cache.

    ::

        llm = ChatOMLX(model="path or repo id", kv_cache=CacheSettings(paged_ssd_cache_dir="auto"))
        llm.invoke("Why is the sky blue?").usage_metadata["input_token_details"]  # {"cache_read": …}

    The options of a request (``max_tokens``, ``temperature``, ``stop``, ``cache_salt`` …) can be given here, bound
    with ``llm.bind(max_tokens=16)``, or passed to a call, which counts most. ``kv_cache`` is not LangChain's own
    ``cache``, the field for answers to identical requests.

    An answer's ``response_metadata`` has ``finish_reason``, ``model_name``, ``model_provider``; under ``"omlx"``
    the tokens reused from RAM (``cached_tokens_hot``) and from the SSD (``cached_tokens_cold``) and the seconds to
    the first token (``ttft_s``); and, if asked for, ``logprobs`` in OpenAI's shape with one entry for each generated
    token, an end-of-sequence token included. While streaming, these and the usage come with the last chunk.

    Closing a stream early cancels its request.
    """

    streaming: bool = False
    """Let `invoke` stream internally, which LangChain's callbacks of single tokens need."""

    _ignored_keywords: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries", "timeout"})

    @property
    def _llm_type(self) -> str:
        return "omlx"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": self.model, "adapter_path": self.adapter_path, **self.generation_options()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        own_stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        params = super()._get_ls_params(stop=stop or own_stop, **kwargs)
        params["ls_provider"] = "omlx"
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of a text, without special tokens around it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        token_ids: list[int] = require_tokenizer(self.get_engine()).encode(text, add_special_tokens=False)
        return token_ids

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the prompt that the chat template makes of the messages.

        Messages that the template doesn't take for a conversation, such as a history's tail, are counted one by one
        as LangChain does for models without a template.
        """
        if tools is not None:
            warnings.warn("tools are not counted", stacklevel=2)
        try:
            return self.get_engine().count_tokens(to_engine_messages(messages))
        except InvalidPromptError:
            return super().get_num_tokens_from_messages(messages)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        options = self._call_options(stop, kwargs)
        prompt = to_engine_messages(messages)
        with self.lease_engine() as engine:
            return self._chat_result(engine, engine.generate(prompt, **options))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        options = self._call_options(stop, kwargs)
        prompt = to_engine_messages(messages)
        async with self.alease_engine() as engine:
            return self._chat_result(engine, await engine.agenerate(prompt, **options))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self._call_options(stop, kwargs)
        prompt = to_engine_messages(messages)
        with self.lease_engine() as engine, closing(engine.stream(prompt, **options)) as chunks:
            for chunk in chunks:
                if not chunk.text and chunk.result is None:
                    continue  # part of a character, or of what may become a stop text
                generation = self._generation_chunk(engine, chunk.text, chunk.result)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=generation)
                yield generation

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self._call_options(stop, kwargs)
        prompt = to_engine_messages(messages)
        async with self.alease_engine() as engine, aclosing(engine.astream(prompt, **options)) as chunks:
            async for chunk in chunks:
                if not chunk.text and chunk.result is None:
                    continue  # as in `_stream`
                generation = self._generation_chunk(engine, chunk.text, chunk.result)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=generation)
                yield generation

    def _call_options(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        # LangChain passes its own switch for streaming on to the model.
        given = {name: value for name, value in overrides.items() if name != "stream"}
        return self.generation_options(given if stop is None else {**given, "stop": stop})

    def _chat_result(self, engine: Engine, result: GenerationResult) -> ChatResult:
        message = AIMessage(
            content=result.text,
            usage_metadata=_usage_metadata(result.usage),
            response_metadata=self._response_metadata(engine, result),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _generation_chunk(self, engine: Engine, text: str, result: GenerationResult | None) -> ChatGenerationChunk:
        if result is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=text))
        return ChatGenerationChunk(
            message=AIMessageChunk(
                content=text,
                chunk_position="last",
                usage_metadata=_usage_metadata(result.usage),
                response_metadata=self._response_metadata(engine, result),
            )
        )

    def _response_metadata(self, engine: Engine, result: GenerationResult) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "model_name": self.model,
            "model_provider": "omlx",
            "finish_reason": result.finish_reason,
            "omlx": reuse_metadata(result),
        }
        if result.logprobs is not None:
            tokens = token_texts(engine, result.token_ids)
            metadata["logprobs"] = {
                "content": [
                    {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}
                    for token, logprob in zip(tokens, result.logprobs, strict=True)
                ]
            }
        return metadata


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
