"""LlamaIndex's LLM over the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen

from omlx_core.errors import InvalidToolError, UnusableAnswerError
from omlx_plugins.base import require_tokenizer
from omlx_plugins.llama_index.messages import convert_messages
from omlx_plugins.llama_index.responses import Answer, ChatAnswer, CompletionAnswer, R_co
from omlx_plugins.llama_index.structured import SchemaPrediction
from omlx_plugins.llama_index.tools import AnyTool, convert_options, convert_tools, tool_selections
from omlx_plugins.model_files import ModelDescription, describe_model

if TYPE_CHECKING:
    from omlx_core import Engine
    from omlx_core.engine.params import Prompt

MakeRequest = Callable[["Engine"], tuple["Prompt", dict[str, Any]]]
"""Makes a prompt and the engine's options of what was asked, once the engine is there."""


class OMLX(SchemaPrediction):
    """A local model with a paged two-tier KV cache.

    ::

        llm = OMLX(model="path or repo id", kv_cache=CacheSettings(paged_ssd_cache_dir="auto"))
        llm.complete("Why is the sky blue?").raw["usage"]["prompt_tokens_details"]  # {"cached_tokens": …}

    The options of a request (``max_tokens``, ``temperature``, ``stop``, ``cache_salt`` …) can be given here or passed
    to a call, which counts most; ``pin``, ``constraint``, ``tools``, ``tool_choice`` and the others of
    `GenerationParams` that are no fields can be passed.

    A model with a chat template gets chat messages: `complete` sends its prompt as a user message unless it is told
    that the prompt is ``formatted``. A model without one gets text: `chat` renders its messages with
    ``messages_to_prompt``, and `complete` passes its prompt through ``completion_to_prompt``, which changes nothing
    unless it is set.

    A message's blocks are what the model thinks, its text, and its calls. A response's ``raw`` has ``model``,
    ``finish_reason`` and ``usage`` as OpenAI does and, under ``"omlx"``, the tokens reused from RAM
    (``cached_tokens_hot``) and from the SSD (``cached_tokens_cold``), the seconds to the first token (``ttft_s``),
    ``tokens_per_s`` after it, and the ``divergence`` from what the cache has, if there is one. While streaming, it
    comes with the last response.

    Every prefix is cached. ``pin=True`` keeps a request's prompt in RAM besides, and a `CachePoint` block the prompt up
    to that block, until ``llm.get_engine().unpin()``.

    Closing a stream early cancels its request, as cancelling a task does.
    """

    @classmethod
    def class_name(cls) -> str:
        """The class's name in serialized components."""
        return "OMLX"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's context length and kind, as its files say or, where they don't, the loaded model.

        A model that isn't on this machine yet is fetched and loaded, which blocks: asynchronous code that names one
        first calls ``await llm.aget_engine()``.

        Every model with a chat template calls functions, those that weren't made for it in a generic format. What must
        be a call is made to be one.
        """
        facts = self.engine or self._described() or self.get_engine()
        return LLMMetadata(
            context_window=facts.context_length or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=facts.has_chat_template,
            is_function_calling_model=facts.has_chat_template,
            model_name=self.model,
        )

    def _described(self) -> ModelDescription | None:
        """What the model's files say, if that is all that `metadata` needs."""
        described = describe_model(self.model)
        is_enough = described is not None and described.has_chat_template and described.context_length is not None
        return described if is_enough else None

    def to_payload(self) -> dict[str, Any]:
        """What callbacks see of this model; without `metadata`, which may load the model on the event loop."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model,
            "adapter_path": self.adapter_path,
            **self.generation_options(),
        }

    # Chats and completions.

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return self._answer(self._chat_request(messages, kwargs), ChatAnswer)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return await self._aanswer(self._chat_request(messages, kwargs), ChatAnswer)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece."""
        return self._stream(self._chat_request(messages, kwargs), ChatAnswer)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation piece by piece."""
        return self._astream(self._chat_request(messages, kwargs), ChatAnswer)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, or continue it if it is formatted."""
        return self._answer(self._completion_request(prompt, formatted, kwargs), CompletionAnswer)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, or continue it if it is formatted."""
        return await self._aanswer(self._completion_request(prompt, formatted, kwargs), CompletionAnswer)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt, or continue it if it is formatted, piece by piece."""
        return self._stream(self._completion_request(prompt, formatted, kwargs), CompletionAnswer)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Answer a prompt, or continue it if it is formatted, piece by piece."""
        return self._astream(self._completion_request(prompt, formatted, kwargs), CompletionAnswer)

    # The base class's forms of these read `metadata`, which must not load on the event loop.

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Answer a prompt template."""
        await self.aget_engine()
        return await super().apredict(prompt, **prompt_args)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Answer a prompt template piece by piece."""
        await self.aget_engine()
        return await super().astream(prompt, **prompt_args)

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Call tools as the model asks for."""
        await self.aget_engine()
        return await super().apredict_and_call(*args, **kwargs)

    # Tools.

    def _prepare_chat_with_tools(  # noqa: PLR0917 - LlamaIndex's signature
        self,
        tools: Sequence[AnyTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,  # noqa: ARG002 - as above
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat` for a conversation with tools. The history isn't changed.

        Args:
            tools: LlamaIndex's, or dictionaries in OpenAI's form.
            user_msg: said after the history.
            chat_history: what was said before.
            verbose: of no effect.
            allow_parallel_tool_calls: False ends an answer with its first call.
            tool_required: the answer must be a call, unless `tool_choice` says which or none.
            tool_choice: None and ``"auto"`` leave it to the model, ``"none"`` forbids calls, ``"any"`` and
                ``"required"`` demand one or more; a tool's name, a dictionary with it, or True for the only tool that
                there is, demand one call of that. What is demanded is guaranteed, which needs the extra ``structured``.
            **kwargs: further options of the request.
        """
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        if tool_required and tool_choice in (None, "auto"):
            tool_choice = "required"
        return {
            "messages": messages,
            "tools": convert_tools(tools),
            "tool_choice": tool_choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self,
        response: ChatResponse,
        error_on_no_tool_call: bool = True,
        **kwargs: Any,  # noqa: ARG002 - LlamaIndex's signature
    ) -> list[ToolSelection]:
        """The calls in a response, be it whole or of a stream.

        Raises:
            UnusableAnswerError: there is none, and that is an error.
        """
        selections = tool_selections(response.message)
        if error_on_no_tool_call and not selections:
            raise UnusableAnswerError(
                f"the answer calls no tool; it is {response.message.content!r}: demand a call with tool_required=True "
                "or tool_choice, or pass error_on_no_tool_call=False"
            )
        return selections

    # Counting.

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of a text, without special tokens around it.

        ``Settings.tokenizer = llm.get_token_ids`` lets LlamaIndex count as the model does.
        """
        token_ids: list[int] = require_tokenizer(self.get_engine()).encode(text, add_special_tokens=False)
        return token_ids

    def count_tokens(self, messages: Sequence[ChatMessage], tools: Sequence[AnyTool] | None = None) -> int:
        """Tokens of the prompt that is made of the messages and tools, the chat template's included.

        Raises:
            InvalidPromptError, InvalidToolError: as a request with them.
        """
        engine = self.get_engine()
        prompt, options = self._chat_request(messages, {} if tools is None else {"tools": tools})(engine)
        return engine.count_tokens(prompt, **options)

    # Requests.

    def _chat_request(self, messages: Sequence[ChatMessage], keywords: Mapping[str, Any]) -> MakeRequest:
        conversation = convert_messages(messages)  # checks the blocks, whatever the model gets
        options = self.generation_options(convert_options(keywords))

        def make(engine: Engine) -> tuple[Prompt, dict[str, Any]]:
            if not engine.has_chat_template:
                return self.messages_to_prompt(messages), options  # type: ignore[misc] # the base class sets it
            if conversation.pinned:
                return conversation.messages, {"pin": conversation.pinned, **options}
            return conversation.messages, options

        return make

    def _completion_request(self, prompt: str, formatted: bool, keywords: Mapping[str, Any]) -> MakeRequest:
        options = self.generation_options(convert_options(keywords))
        if options.get("tools"):
            raise InvalidToolError("a completion has no room for calls: pass tools to chat, or to chat_with_tools")

        def make(engine: Engine) -> tuple[Prompt, dict[str, Any]]:
            if formatted:
                return prompt, options
            if engine.has_chat_template:
                return [{"role": "user", "content": prompt}], options
            return self.completion_to_prompt(prompt), options  # type: ignore[misc] # the base class sets it

        return make

    def _answer(self, make_request: MakeRequest, answer: type[Answer[R_co]]) -> R_co:
        with self.lease_engine() as engine:
            prompt, options = make_request(engine)
            return answer(engine, self.model).whole(engine.generate(prompt, **options))

    async def _aanswer(self, make_request: MakeRequest, answer: type[Answer[R_co]]) -> R_co:
        async with self.alease_engine() as engine:
            prompt, options = make_request(engine)
            return answer(engine, self.model).whole(await engine.agenerate(prompt, **options))

    def _stream(self, make_request: MakeRequest, answer: type[Answer[R_co]]) -> Generator[R_co, None, None]:
        with self.lease_engine() as engine:
            prompt, options = make_request(engine)
            growing = answer(engine, self.model)
            with closing(engine.stream(prompt, **options)) as chunks:
                for chunk in chunks:
                    response = growing.add(chunk)
                    if response is not None:
                        yield response

    async def _astream(self, make_request: MakeRequest, answer: type[Answer[R_co]]) -> AsyncGenerator[R_co, None]:
        async with self.alease_engine() as engine:
            prompt, options = make_request(engine)
            growing = answer(engine, self.model)
            async with aclosing(engine.astream(prompt, **options)) as chunks:
                async for chunk in chunks:
                    response = growing.add(chunk)
                    if response is not None:
                        yield response
