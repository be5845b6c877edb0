"""Answers of a schema, as objects: what `ChatOMLX.with_structured_output` is made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass

from omlx_core.errors import InvalidParameterError
from omlx_plugins.langchain.response_format import Schema, make_response_format
from omlx_plugins.langchain.tools import convert_tools

Method = Literal["json_schema", "function_calling", "json_mode"]
_METHODS = ("json_schema", "function_calling", "json_mode")


def bind_structured_output(
    llm: BaseChatModel,
    schema: Schema | None,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
    options: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """A model that answers with objects of a schema; see `ChatOMLX.with_structured_output`.

    Raises:
        InvalidParameterError: a method that there isn't, or one that needs a schema without one.
        InvalidConstraintError, InvalidToolError: the schema is none.
    """
    if method not in _METHODS:
        raise InvalidParameterError(f"method={method!r}: give one of {', '.join(map(repr, _METHODS))}")
    if schema is None and method != "json_mode":
        raise InvalidParameterError(f"method={method!r} without a schema: give one, or use method='json_mode'")
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": {} if schema is None else schema}
    parser: BaseOutputParser[Any]
    is_pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        [tool] = convert_tools([schema] if schema is not None else [], strict=strict)
        name = tool["function"]["name"]
        bound = llm.bind_tools(
            [tool], tool_choice=name, parallel_tool_calls=False, ls_structured_output_format=traced, **options
        )
        if is_pydantic:
            parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        response_format = make_response_format(schema, strict=strict)
        bound = llm.bind(response_format=response_format, ls_structured_output_format=traced, **options)
        parser = PydanticOutputParser(pydantic_object=schema) if is_pydantic else JsonOutputParser()
    parse = RunnableGenerator(_whole, _awhole) | parser
    if not include_raw:
        return bound | parse
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parse, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


# LangChain's parsers make whatever there is of JSON that was cut off.


def _whole(messages: Iterator[AIMessage]) -> Iterator[AIMessage]:
    for message in messages:
        _check_whole(message)
        yield message


async def _awhole(messages: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    async for message in messages:
        _check_whole(message)
        yield message


def _check_whole(message: AIMessage) -> None:
    if message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "the answer was cut off before it was complete: raise max_tokens, or bound the lengths in the schema "
            "(maxLength, maxItems)",
            llm_output=str(message.text),
        )
