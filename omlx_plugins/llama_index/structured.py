"""Objects of a pydantic class as answers: what `OMLX.structured_predict` and its kin are made of."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, TextBlock
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.program.utils import FlexibleModel, create_flexible_model, get_program_for_llm
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import BasePydanticProgram, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from omlx_core.engine.constraints import JSONSchema
from omlx_core.errors import UnusableAnswerError
from omlx_plugins.base import BaseOMLX
from omlx_plugins.schemas import close_objects

Model = TypeVar("Model", bound=BaseModel)

_dispatcher = get_dispatcher(__name__)
# What callers say to a program that makes its object by a forced call.
_OF_FORCED_CALLS = frozenset({"tool_choice", "tool_required", "allow_parallel_tool_calls"})


class SchemaProgram(BasePydanticProgram[Model]):
    """Asks for an object of a class: the answer is made to be JSON of its schema.

    The schema is also shown to the model, since the descriptions of its fields say what they are for. It is part of the
    first message, where it is a prefix of all prompts for this class.

    Args:
        output_cls: the class.
        llm: the model that is asked.
        prompt: what it is asked.
    """

    def __init__(self, output_cls: type[Model], llm: SchemaPrediction, prompt: BasePromptTemplate) -> None:
        self._output_cls = output_cls
        self._llm = llm
        self._prompt = prompt
        self._schema = output_cls.model_json_schema()
        self._partial_cls = create_flexible_model(output_cls)

    @property
    def output_cls(self) -> type[Model]:
        """The class."""
        return self._output_cls

    def __call__(self, *_: Any, llm_kwargs: Mapping[str, Any] | None = None, **prompt_args: Any) -> Model:
        """The object for a prompt.

        Args:
            llm_kwargs: options of the request.
            **prompt_args: the prompt's variables.

        Raises:
            UnusableAnswerError: the answer was cut off.
            pydantic.ValidationError: the class asks for more than its schema says.
        """
        return self._whole(self._llm.chat(self._messages(prompt_args), **self._options(llm_kwargs)))

    async def acall(self, *_: Any, llm_kwargs: Mapping[str, Any] | None = None, **prompt_args: Any) -> Model:
        """As calling it."""
        await self._llm.aget_engine()  # a prompt may read the model's `metadata`, which must not load on the event loop
        return self._whole(await self._llm.achat(self._messages(prompt_args), **self._options(llm_kwargs)))

    def stream_call(
        self, *_: Any, llm_kwargs: Mapping[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Model | FlexibleModel, None, None]:
        """The object for a prompt, as far as it has come each time that it grows; the last is the whole one."""
        last = None
        with closing(self._llm.stream_chat(self._messages(prompt_args), **self._options(llm_kwargs))) as responses:
            for response in responses:
                grown = self._grown(response, last)
                if grown is not None:
                    yield grown
                    last = grown

    async def astream_call(
        self, *_: Any, llm_kwargs: Mapping[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """As `stream_call`."""
        await self._llm.aget_engine()  # as in `acall`
        stream = await self._llm.astream_chat(self._messages(prompt_args), **self._options(llm_kwargs))

        async def objects() -> AsyncGenerator[Model | FlexibleModel, None]:
            last = None
            async with aclosing(stream) as responses:
                async for response in responses:
                    grown = self._grown(response, last)
                    if grown is not None:
                        yield grown
                        last = grown

        return objects()

    def _messages(self, prompt_args: Mapping[str, Any]) -> list[ChatMessage]:
        """The prompt's messages; the first also has the schema, after a system message's text or before another's."""
        first, *others = self._llm._extend_messages(self._prompt.format_messages(llm=self._llm, **prompt_args))
        schema = TextBlock(text=f"Answer with a JSON object of this schema:\n{json.dumps(self._schema)}\n")
        is_system = first.role in ("system", "developer")
        blocks = [*first.blocks, schema] if is_system else [schema, *first.blocks]
        return [first.model_copy(update={"blocks": blocks}), *others]

    def _options(self, llm_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        given = {name: value for name, value in (llm_kwargs or {}).items() if name not in _OF_FORCED_CALLS}
        return {**given, "constraint": JSONSchema(close_objects(self._schema), strict=False)}

    def _whole(self, response: ChatResponse) -> Model:
        content = response.message.content or ""
        if response.raw["finish_reason"] == "length":  # type: ignore[index] # a whole answer has it
            raise UnusableAnswerError(
                f"the {self._output_cls.__name__} was cut off before it was complete, at {content[-60:]!r}: raise "
                "max_tokens, or bound the lengths in the class (max_length)"
            )
        return self._output_cls.model_validate_json(content)

    def _grown(self, response: ChatResponse, last: BaseModel | None) -> Model | FlexibleModel | None:
        """The object as far as it has come; None if that is no further than before."""
        grown = self._partial(response.message.content or "") if response.raw is None else self._whole(response)
        return None if grown == last else grown

    def _partial(self, content: str) -> Model | FlexibleModel | None:
        try:
            fields = from_json(content, allow_partial="trailing-strings")
        except ValueError:  # there is nothing yet
            return None
        try:
            return self._output_cls.model_validate(fields)
        except ValidationError:
            return self._partial_cls.model_validate(fields)


class SchemaPrediction(BaseOMLX, FunctionCallingLLM):
    """`structured_predict` and its kin through `SchemaProgram`, unless ``pydantic_program_mode`` asks for another."""

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """The object of a class for a prompt; see `SchemaProgram`. Needs the extra ``structured``.

        Args:
            output_cls: the class.
            prompt: the prompt.
            llm_kwargs: options of the request.
            **prompt_args: the prompt's variables.

        Raises:
            UnusableAnswerError: the answer was cut off.
            pydantic.ValidationError: the class asks for more than its schema says.
        """
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            by_other: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return by_other
        _dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        predicted = SchemaProgram(output_cls, self, prompt)(llm_kwargs=llm_kwargs, **prompt_args)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=predicted))
        return predicted

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As `structured_predict`."""
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            await self.aget_engine()  # the base class reads `metadata`, which must not load on the event loop
            by_other: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return by_other
        _dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        predicted = await SchemaProgram(output_cls, self, prompt).acall(llm_kwargs=llm_kwargs, **prompt_args)
        _dispatcher.event(LLMStructuredPredictEndEvent(output=predicted))
        return predicted

    # `stream_structured_predict` and `astream_structured_predict` begin with these.

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        program = self._streaming_program(output_cls, prompt)
        return program.stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        await self.aget_engine()  # as in `astructured_predict`
        program = self._streaming_program(output_cls, prompt)
        return await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _streaming_program(self, output_cls: type[Model], prompt: PromptTemplate) -> BasePydanticProgram[Model]:
        match self.pydantic_program_mode:
            case PydanticProgramMode.DEFAULT:
                return SchemaProgram(output_cls, self, prompt)
            case PydanticProgramMode.FUNCTION:  # which LlamaIndex doesn't force while it streams
                return FunctionCallingProgram(output_cls, self, prompt, tool_choice="required")
        return get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode)
