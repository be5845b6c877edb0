"""LangChain's chat model over the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable

from omlx_core import Usage
from omlx_core.errors import InvalidPromptError
from omlx_plugins.langchain.generations import ChunkMaker, make_chat_result
from omlx_plugins.langchain.language_model import LangChainOMLX
from omlx_plugins.langchain.messages import convert_messages
from omlx_plugins.langchain.options import convert_options
from omlx_plugins.langchain.profile import make_profile
from omlx_plugins.langchain.response_format import Schema
from omlx_plugins.langchain.structured import Method, bind_structured_output
from omlx_plugins.langchain.tools import AnyTool, convert_tools, tool_names
from omlx_plugins.langchain.warm import WarmInput, conversations_of
from omlx_plugins.tool_choice import convert_tool_choice

if TYPE_CHECKING:
    from omlx_core.cache.pins import PinnedPrefix

EngineMessages = list[dict[str, Any]]


class ChatOMLX(LangChainOMLX, BaseChatModel):
    """A local chat model with a paged two-tier KV cache.

    ::

        llm = ChatOMLX(model="path or repo id", kv_cache=CacheSettings(paged_ssd_cache_dir="auto"))
        llm.invoke("Why is the sky blue?").usage_metadata["input_token_details"]  # {"cache_read": …}

    The options of a request (``max_tokens``, ``temperature``, ``stop``, ``cache_salt`` …) can be given here, bound
    with ``llm.bind(max_tokens=16)``, or passed to a call, which counts most; ``pin``, ``template_args`` and the others
    of `GenerationParams` that are no fields can be bound and passed; ``model`` asks another model. ``kv_cache`` is not
    LangChain's own ``cache``, the field for answers to identical requests.

    Every prefix is cached. ``pin=True`` keeps a request's prompt in RAM besides, and ``cache_control`` on a content
    block the prompt up to that block, until `unpin`. `warm` computes prompts ahead of their questions.

    An answer's ``response_metadata`` has ``finish_reason``, ``model_name``, ``model_provider``; under ``"omlx"``
    the tokens reused from RAM (``cached_tokens_hot``) and from the SSD (``cached_tokens_cold``), the seconds to the
    first token (``ttft_s``), ``tokens_per_s`` after it, and the ``divergence`` from what the cache has, if there is
    one; and, if asked for, ``logprobs`` in OpenAI's shape with one entry for each generated token, an end-of-sequence
    token included. Reasoning is in ``additional_kwargs["reasoning_content"]``. While streaming, usage and metadata come
    with the last chunk.

    Closing a stream early cancels its request, as cancelling a task does.
    """

    streaming: bool = False
    """Let `invoke` stream internally, which LangChain's callbacks of single tokens need."""

    _ignored_keywords: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries", "timeout"})

    @property
    def _llm_type(self) -> str:
        return "omlx"

    def _resolve_model_profile(self) -> ModelProfile:
        return make_profile(self.model, self.engine, self.max_tokens)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self._traced_stop(stop), **kwargs)
        params["ls_provider"] = self._llm_type
        return params

    # What the model can be bound to.

    def bind_tools(
        self,
        tools: Sequence[AnyTool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools.

        Args:
            tools: LangChain's, pydantic classes, functions, typed dictionaries, or dictionaries in the form of OpenAI,
                Anthropic or JSON schema.
            tool_choice: None and ``"auto"`` leave it to the model, ``"none"`` forbids calls; ``"any"`` and
                ``"required"`` demand one or more; a tool's name, a dictionary with it, or True for the only tool that
                there is, demand one call of that. What is demanded is guaranteed, which needs the extra
                ``structured``.
            strict: enforce all of each tool's schema, and refuse one that can't be.
            parallel_tool_calls: False ends an answer with its first call.
            **kwargs: further options to bind.

        Raises:
            InvalidToolError: one of them is no tool, or the choice none of them.
        """
        bound: dict[str, Any] = {"tools": convert_tools(tools, strict=strict)}
        if tool_choice is not None:
            bound["tool_choice"] = convert_tool_choice(tool_choice, tool_names(bound["tools"]))
        if parallel_tool_calls is not None:
            bound["parallel_tool_calls"] = parallel_tool_calls
        return super().bind(**bound, **kwargs)

    def with_structured_output(
        self,
        schema: Schema | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with answers that are objects of a schema. Needs the extra ``structured``.

        Args:
            schema: a pydantic class, whose objects are returned; or a typed dictionary, a JSON schema or a function in
                OpenAI's form, for which dictionaries are.
            method: ``"json_schema"`` makes the answer JSON of the schema, and tells the model nothing of it, so that
                the prompt is the same as without. ``"function_calling"`` shows it to the model as a tool, and makes the
                answer a call. ``"json_mode"`` needs no schema: the answer is then any JSON object.
            include_raw: return ``{"raw": message, "parsed": object, "parsing_error": exception}``, and raise none.
            strict: refuse a schema of which something can't be enforced; otherwise that part is ignored.
            **kwargs: further options to bind.

        Raises:
            InvalidParameterError: a method that there isn't, or one that needs a schema without one.
            InvalidConstraintError, InvalidToolError: the schema is none.
        """
        return bind_structured_output(
            self, schema, method=method, include_raw=include_raw, strict=strict, options=kwargs
        )

    # The cache.

    def warm(
        self,
        inputs: WarmInput,
        *,
        prompt: BasePromptTemplate[PromptValue] | None = None,
        tools: Sequence[AnyTool] | None = None,
        pin: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> list[Usage]:
        """Compute the beginnings of conversations and keep them in the cache, without an answer.

        Args:
            inputs: a conversation in any form that `invoke` takes, a list of such, or documents.
            prompt: for documents: makes the conversation of one, as its variable ``context``; other variables stay
                empty. Without it, a document is a system message.
            tools: those that will be bound, which are part of the prompt.
            pin: keep them in RAM until `unpin`.
            progress: draw a bar on standard error.
            **options: those of the requests to come, as far as they change the prompt, such as ``cache_salt``.

        Returns:
            For each of them, how many tokens there were, and how many of them were cached already.

        Raises:
            InvalidRequestError: an input or an option can't be served.
            EngineError: a request failed; its cause is attached.
        """
        llm, chats, given = self._warm_requests(
            inputs, prompt, {**options, "tools": tools, "pin": pin, "progress": progress}
        )
        with llm.lease_engine() as engine:
            return [engine.prefill(chat, **given) for chat in chats]

    async def awarm(
        self,
        inputs: WarmInput,
        *,
        prompt: BasePromptTemplate[PromptValue] | None = None,
        tools: Sequence[AnyTool] | None = None,
        pin: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> list[Usage]:
        """As `warm`; cancelling the task cancels it."""
        llm, chats, given = self._warm_requests(
            inputs, prompt, {**options, "tools": tools, "pin": pin, "progress": progress}
        )
        async with llm.alease_engine() as engine:
            return [await engine.aprefill(chat, **given) for chat in chats]

    def pins(self) -> list[PinnedPrefix]:
        """What is pinned in the model's cache, by whomever; loads the model on first use."""
        with self.lease_engine() as engine:
            return engine.pins()

    def unpin(self, input: LanguageModelInput | None = None, **options: Any) -> int:
        """Let what is pinned be evicted again; it stays cached until it is.

        Args:
            input: unpin what this conversation begins with; None unpins all that is pinned in the model's cache.
            **options: those that it was pinned with, as far as they change the prompt, such as ``tools``.

        Returns:
            How many prefixes it was.
        """
        llm, given = self._for_call(options)
        messages = None if input is None else convert_messages(self._convert_input(input).to_messages()).messages
        with llm.lease_engine() as engine:
            return engine.unpin(messages, **given)

    def _warm_requests(
        self, inputs: WarmInput, prompt: BasePromptTemplate[PromptValue] | None, options: Mapping[str, Any]
    ) -> tuple[ChatOMLX, list[EngineMessages], dict[str, Any]]:
        llm, given = self._for_call(options)
        chats = [convert_messages(messages).messages for messages in conversations_of(inputs, prompt)]
        return llm, chats, given

    # Counting.

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[AnyTool] | None = None) -> int:
        """Tokens of the prompt that the chat template makes of the messages and tools.

        Messages that the template doesn't take for a conversation, such as a history's tail, are counted one by one
        as LangChain does for models without a template.
        """
        try:
            return self.get_engine().count_tokens(
                convert_messages(messages).messages,
                tools=None if tools is None else convert_tools(tools),
                tool_format=self.tool_format,
                template_args=self.template_args,
            )
        except InvalidPromptError:
            return super().get_num_tokens_from_messages(messages)

    # Requests.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        llm, chat, options = self._request(messages, stop, kwargs)
        with llm.lease_engine() as engine:
            return make_chat_result(engine, llm.model, engine.generate(chat, **options))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> ChatResult:
        llm, chat, options = self._request(messages, stop, kwargs)
        async with llm.alease_engine() as engine:
            return make_chat_result(engine, llm.model, await engine.agenerate(chat, **options))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        llm, chat, options = self._request(messages, stop, kwargs)
        with llm.lease_engine() as engine, closing(engine.stream(chat, **options)) as chunks:
            maker = ChunkMaker(engine, llm.model, as_blocks=llm.output_version == "v1")
            for chunk in chunks:
                for generation in maker.make(chunk):
                    if run_manager is not None:
                        run_manager.on_llm_new_token(generation.text, chunk=generation)
                    yield generation

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        llm, chat, options = self._request(messages, stop, kwargs)
        async with llm.alease_engine() as engine, aclosing(engine.astream(chat, **options)) as chunks:
            maker = ChunkMaker(engine, llm.model, as_blocks=llm.output_version == "v1")
            async for chunk in chunks:
                for generation in maker.make(chunk):
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(generation.text, chunk=generation)
                    yield generation

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, keywords: Mapping[str, Any]
    ) -> tuple[ChatOMLX, EngineMessages, dict[str, Any]]:
        """Which model is asked, what, and how."""
        conversation = convert_messages(messages)
        given = dict(keywords) if stop is None else {**keywords, "stop": stop}
        if conversation.pinned:
            given.setdefault("pin", conversation.pinned)
        llm, options = self._for_call(given)
        return llm, conversation.messages, options

    def _for_call(self, keywords: Mapping[str, Any]) -> tuple[ChatOMLX, dict[str, Any]]:
        """The model that is asked, and the engine's options."""
        llm, given = self._with_model_of(keywords)
        return llm, llm.generation_options(convert_options(given))
