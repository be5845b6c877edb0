"""LangChain documents in the order that the prefix cache knows best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from pydantic import ConfigDict, Field, SkipValidation

from omlx_core.engine.params import Prompt
from omlx_core.errors import InvalidParameterError
from omlx_plugins.langchain.chat_model import ChatOMLX
from omlx_plugins.langchain.llm import OMLX
from omlx_plugins.langchain.messages import convert_messages
from omlx_plugins.langchain.options import convert_options
from omlx_plugins.rag.reorder import Reordering, reorder

PADDING = "omlx_padding"
"""The metadata of an aligned document that says what white space goes in front of it."""

_MARK = "OMLX-{}-HERE"


class CacheAwareReorder(BaseDocumentCompressor, BaseDocumentTransformer):
    """Puts retrieved documents in the order that lets the model reuse most of what it has computed.

    ::

        prompt = ChatPromptTemplate([("system", "Answer from these:\\n\\n{context}"), ("user", "{question}")])
        reorder = CacheAwareReorder(llm=llm, prompt=prompt)
        documents = reorder.transform_documents(retriever.invoke(question))

    It is a document transformer, and a compressor for `ContextualCompressionRetriever`. Documents are never dropped or
    changed: it returns the same objects in another order. The engine is asked what it has cached, and computes nothing;
    the model is loaded on first use.

    Attributes:
        llm: the model that will answer.
        prompt: the chain's own prompt template, a string that is one, or a function from the context to what the
            model is asked. What comes before the context must be the same for all questions.
        document_variable: the template's variable for the context.
        document_prompt: how the chain writes a document, as for LangChain's `create_stuff_documents_chain`.
        separator: what stands between two documents.
        key: sorts the documents that the cache doesn't order; by default a hash of their text does.
        align: have each document begin a block of the cache, by white space in front of it. The documents are then
            copies with that white space in ``metadata["omlx_padding"]``, and the chain has to write it: with
            ``document_prompt=PromptTemplate.from_template("{omlx_padding}{page_content}")``.
        options: those of the requests to come, as far as they change the prompt, such as ``tools``.
        on_reorder: is told of each order, and what it is expected to reuse.

    Raises:
        InvalidParameterError: the prompt has no such variable, or others before it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: ChatOMLX | OMLX
    prompt: SkipValidation[BasePromptTemplate[Any] | str | Callable[[str], LanguageModelInput]]
    document_variable: str = "context"
    document_prompt: SkipValidation[BasePromptTemplate[str] | None] = None
    separator: str = "\n\n"
    key: Callable[[Document], Any] | None = None
    align: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    on_reorder: Callable[[Reordering], None] | None = Field(default=None, exclude=True, repr=False)

    # The type checker keeps the signature that it derives from the fields; pydantic would wrap a validator's error.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            self._check_prompt()

    def _check_prompt(self) -> None:
        prompt = PromptTemplate.from_template(self.prompt) if isinstance(self.prompt, str) else self.prompt
        if isinstance(prompt, BasePromptTemplate):
            _check_head(prompt, self.document_variable)
        elif not callable(prompt):
            raise InvalidParameterError(f"prompt={self.prompt!r}: give a template, a string or a function")

    def plan(self, documents: Sequence[Document]) -> Reordering:
        """The order, and what it is expected to reuse; the context in it has the documents joined."""
        texts = [self._text(document) for document in documents]
        keys = None if self.key is None else [self.key(document) for document in documents]
        options = self.llm.generation_options(convert_options(self.options))
        with self.llm.lease_engine() as engine:
            return reorder(
                engine,
                texts,
                render=self._render,
                separator=self.separator,
                keys=keys,
                align=self.align,
                options=options,
            )

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """The documents in their new order; keywords have no effect."""
        del kwargs
        plan = self.plan(documents)
        if self.on_reorder is not None:
            self.on_reorder(plan)
        ordered = [documents[index] for index in plan.order]
        if not self.align:
            return ordered
        return [
            document.model_copy(update={"metadata": {**document.metadata, PADDING: padding}})
            for document, padding in zip(ordered, plan.padding, strict=True)
        ]

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The same, for retrievers that compress: nothing is left out."""
        del query, callbacks
        return self.transform_documents(documents)

    def _text(self, document: Document) -> str:
        if self.document_prompt is None:
            return document.page_content
        if PADDING in self.document_prompt.input_variables:
            document = document.model_copy(update={"metadata": {**document.metadata, PADDING: ""}})
        return format_document(document, self.document_prompt)

    def _render(self, context: str) -> Prompt:
        prompt = self.prompt
        if isinstance(prompt, str):
            prompt = PromptTemplate.from_template(prompt)
        asked: LanguageModelInput
        if isinstance(prompt, BasePromptTemplate):
            asked = prompt.invoke({**_neutral_values(prompt), self.document_variable: context})
        else:
            asked = prompt(context)
        value: PromptValue = self.llm._convert_input(asked)
        if isinstance(self.llm, ChatOMLX):
            return convert_messages(value.to_messages()).messages
        return value.to_string()


def _neutral_values(prompt: BasePromptTemplate[Any]) -> dict[str, Any]:
    """A value for each variable: a placeholder for messages gets none, and all else the empty text."""
    return {name: [] if name in prompt.input_types else "" for name in prompt.input_variables}


def _check_head(prompt: BasePromptTemplate[Any], document_variable: str) -> None:
    """Refuse a template that has no place for documents, or varies before it."""
    if document_variable not in prompt.input_variables:
        raise InvalidParameterError(
            f"prompt has the variables {prompt.input_variables}, and none is {document_variable!r}, where the "
            "documents go: name the one that is, as document_variable"
        )
    marks = {name: _MARK.format(name) for name in prompt.input_variables if name not in prompt.input_types}
    text = prompt.invoke({**_neutral_values(prompt), **marks}).to_string()
    place = text.find(marks[document_variable])
    before = [name for name, mark in marks.items() if name != document_variable and 0 <= text.find(mark) < place]
    if before:
        raise InvalidParameterError(
            f"prompt has {', '.join(map(repr, before))} before {document_variable!r}, so no two questions begin alike "
            "and nothing of the documents can be reused: put the documents first, or fill it in with prompt.partial"
        )
