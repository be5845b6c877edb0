"""Speculative decoding: a small model proposes the next tokens, and the model checks them all in one step.

A proposal is taken only where it is the very token that the model's own sampler draws, so the answer is the one that
the model gives alone; good proposals make it come sooner. (Leviathan et al. 2023, arXiv:2211.17192, in the exact-match
form of `mlx_lm.generate.speculative_generate_step`.)

Both models read the prompt, and a block of the prefix cache holds the rows of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from omlx_core.mlx_backend import mx

from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache

from omlx_core.engine.sequential_batch import DecodingSequence, Response, SequentialBatch
from omlx_core.errors import InvalidSettingError


class DraftedModel(nn.Module):  # type: ignore[misc]  # MLX ships no types
    """A model and its draft, which read in step. A prompt cache of both has the model's layers first.

    Args:
        target: an mlx-lm model.
        draft: a smaller one with the same vocabulary.

    Raises:
        InvalidSettingError: what a layer has read can't be taken back, or the vocabularies differ.
    """

    def __init__(self, target: Any, draft: Any) -> None:
        super().__init__()
        self.target = target
        self.draft = draft
        self._num_layers = len(make_prompt_cache(target))
        classes = {type(layer).__name__ for layer in self.make_cache() if type(layer) is not KVCache}
        if classes:
            raise InvalidSettingError(
                f"draft_model: speculative decoding takes back what was proposed in vain, and {', '.join(classes)} "
                "can't: use two models of full attention throughout, or leave draft_model out"
            )
        sizes = [getattr(getattr(each, "args", None), "vocab_size", None) for each in (target, draft)]
        if sizes[0] != sizes[1]:
            raise InvalidSettingError(
                f"draft_model: its vocabulary has {sizes[1]} tokens and the model's {sizes[0]}: use a draft of the "
                "same family"
            )

    def make_cache(self) -> list[Any]:
        """A prompt cache of both; `make_prompt_cache` asks for it."""
        return [*make_prompt_cache(self.target), *make_prompt_cache(self.draft)]

    @property
    def args(self) -> Any:
        """The model's own."""
        return self.target.args

    def split_cache(self, prompt_cache: list[Any]) -> tuple[list[Any], list[Any]]:
        """The model's part of a prompt cache and the draft's."""
        return prompt_cache[: self._num_layers], prompt_cache[self._num_layers :]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Have both read; the logits are the model's."""
        own, drafts = self.split_cache(cache)
        self.draft(inputs, cache=drafts)
        logits: mx.array = self.target(inputs, cache=own)
        return logits


class SpeculativeBatch(SequentialBatch):
    """Sequences that decode in turn, each as many tokens at a time as its draft got right.

    Args:
        model: both models.
        stop_tokens: tokens that end an answer.
        prepare_step: called with a sequence's prompt cache before each of its steps.
        num_draft_tokens: how many tokens the draft proposes at a time.
        announce: called with an answer's first token as soon as that is known.
    """

    def __init__(
        self,
        model: DraftedModel,
        stop_tokens: Sequence[int],
        prepare_step: Callable[[list[Any]], None],
        num_draft_tokens: int,
        announce: Callable[[Response], None] = lambda _: None,
    ) -> None:
        super().__init__(model, stop_tokens, prepare_step, announce)
        self._pair = model
        self._num_draft_tokens = num_draft_tokens
        # By sequence, since they come and go: tokens that follow for certain, and how many the draft has read.
        self._upcoming: dict[DecodingSequence, deque[tuple[mx.array, mx.array]]] = {}
        self._num_read: dict[DecodingSequence, int] = {}

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[list[Any], list[int]]]:
        """The caches of sequences and the tokens that both models have read; the model may have read more."""
        for uid in uids:
            self._catch_up(self._sequences[uid])
        return super().extract_cache(uids)

    def _step(self, uid: int, sequence: DecodingSequence) -> Response:
        response = super()._step(uid, sequence)
        if response.finish_reason is not None:
            self._catch_up(sequence)
        return response

    def _catch_up(self, sequence: DecodingSequence) -> None:
        """Have the draft read what was accepted without it."""
        num_read = self._num_read.setdefault(sequence, len(sequence.token_ids))
        if unread := sequence.token_ids[num_read:]:
            _, drafts = self._pair.split_cache(sequence.prompt_cache)
            with mx.stream(self.stream):
                mx.eval(self._pair.draft(mx.array([unread]), cache=drafts))
            self._num_read[sequence] = len(sequence.token_ids)

    def _forward(self, sequence: DecodingSequence) -> None:
        """Find out the token after the next one."""
        upcoming = self._upcoming.setdefault(sequence, deque())
        if not upcoming:
            upcoming.extend(self._speculate(sequence))
        sequence.next_token, sequence.next_logprobs = upcoming.popleft()

    def _forget(self, sequence: DecodingSequence) -> None:
        self._upcoming.pop(sequence, None)
        self._num_read.pop(sequence, None)

    def _speculate(self, sequence: DecodingSequence) -> list[tuple[mx.array, mx.array]]:
        """The tokens after the next one that are certain: proposals that hold, and what the model makes of the first
        that doesn't."""
        self._prepare_step(sequence.prompt_cache)
        own, drafts = self._pair.split_cache(sequence.prompt_cache)
        known = [*sequence.token_ids, int(sequence.next_token.item())]
        proposed = self._propose(sequence, known, drafts)
        logits = self._pair.target(mx.array([[known[-1], *proposed]]), cache=own)
        found: list[tuple[mx.array, mx.array]] = []
        for position in range(len(proposed) + 1):
            token, logprobs = sequence.draw(mx.array(known) if sequence.processors else None, logits[:, position, :])
            found.append((token, logprobs))
            token_id = int(token.item())
            if position == len(proposed) or token_id != proposed[position]:
                break
            known.append(token_id)
        trim_prompt_cache(own, len(proposed) - len(found) + 1)
        # The draft has read all proposals but the last.
        num_too_many = max(0, self._num_read[sequence] - len(known))
        trim_prompt_cache(drafts, num_too_many)
        self._num_read[sequence] -= num_too_many
        return found

    def _propose(self, sequence: DecodingSequence, known: list[int], drafts: list[Any]) -> list[int]:
        """What the draft expects next, greedily; the prompt it has read, but for the last token."""
        num_read = self._num_read.setdefault(sequence, len(sequence.token_ids))
        limit = min(self._num_draft_tokens, sequence.max_tokens - sequence.num_generated - 1)
        proposed: list[int] = []
        unread = known[num_read:]
        for _ in range(limit):
            logits = self._pair.draft(mx.array([unread]), cache=drafts)
            num_read += len(unread)
            unread = [int(mx.argmax(logits[0, -1]).item())]
            proposed += unread
        self._num_read[sequence] = num_read
        return proposed
