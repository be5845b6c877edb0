"""Where texts stand among the tokens of a prompt that they are part of."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from omlx_core.errors import InvalidPromptError

Decode = Callable[[Sequence[int]], str]
"""Makes text of token ids, special tokens included."""

REPLACEMENT = "\ufffd"
"""How a part of a character reads."""


def locate(text: str, documents: Sequence[str]) -> list[int]:
    """Where each document begins in a text that has all of them, in this order.

    Raises:
        InvalidPromptError: one is empty, or isn't there.
    """
    places: list[int] = []
    at = 0
    for index, document in enumerate(documents):
        place = text.find(document, at) if document else -1
        if place < 0:
            raise InvalidPromptError(
                f"documents[{index}]={document[:40]!r} is empty, or not in the prompt behind the ones before it: give "
                "the texts that the prompt has, in its order"
            )
        places.append(place)
        at = place + len(document)
    return places


class TokenPlaces:
    """The places of a prompt's tokens in its text.

    Args:
        decode: makes text of tokens.
        text: the prompt.
        token_ids: its tokens.

    Raises:
        InvalidPromptError: the tokenizer changes texts, so that no place can be told.
    """

    def __init__(self, decode: Decode, text: str, token_ids: Sequence[int]) -> None:
        full = decode(token_ids)
        if not full.endswith(text):
            raise InvalidPromptError("this model's tokenizer changes texts, so no place in them can be told")
        self._text = text
        self._offset = len(full) - len(text)  # what the tokenizer puts before a text
        self._decode = decode
        self._token_ids = token_ids
        self._counts = range(len(token_ids) + 1)

    def token_at(self, place: int) -> int:
        """The index of the token that the character at a place belongs to."""
        return bisect.bisect_right(self._counts, self._offset + place, key=self._num_chars) - 1

    def spans(self, documents: Sequence[str]) -> list[tuple[int, int]]:
        """The tokens ``[start, stop)`` that are, as a whole, within each of the documents that the text has.

        Raises:
            InvalidPromptError: as `locate`.
        """
        starts = locate(self._text, documents)
        return [
            self.tokens_within(start, start + len(document)) for start, document in zip(starts, documents, strict=True)
        ]

    def tokens_within(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens that stand between two places as a whole; as many as none where there are none."""
        first = bisect.bisect_left(self._counts, self._offset + start, key=self._num_chars)
        end = self.token_at(stop)
        return first, max(first, end)

    def _num_chars(self, num_tokens: int) -> int:
        return len(self._decode(self._token_ids[:num_tokens]).rstrip(REPLACEMENT)) if num_tokens else 0
