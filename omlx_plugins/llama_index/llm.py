"""LlamaIndex's LLM over the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing, closing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    LogProb,
    MessageRole,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen

from omlx_core import GenerationResult
from omlx_plugins.base import BaseOMLX, reuse_metadata, token_texts
from omlx_plugins.llama_index.messages import to_engine_messages

if TYPE_CHECKING:
    from omlx_core import Engine
    from omlx_core.engine.params import Prompt

R_co = TypeVar("R_co", covariant=True)


class OMLX(BaseOMLX, LLM):
    """A local model with a paged two-tier KV cache.

    ::

        llm = OMLX(model="path or repo id", kv_cache=CacheSettings(paged_ssd_cache_dir="auto"))
        llm.complete("Why is the sky blue?").raw["usage"]["prompt_tokens_details"]  # {"cached_tokens": …}

    The options of a request (``max_tokens``, ``temperature``, ``stop``, ``cache_salt`` …) can be given here or passed
    to a call, which counts most.

    A model with a chat template gets chat messages: `complete` sends its prompt as a user message unless it is told
    that the prompt is ``formatted``. A model without one gets text: `chat` renders its messages with
    ``messages_to_prompt``, and `complete` passes its prompt through ``completion_to_prompt``, which changes nothing
    unless it is set.

    A response's ``raw`` has ``model``, ``finish_reason`` and ``usage`` as OpenAI does and, under ``"omlx"``, the
    tokens reused from RAM (``cached_tokens_hot``) and from the SSD (``cached_tokens_cold``) and the seconds to the
    first token (``ttft_s``). While streaming, it comes with the last response. Closing a stream early cancels its
    request.
    """

    @classmethod
    def class_name(cls) -> str:
        """The class's name in serialized components."""
        return "OMLX"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's context length and kind; loads the model on first use, which blocks.

        Asynchronous code that wants it first calls ``await llm.aget_engine()``.
        """
        engine = self.get_engine()
        return LLMMetadata(
            context_window=engine.context_length or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=engine.has_chat_template,
            is_function_calling_model=False,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What callbacks see of this model; without `metadata`, which would load the model on the event loop."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model,
            "adapter_path": self.adapter_path,
            **self.generation_options(),
        }

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        options = self.generation_options(kwargs)
        with self.lease_engine() as engine:
            result = engine.generate(self._chat_prompt(engine, messages), **options)
            return self._chat_response(engine, result.text, result)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        options = self.generation_options(kwargs)
        async with self.alease_engine() as engine:
            result = await engine.agenerate(self._chat_prompt(engine, messages), **options)
            return self._chat_response(engine, result.text, result)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece."""
        options = self.generation_options(kwargs)
        prompt = self._chat_prompt(self.get_engine(), messages)
        return _stream(self.lease_engine(), prompt, options, self._chat_response)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation piece by piece."""
        options = self.generation_options(kwargs)
        prompt = self._chat_prompt(await self.aget_engine(), messages)
        return _astream(self.alease_engine(), prompt, options, self._chat_response)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, or continue it if it is formatted."""
        options = self.generation_options(kwargs)
        with self.lease_engine() as engine:
            result = engine.generate(self._completion_prompt(engine, prompt, formatted), **options)
            return self._completion_response(engine, result.text, result)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, or continue it if it is formatted."""
        options = self.generation_options(kwargs)
        async with self.alease_engine() as engine:
            result = await engine.agenerate(self._completion_prompt(engine, prompt, formatted), **options)
            return self._completion_response(engine, result.text, result)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt, or continue it if it is formatted, piece by piece."""
        options = self.generation_options(kwargs)
        engine_prompt = self._completion_prompt(self.get_engine(), prompt, formatted)
        return _stream(self.lease_engine(), engine_prompt, options, self._completion_response)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Answer a prompt, or continue it if it is formatted, piece by piece."""
        options = self.generation_options(kwargs)
        engine_prompt = self._completion_prompt(await self.aget_engine(), prompt, formatted)
        return _astream(self.alease_engine(), engine_prompt, options, self._completion_response)

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Answer a prompt template."""
        await self.aget_engine()  # the base class reads `metadata`, which must not load on the event loop
        return await super().apredict(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Answer a prompt template piece by piece."""
        await self.aget_engine()  # as in `apredict`
        return await super().astream(prompt, **prompt_args)

    def _chat_prompt(self, engine: Engine, messages: Sequence[ChatMessage]) -> Prompt:
        converted = to_engine_messages(messages)  # checks the blocks in both cases
        if engine.has_chat_template:
            return converted
        return (self.messages_to_prompt or generic_messages_to_prompt)(messages)

    def _completion_prompt(self, engine: Engine, prompt: str, formatted: bool) -> Prompt:
        if formatted:
            return prompt
        if engine.has_chat_template:
            return [{"role": "user", "content": prompt}]
        return prompt if self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _chat_response(
        self, engine: Engine, text: str, result: GenerationResult | None, delta: str | None = None
    ) -> ChatResponse:
        message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
        return ChatResponse(message=message, delta=delta, **self._details(engine, result))

    def _completion_response(
        self, engine: Engine, text: str, result: GenerationResult | None, delta: str | None = None
    ) -> CompletionResponse:
        return CompletionResponse(text=text, delta=delta, **self._details(engine, result))

    def _details(self, engine: Engine, result: GenerationResult | None) -> dict[str, Any]:
        """What a response says beside its text, once the answer is whole."""
        if result is None:
            return {}
        usage = result.usage
        raw = {
            "model": self.model,
            "finish_reason": result.finish_reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            },
            "omlx": reuse_metadata(result),
        }
        return {"raw": raw, "logprobs": _logprobs(engine, result)}


class _Respond(Protocol[R_co]):
    def __call__(self, engine: Engine, text: str, result: GenerationResult | None, delta: str | None) -> R_co: ...


def _stream(
    lease: AbstractContextManager[Engine], prompt: Prompt, options: dict[str, Any], respond: _Respond[R_co]
) -> Generator[R_co, None, None]:
    """A response, with the text so far, for each chunk that adds text and for the last one."""
    text = ""
    with lease as engine, closing(engine.stream(prompt, **options)) as chunks:
        for chunk in chunks:
            text += chunk.text
            if chunk.text or chunk.result is not None:
                yield respond(engine, text, chunk.result, chunk.text)


async def _astream(
    lease: AbstractAsyncContextManager[Engine], prompt: Prompt, options: dict[str, Any], respond: _Respond[R_co]
) -> AsyncGenerator[R_co, None]:
    """As `_stream`."""
    text = ""
    async with lease as engine, aclosing(engine.astream(prompt, **options)) as chunks:
        async for chunk in chunks:
            text += chunk.text
            if chunk.text or chunk.result is not None:
                yield respond(engine, text, chunk.result, chunk.text)


def _logprobs(engine: Engine, result: GenerationResult) -> list[list[LogProb]] | None:
    """One list for each generated token, of the chosen token alone."""
    if result.logprobs is None:
        return None
    tokens = token_texts(engine, result.token_ids)
    return [[LogProb(token=token, logprob=logprob)] for token, logprob in zip(tokens, result.logprobs, strict=True)]
