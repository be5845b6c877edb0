"""What is to be warmed, as conversations."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import BaseMessage, SystemMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate

from omlx_core.errors import InvalidParameterError

WarmInput = LanguageModelInput | Sequence[LanguageModelInput] | Sequence[Document]
"""One conversation, several, or documents."""

_CONTEXT = "context"


def conversations_of(
    inputs: WarmInput, prompt: BasePromptTemplate[PromptValue] | None = None
) -> list[list[BaseMessage]]:
    """The conversations whose beginnings are to be computed.

    Args:
        inputs: a conversation in any form that a chat model takes, a list of such, or documents.
        prompt: makes the conversation of a document, as its variable ``context``; other variables stay empty, so that
            what comes after the first of them may differ later. Without one, a document is a system message.

    Raises:
        InvalidParameterError: a prompt without documents, or without that variable.
    """
    documents = [item for item in inputs if isinstance(item, Document)] if isinstance(inputs, Sequence) else []
    if documents and len(documents) == len(inputs):  # type: ignore[arg-type]
        return [_of_document(document, prompt) for document in documents]
    if prompt is not None or documents:
        raise InvalidParameterError("prompt=… is for documents: give a list of documents, and nothing else beside them")
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], list | PromptValue):
        return [_messages(item) for item in inputs]
    return [_messages(inputs)]  # type: ignore[arg-type]


def _of_document(document: Document, prompt: BasePromptTemplate[PromptValue] | None) -> list[BaseMessage]:
    if prompt is None:
        return [SystemMessage(document.page_content)]
    if _CONTEXT not in prompt.input_variables:
        raise InvalidParameterError(
            f"prompt has the variables {prompt.input_variables}, and none is {_CONTEXT!r}, where a document goes"
        )
    others = dict.fromkeys(prompt.input_variables, "")
    return prompt.invoke({**others, _CONTEXT: document.page_content}).to_messages()


def _messages(conversation: LanguageModelInput) -> list[BaseMessage]:
    if isinstance(conversation, PromptValue):
        return conversation.to_messages()
    return convert_to_messages([conversation] if isinstance(conversation, str) else conversation)
