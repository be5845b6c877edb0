"""Decodes, one sequence after the other, what mlx-lm's `BatchGenerator` can't take, and what would be alone in it.

It can't take cache classes without a batch form (`ChunkedKVCache`, `QuantizedKVCache`, a model's own), windows that
keep their first tokens, layers that never fill the cache they are given, and architectures that are answered otherwise
beside a request of another length. A sequence that is alone is decoded here as `mlx_lm.generate_step` does it, on its
own prompt cache: a batch of one is a copy of that cache and a mask in each step, which on a GPU takes twice the time.

The interface is the part of `BatchGenerator` that the scheduler uses, so that it need not tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from omlx_core.mlx_backend import mx

from mlx_lm.generate import GenerationBatch, generation_stream
from mlx_lm.models.cache import TokenBuffer

from omlx_core.model.loading import architecture_of
from omlx_core.state.handlers import leaves_of

Response: TypeAlias = GenerationBatch.Response

_CLEARED_EVERY_TOKENS = 256  # MLX's pool, as generate_step does: of caches that have grown into new memory

# What mlx-lm 0.32 gets wrong in a batch of sequences of different lengths, or can't do.
UNLIKE_ALONE_IN_BATCH = {
    "afm7": "the layers that reuse keys take their positions from the padded length",
    "gemma2": "the mask of a batch doesn't fit the grouped scores",
    "gpt_bigcode": "it asks for the offset of the batch as one number",
    "minimax_m3_vl": "blocks are counted from the padded start",
    "phi3small": "the mask of a batch doesn't fit the grouped scores",
}


def needs_sequential_decoding(model: Any, prompt_cache: Sequence[Any], num_prompt_tokens: int) -> bool:
    """Whether `BatchGenerator` can't take a sequence, or would answer it otherwise than alone.

    Args:
        model: the mlx-lm model.
        prompt_cache: its cache after all tokens of the prompt but the last.
        num_prompt_tokens: tokens of the prompt.
    """
    if architecture_of(model) in UNLIKE_ALONE_IN_BATCH:
        return True
    if num_prompt_tokens > 1 and any(layer.empty() for layer in prompt_cache):
        return True
    # The batch's windows drop their oldest tokens, also those that `RotatingKVCache(keep=…)` keeps; and a class that
    # inherits `merge` would become its parent's batch form, without what it adds.
    leaves = leaves_of(prompt_cache).values()
    return any(getattr(leaf, "keep", 0) or "merge" not in vars(type(leaf)) for leaf in leaves)


@dataclass(eq=False)
class DecodingSequence:
    """One sequence of a `SequentialBatch`.

    Attributes:
        prompt_cache: its state.
        token_ids: the tokens that are accounted for; `prompt_cache` holds them.
        sampler: draws a token from log-probabilities.
        max_tokens: most tokens to generate.
        processors: change the logits first.
        next_token: the token that follows them, shape ``[1]``; it may be under way.
        next_logprobs: what it was drawn from; None for the prompt's last token.
        num_generated: tokens given out so far.
        context: what processors look at; None until one does.
    """

    prompt_cache: list[Any]
    token_ids: list[int]
    sampler: Callable[[mx.array], mx.array]
    max_tokens: int
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]]
    next_token: mx.array
    next_logprobs: mx.array | None = None
    num_generated: int = 0
    context: TokenBuffer | None = None

    def draw(self, known: mx.array | None, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The token after `known`, shape ``[1]``, and the log-probabilities that it was drawn from, ``[vocab]``.

        Args:
            known: all tokens before it; only processors ask for them.
            logits: the model's, of shape ``[1, vocab]``.
        """
        for processor in self.processors:
            logits = processor(known, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = self.sampler(logprobs)
        mx.async_eval(token, logprobs)
        return token, logprobs[0]

    def ends_with_next(self, stop_tokens: Collection[int]) -> bool:
        """Whether the next token is the answer's last; waits for it."""
        if self.next_logprobs is None:
            return False
        return self.num_generated + 1 >= self.max_tokens or int(self.next_token.item()) in stop_tokens


class SequentialBatch:
    """Sequences that decode in turn, one token each per step.

    Args:
        model: the mlx-lm model.
        stop_tokens: tokens that end an answer.
        prepare_step: called with a sequence's prompt cache before each of its steps.
        announce: called with an answer's first token as soon as that is known. To have the model read it, as is done
            before `next` returns it, takes as long as all else that a small model does for it.
    """

    stream = generation_stream

    def __init__(
        self,
        model: Any,
        stop_tokens: Sequence[int],
        prepare_step: Callable[[list[Any]], None] = lambda _: None,
        announce: Callable[[Response], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._prepare_step = prepare_step
        self._announce = announce
        self._stop_tokens = frozenset(stop_tokens)
        self._sequences: dict[int, DecodingSequence] = {}
        self._num_inserted = 0

    def insert_segments(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        *,
        max_tokens: Sequence[int],
        caches: Sequence[list[Any]],
        all_tokens: Sequence[Sequence[int]],
        samplers: Sequence[Callable[[mx.array], mx.array]],
        logits_processors: Sequence[Sequence[Callable[[mx.array, mx.array], mx.array]]],
    ) -> list[int]:
        """Add sequences, each of one segment of one token; the rest of its prompt is in its cache."""
        uids = []
        for [[token_id]], limit, prompt_cache, tokens, sampler, processors in zip(
            segments, max_tokens, caches, all_tokens, samplers, logits_processors, strict=True
        ):
            uids.append(self._num_inserted)
            self._num_inserted += 1
            self._sequences[uids[-1]] = DecodingSequence(
                prompt_cache, [*tokens], sampler, limit, processors, next_token=mx.array([token_id])
            )
        return uids

    def next(self) -> tuple[list[Any], list[Any]]:
        """One token of each sequence; as in `BatchGenerator`, its cache then holds that token too."""
        with mx.stream(self.stream):
            responses = [self._step(uid, sequence) for uid, sequence in self._sequences.items()]
        for response in responses:
            if response.finish_reason is not None:
                self._drop(response.uid)
        return [], responses

    def unfinished(self, uid: int) -> DecodingSequence | None:
        """A sequence that goes on after its next token; None if that one is its last."""
        sequence = self._sequences[uid]
        return None if sequence.ends_with_next(self._stop_tokens) else sequence

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[list[Any], list[int]]]:
        """The caches of sequences, which go on changing, and the tokens in them."""
        return {uid: (self._sequences[uid].prompt_cache, self._sequences[uid].token_ids) for uid in uids}

    def remove(
        self, uids: Sequence[int], *, return_prompt_caches: bool = False
    ) -> dict[int, tuple[list[Any], list[int]]]:
        """Take sequences out."""
        removed = self.extract_cache(uids) if return_prompt_caches else {}
        for uid in uids:
            self._drop(uid)
        return removed

    def close(self) -> None:
        """Nothing is held."""

    def _drop(self, uid: int) -> None:
        self._forget(self._sequences.pop(uid))

    def _step(self, uid: int, sequence: DecodingSequence) -> Response:
        if sequence.next_logprobs is None:
            self._advance(sequence)  # the prompt's last token gives the answer's first
            token = int(sequence.next_token.item())
            finish_reason = self._finish_reason(sequence, token)
            self._announce(Response(uid, token, sequence.next_logprobs, finish_reason, None, None))
        logprobs = sequence.next_logprobs
        self._advance(sequence)
        token = sequence.token_ids[-1]
        finish_reason = self._finish_reason(sequence, token)
        sequence.num_generated += 1
        if sequence.num_generated % _CLEARED_EVERY_TOKENS == 0:
            mx.clear_cache()
        return Response(uid, token, logprobs, finish_reason, sequence.prompt_cache, sequence.token_ids)

    def _finish_reason(self, sequence: DecodingSequence, token: int) -> str | None:
        """Why an answer ends with this token, its next one; None if it goes on."""
        if token in self._stop_tokens:
            return "stop"
        return "length" if sequence.num_generated + 1 >= sequence.max_tokens else None

    def _advance(self, sequence: DecodingSequence) -> None:
        """Have the model read the next token, and wait for that one while the token after it is being computed."""
        token = sequence.next_token
        self._forward(sequence)
        sequence.token_ids.append(int(token.item()))

    def _forward(self, sequence: DecodingSequence) -> None:
        """Run the model on the next token, and draw the one after it."""
        self._prepare_step(sequence.prompt_cache)
        logits = self._model(sequence.next_token[None], cache=sequence.prompt_cache)[:, -1, :]
        known = None
        if sequence.processors:
            if sequence.context is None:
                sequence.context = TokenBuffer(sequence.token_ids)
            known = sequence.context.update_and_fetch(sequence.next_token)
        sequence.next_token, sequence.next_logprobs = sequence.draw(known, logits)

    def _forget(self, sequence: DecodingSequence) -> None:
        """A sequence has left."""
