"""Prompts into token ids: text, chat messages or ids, checked before anything is changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from omlx_core.engine.params import GenerationParams, Prompt
from omlx_core.errors import InvalidParameterError, InvalidPromptError, InvalidRequestError, InvalidToolError
from omlx_core.model.chat import ChatRenderer, RenderedChat
from omlx_core.model.history import TokenHistory
from omlx_core.model.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model gets it.

    Attributes:
        token_ids: its tokens; at least one.
        text: what they read, special tokens of the tokenizer's own accord left out; None if token ids were given.
        chat: what it was rendered as; None if it isn't a chat.
    """

    token_ids: list[int]
    text: str | None = None
    chat: RenderedChat | None = None

    @property
    def text_with_documents(self) -> str:
        """The text, for documents to be found in.

        Raises:
            InvalidPromptError: token ids were given.
        """
        if self.text is None:
            raise InvalidPromptError("documents can't be found in token ids: give text or messages")
        return self.text


class PromptEncoder:
    """Turns prompts into token ids. Thread-safe.

    Args:
        tokenizer: an mlx-lm `TokenizerWrapper`; None accepts token ids only.
        context_length: most tokens of prompt and answer together; None if the model doesn't say.
        vocab_size: number of token ids; None if the model doesn't say.
        name: the model's name, for the log.
        history: where sequences are remembered, so that what goes on from one keeps its token ids; None tokenizes
            every prompt anew.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int | None,
        vocab_size: int | None,
        *,
        name: str = "the model",
        history: TokenHistory | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._vocab_size = vocab_size
        has_template = tokenizer is not None and bool(tokenizer.has_chat_template)
        self._renderer = ChatRenderer(tokenizer, name) if has_template else None
        self._texts = None if tokenizer is None else TextEncoder(tokenizer, history)

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._renderer is not None

    def encode(self, prompt: Prompt, params: GenerationParams | None = None) -> EncodedPrompt:
        """Token ids of a prompt that fits the context.

        Text is taken as it is; messages are rendered by the model's chat template, with the cue for an answer.

        Args:
            prompt: text, token ids or messages.
            params: the request's options, of which those for chats count.

        Raises:
            InvalidPromptError: empty, neither text nor ids nor messages, ids outside the vocabulary, messages that
                the template refuses, or no room for an answer.
            InvalidToolError: tools that can't be shown to the model, or without a chat.
            InvalidParameterError: a message is to be continued, and there is none.
        """
        encoded = self.encode_unbounded(prompt, params)
        if self._context_length is not None and len(encoded.token_ids) >= self._context_length:
            raise InvalidPromptError(
                f"the prompt has {len(encoded.token_ids)} tokens, but the model's context of {self._context_length} "
                "must hold it and the answer: shorten the prompt"
            )
        return encoded

    def encode_unbounded(self, prompt: Prompt, params: GenerationParams | None = None) -> EncodedPrompt:
        """Token ids of a prompt of any length, for counting.

        Raises:
            InvalidPromptError, InvalidToolError, InvalidParameterError: as `encode`, but for its length.
        """
        encoded = self._encode(prompt, GenerationParams() if params is None else params)
        if not encoded.token_ids:
            raise InvalidPromptError(f"prompt={prompt!r} is empty: give at least one token")
        return encoded

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; a part of a character reads as U+FFFD.

        Raises:
            InvalidPromptError: the engine has no tokenizer.
        """
        if self._texts is None:
            raise InvalidPromptError("this engine has no tokenizer: its token ids have no text")
        return self._texts.decode(token_ids)

    def count_system_tokens(
        self, prompt: Prompt, encoded: EncodedPrompt, params: GenerationParams | None = None
    ) -> int:
        """How many of a chat's tokens other chats with the same system messages and tools begin with.

        Args:
            prompt: the prompt.
            encoded: what `encode` made of it.
            params: the request's options.

        Returns:
            0 if it isn't a chat, or that can't be told.
        """
        messages = [message for message in prompt if isinstance(message, Mapping)]
        system = itertools.takewhile(lambda message: message.get("role") == "system", messages)
        return self.count_opening_tokens([*system], encoded, params)

    def count_opening_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        encoded: EncodedPrompt,
        params: GenerationParams | None = None,
    ) -> int:
        """How many of a chat's tokens other chats that open with the same messages and tools begin with.

        Args:
            messages: what they open with; the last may have less text than in the chat.
            encoded: what `encode` made of the chat.
            params: the request's options.

        Returns:
            0 if it isn't a chat, or that can't be told.
        """
        if encoded.chat is None or self._renderer is None or self._texts is None:
            return 0
        params = GenerationParams() if params is None else params
        try:
            opening = self._renderer.render_opening(messages, **_render_options(params))
        except InvalidRequestError:
            return 0  # some templates want messages in a certain order
        token_ids = self._texts.encode(opening, add_special_tokens=False, salt=params.cache_salt)
        pairs = zip(token_ids, encoded.token_ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def remember(self, encoded: EncodedPrompt, params: GenerationParams, answer_ids: list[int]) -> None:
        """Remember a sequence, unless it was given as token ids or the request leaves nothing behind.

        Takes no time to speak of: it is for the MLX thread.

        Args:
            encoded: the prompt.
            params: the request's options.
            answer_ids: what was generated, the end token included.
        """
        if self._texts is not None and encoded.text is not None and params.store:
            self._texts.remember(
                encoded.text,
                encoded.token_ids,
                answer_ids,
                add_special_tokens=encoded.chat is None and self._adds_special_tokens(encoded.text),
                salt=params.cache_salt,
            )

    def _encode(self, prompt: Prompt, params: GenerationParams) -> EncodedPrompt:
        if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
            raise InvalidPromptError(
                f"prompt is {type(prompt).__name__}: give text, a list of token ids or a list of messages"
            )
        if not isinstance(prompt, str):
            are_messages = {issubclass(kind, Mapping) for kind in set(map(type, prompt))}
            if len(are_messages) > 1:
                raise InvalidPromptError("prompt mixes messages with other things: give one kind")
            if True in are_messages:
                return self._encode_messages(cast(Sequence[Mapping[str, Any]], prompt), params)
        _check_no_chat(params)
        if isinstance(prompt, str):
            return self._encode_text(prompt, params)
        return EncodedPrompt(self._check_ids(prompt))

    def _check_ids(self, prompt: Sequence[Any]) -> list[int]:
        # All at once: one by one took 10 ms for 8,000 tokens.
        try:
            token_ids = list(map(operator.index, prompt))
        except TypeError:
            position = next(i for i, item in enumerate(prompt) if not _is_index(item))
            raise InvalidPromptError(
                f"prompt[{position}]={prompt[position]!r} is neither a token id nor a message with 'role' and 'content'"
            ) from None
        limit = self._vocab_size or 2**32
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= limit):
            position = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < limit)
            raise InvalidPromptError(
                f"prompt[{position}]={token_ids[position]} is not in the vocabulary of {self._vocab_size} tokens"
            )
        return token_ids

    def _encode_text(self, text: str, params: GenerationParams) -> EncodedPrompt:
        if self._texts is None:
            raise InvalidPromptError("this engine has no tokenizer: give token ids")
        if not text:
            return EncodedPrompt([], text)
        adds_special_tokens = self._adds_special_tokens(text)
        token_ids = self._texts.encode(text, add_special_tokens=adds_special_tokens, salt=params.cache_salt)
        return EncodedPrompt(token_ids, text)

    def _adds_special_tokens(self, text: str) -> bool:
        bos = self._tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _encode_messages(self, messages: Sequence[Mapping[str, Any]], params: GenerationParams) -> EncodedPrompt:
        if self._renderer is None or self._texts is None:
            raise InvalidPromptError("this model has no chat template: give text or token ids")
        chat = self._renderer.render(
            messages, continue_final_message=params.continue_final_message, **_render_options(params)
        )
        # The template writes the special tokens itself.
        token_ids = self._texts.encode(chat.text, add_special_tokens=False, salt=params.cache_salt)
        return EncodedPrompt(token_ids, chat.text, chat)


def _is_index(item: Any) -> bool:
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def _render_options(params: GenerationParams) -> dict[str, Any]:
    return {"tools": params.tools, "tool_format": params.tool_format, "template_args": params.template_args}


def _check_no_chat(params: GenerationParams) -> None:
    """Refuse what only chats have; what is often a default, such as `template_args`, has no effect instead."""
    if params.tools:
        raise InvalidToolError(
            f"tools={params.tool_names!r} with a prompt that isn't a chat: give messages, or leave the tools out"
        )
    if params.continue_final_message:
        raise InvalidParameterError(
            "continue_final_message=True with a prompt that isn't a chat, which has no last message: leave it out"
        )
