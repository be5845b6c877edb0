"""Prompts into token ids: text, chat messages or ids, checked before anything is changed."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from omlx_core.engine.params import Prompt
from omlx_core.errors import InvalidPromptError


class PromptEncoder:
    """Turns prompts into token ids. Thread-safe.

    Args:
        tokenizer: an mlx-lm `TokenizerWrapper`; None accepts token ids only.
        context_length: most tokens of prompt and answer together; None if the model doesn't say.
        vocab_size: number of token ids; None if the model doesn't say.
    """

    def __init__(self, tokenizer: Any, context_length: int | None, vocab_size: int | None) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._vocab_size = vocab_size
        # Hugging Face's fast tokenizers raise "Already borrowed" when two threads set their options at once.
        self._lock = threading.Lock()

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._tokenizer is not None and bool(self._tokenizer.has_chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that fits the context.

        Text is taken as it is; messages are rendered by the model's chat template with the cue for an answer.

        Raises:
            InvalidPromptError: empty, neither text nor ids nor messages, ids outside the vocabulary, messages that
                the template refuses, or no room for an answer.
        """
        token_ids = self.encode_unbounded(prompt)
        if self._context_length is not None and len(token_ids) >= self._context_length:
            raise InvalidPromptError(
                f"the prompt has {len(token_ids)} tokens, but the model's context of {self._context_length} must "
                "hold it and the answer: shorten the prompt"
            )
        return token_ids

    def count_system_tokens(self, prompt: Prompt, prompt_ids: Sequence[int]) -> int:
        """How many of a prompt's tokens its leading system messages make up; 0 if that can't be told.

        Args:
            prompt: the prompt.
            prompt_ids: what `encode` made of it.
        """
        if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
            return 0
        leading = itertools.takewhile(lambda item: isinstance(item, Mapping) and item.get("role") == "system", prompt)
        try:
            alone = self._render([item for item in leading if isinstance(item, Mapping)], add_generation_prompt=False)
        except InvalidPromptError:
            return 0  # some templates want a user's message
        pairs = zip(alone, prompt_ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def encode_unbounded(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any length, for counting.

        Raises:
            InvalidPromptError: as `encode`, but for its length.
        """
        token_ids = self._encode(prompt)
        if not token_ids:
            raise InvalidPromptError(f"prompt={prompt!r} is empty: give at least one token")
        return token_ids

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
            raise InvalidPromptError(
                f"prompt is {type(prompt).__name__}: give text, a list of token ids or a list of messages"
            )
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if not messages:
            return self._check_ids(prompt)
        if len(messages) < len(prompt):
            raise InvalidPromptError("prompt mixes messages with other things: give one kind")
        return self._encode_messages(messages)

    def _check_ids(self, prompt: Sequence[Any]) -> list[int]:
        token_ids = []
        for position, item in enumerate(prompt):
            try:
                token_id = operator.index(item)
            except TypeError:
                raise InvalidPromptError(
                    f"prompt[{position}]={item!r} is neither a token id nor a message with 'role' and 'content'"
                ) from None
            if token_id < 0 or token_id >= (self._vocab_size or 2**32):
                raise InvalidPromptError(
                    f"prompt[{position}]={token_id} is not in the vocabulary of {self._vocab_size} tokens"
                )
            token_ids.append(token_id)
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidPromptError("this engine has no tokenizer: give token ids")
        if not text:
            return []
        bos = self._tokenizer.bos_token
        with self._lock:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        return ids

    def _encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if not self.has_chat_template:
            raise InvalidPromptError("this model has no chat template: give text or token ids")
        for position, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise InvalidPromptError(f"prompt[{position}]={dict(message)!r} has no 'role'")
            content = message.get("content")
            if not isinstance(content, str | list | type(None)):
                raise InvalidPromptError(
                    f"prompt[{position}]['content'] is {type(content).__name__}: give text, or a list of parts if "
                    "the model's template takes them"
                )
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        if not messages:
            return []
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
                # The template writes the special tokens itself.
                ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        except (TemplateError, TypeError, ValueError, KeyError) as exc:
            raise InvalidPromptError(f"the model's chat template refuses the messages: {exc}") from exc
        return ids
