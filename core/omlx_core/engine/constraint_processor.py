"""A constraint at work: which tokens may come next in one answer."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omlx_core.mlx_backend import backend_name, mx

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class ConstraintProcessor:
    """A logits processor that leaves only the tokens with which an answer can follow its constraint.

    It is one sequence's own and is called once per position, in order, after all other logits processors: its tokens
    are those of the last call and the one sampled from what that call returned. What comes with the first call is the
    prompt. Called on the MLX thread.

    While the model thinks, every token is allowed but those that end the answer. Once the answer is complete, or can't
    be continued, only those are.

    Args:
        matcher: a grammar at its start; it becomes this object's own.
        vocab_size: token ids of the matcher's tokenizer. Ids beyond are never allowed.
        end_token_ids: tokens that end an answer.
        thinking_start: tokens that may open thinking instead of an answer; empty if nothing may.
        thinking_end: tokens that end thinking.
        call_start: the token that starts a tool call. Within thinking too: models skip the end of it now and then, and
            mlx-lm reads what follows as a call. None if no call may be made, or none starts with a token of its own.
        starts_in_thinking: the prompt ends within thinking.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        end_token_ids: Sequence[int],
        *,
        thinking_start: Sequence[int] = (),
        thinking_end: Sequence[int] = (),
        call_start: int | None = None,
        starts_in_thinking: bool = False,
    ) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = allocate_token_bitmask(1, vocab_size)
        self._end_token_ids = list(end_token_ids)
        self._thinking_start = tuple(thinking_start)
        self._thinking_end = tuple(thinking_end)
        self._call_start = call_start
        self._is_thinking = starts_in_thinking
        self._allowed_thoughts: mx.array | None = None
        self._last_thoughts: deque[int] = deque(maxlen=len(self._thinking_end))
        # How many tokens of `thinking_start` were generated; None where it can't be (any more).
        self._num_opening = None if starts_in_thinking or not self._thinking_start else 0
        self._answer_may_open_alike = True
        self._num_seen: int | None = None
        self._error: str | None = None

    @property
    def error(self) -> str | None:
        """Why the answer ended before it followed its constraint; None if it didn't.

        That takes a token that wasn't allowed, from logits that aren't numbers or another processor, a grammar too
        complex for llguidance's limits, or one with a character that the vocabulary has no token for. The answer is
        then ended at once, for a batch must not fail with one of its sequences; what has been generated is not valid.
        """
        return self._error

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Rule out what can't come next.

        Args:
            tokens: the sequence so far, of shape ``[tokens]``.
            logits: what the model makes of it, of shape ``[1, vocab]``.

        Returns:
            The logits, minus infinity where a token isn't allowed; of the same shape and type.
        """
        if self._num_seen is not None:
            # The model's work on this position goes on while the grammar is asked.
            new = tokens[self._num_seen :]
            mx.async_eval(new)
            mx.async_eval(logits)
            for token_id in new.tolist():
                self._consume(token_id)
        self._num_seen = tokens.size
        if self._is_thinking:
            return mx.where(self._thoughts(logits.shape[-1]), logits, -mx.inf)
        self._fill_mask()
        return apply_mask(logits, self._mask)

    def _consume(self, token_id: int) -> None:
        if self._is_thinking:
            self._last_thoughts.append(token_id)
            is_call = token_id == self._call_start and self._matcher.try_consume_tokens([token_id]) == 1
            self._is_thinking = not is_call and tuple(self._last_thoughts) != self._thinking_end
        elif self._num_opening is not None and token_id == self._thinking_start[self._num_opening]:
            self._num_opening += 1
            if self._num_opening == len(self._thinking_start):
                self._is_thinking = True
                self._num_opening = None
                self._matcher.reset()
            else:
                self._answer_may_open_alike &= self._matcher.try_consume_tokens([token_id]) == 1
        else:
            self._num_opening = None
            self._matcher.consume_token(token_id)

    def _fill_mask(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        # In an error, and where nothing can follow, these are the tokens that end an answer.
        fill_next_token_bitmask(self._matcher, self._mask)
        self._note_error()
        if self._num_opening is not None:
            if not self._answer_may_open_alike:
                self._mask.fill(0)
            byte, bit = divmod(self._thinking_start[self._num_opening], 8)
            self._mask.view(np.uint8)[0, byte] |= 1 << bit

    def _note_error(self) -> None:
        if self._error is None and self._matcher.is_error():
            self._error = self._matcher.get_error().partition("\n")[0]
            logger.warning("an answer can't follow its constraint any further, and ends: %s", self._error)

    def _thoughts(self, width: int) -> mx.array:
        """Which token ids are allowed within thinking, of shape ``[1, width]``."""
        if self._allowed_thoughts is None:
            ids = np.arange(width)
            self._allowed_thoughts = mx.array((ids < self._vocab_size) & ~np.isin(ids, self._end_token_ids))[None]
        return self._allowed_thoughts


def apply_mask(logits: mx.array, mask: NDArray[np.int32]) -> mx.array:
    """Minus infinity where a token isn't allowed.

    Args:
        logits: of shape ``[1, vocab]``.
        mask: a bit for each token id, the lowest first, of shape ``[1, words]``; those beyond its end are 0.
    """
    if backend_name() == "metal":
        from llguidance.mlx import apply_token_bitmask

        masked: mx.array = apply_token_bitmask(logits, mask)
        return masked
    allowed = np.unpackbits(mask.view(np.uint8), axis=1, count=logits.shape[-1], bitorder="little").view(np.bool_)
    return mx.where(mx.array(allowed), logits, -mx.inf)
