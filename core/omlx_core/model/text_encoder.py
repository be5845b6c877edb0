"""Text into token ids, in which what goes on from an earlier sequence keeps that sequence's ids."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omlx_core.model.history import Segment, TokenHistory

# Enough for the longest special token, and for whatever a tokenizer looks at around a place.
_CONTEXT_CHARS = 64
_CONTEXT_TOKENS = 8
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class _Finished:
    scope: Hashable
    prompt: Segment
    answer_ids: list[int]


class TextEncoder:
    """Encodes text with a model's tokenizer. Thread-safe.

    A text that begins like a remembered sequence gets its token ids up to the last place where tokenizing the whole
    text would have cut it too; the rest is tokenized as what comes after that.

    Args:
        tokenizer: an mlx-lm `TokenizerWrapper`.
        history: where sequences are remembered; None tokenizes every text anew.
    """

    def __init__(self, tokenizer: Any, history: TokenHistory | None = None) -> None:
        self._tokenizer = tokenizer
        self._history = history
        # Hugging Face's fast tokenizers raise "Already borrowed" when two threads set their options at once.
        self._lock = threading.Lock()
        # What ended on the MLX thread is decoded by the next caller: that thread has better things to do.
        self._finished: deque[_Finished] = deque()

    def encode(self, text: str, *, add_special_tokens: bool, salt: str | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            text: special tokens in it become those tokens.
            add_special_tokens: add those that the tokenizer puts around a text.
            salt: only sequences of the same salt count; otherwise a tenant could see by a prompt's length what
                another one has generated.
        """
        with self._lock:
            if self._history is not None and self._is_continuable(add_special_tokens=add_special_tokens):
                self._remember_finished(self._history)
                known = self._history.find((salt, add_special_tokens), text)
                for cut in reversed(known.cuts):
                    rest = self._encode_after(text[: cut.num_chars], text[cut.num_chars :])
                    if rest is not None:
                        return [*known.token_ids[: cut.num_tokens], *rest]
            return self._encode(text, add_special_tokens=add_special_tokens)

    def remember(
        self,
        text: str,
        token_ids: list[int],
        answer_ids: list[int],
        *,
        add_special_tokens: bool,
        salt: str | None = None,
    ) -> None:
        """Remember a sequence, by the next `encode`. Takes no time to speak of, and waits for nothing.

        An answer whose tokens end within a character is left out.

        Args:
            text: the prompt's.
            token_ids: what `encode` made of it.
            answer_ids: what was generated, the end token included.
            add_special_tokens: as for `encode`.
            salt: likewise.
        """
        if self._history is not None:
            finished = _Finished((salt, add_special_tokens), Segment(text, token_ids), answer_ids)
            self._finished.append(finished)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included; a part of a character reads as U+FFFD."""
        ids = list(token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def _is_continuable(self, *, add_special_tokens: bool) -> bool:
        return not (add_special_tokens and self._ends_texts)

    @cached_property
    def _ends_texts(self) -> bool:
        """Whether the tokenizer puts a special token after a text, so that nothing can go on from there."""
        return self._encode("a", add_special_tokens=True)[-1:] != self._encode("a")[-1:]

    def _encode_after(self, before: str, after: str) -> list[int] | None:
        """Token ids of a text as they are after another one; None if a token would run over the place between them."""
        context = before[-_CONTEXT_CHARS:]
        context_ids = self._encode(context)
        ids: list[int] = []
        # The rest can be long, and the place is seldom right by chance: look at its surroundings first.
        for text in dict.fromkeys((context + after[:_CONTEXT_CHARS], context + after)):
            ids = self._encode(text)
            if ids[: len(context_ids)] != context_ids:
                return None
        return ids[len(context_ids) :]

    def _remember_finished(self, history: TokenHistory) -> None:
        while self._finished:
            finished = self._finished.popleft()
            answer = self._answer_segments(finished.prompt.token_ids, finished.answer_ids)
            history.add(finished.scope, [finished.prompt, *answer])

    def _answer_segments(self, prompt_ids: Sequence[int], answer_ids: list[int]) -> list[Segment]:
        """An answer's text and its end token, which a template may render otherwise."""
        has_end = bool(answer_ids) and answer_ids[-1] in self._tokenizer.eos_token_ids
        content_ids = answer_ids[:-1] if has_end else answer_ids
        # Decoders trim what a text begins with: let it begin within the prompt.
        context = list(prompt_ids[-_CONTEXT_TOKENS:])
        before, content, whole = (self.decode(context + ids) for ids in ([], content_ids, answer_ids))
        if not (content.startswith(before) and whole.startswith(content)) or content.endswith(_REPLACEMENT):
            return []
        segments = [Segment(content[len(before) :], content_ids), Segment(whole[len(content) :], answer_ids[-1:])]
        return [segment for segment, is_there in zip(segments, (content_ids, has_end), strict=True) if is_there]
