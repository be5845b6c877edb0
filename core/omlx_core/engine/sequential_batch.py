"""Decodes, one sequence after the other, what mlx-lm's `BatchGenerator` can't take.

That is: cache classes without a batch form (`ChunkedKVCache`, a model's own), layers that never fill the cache they are
given, and architectures that are answered otherwise beside a request of another length. The interface is the part of
`BatchGenerator` that the scheduler uses, so that it need not tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.generate import GenerationBatch, generation_stream

from omlx_core.model.loading import architecture_of

Response = GenerationBatch.Response

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
    return any(not hasattr(layer, "merge") or (num_prompt_tokens > 1 and layer.empty()) for layer in prompt_cache)


@dataclass(eq=False)
class _Sequence:
    prompt_cache: list[Any]
    token_ids: list[int]
    sampler: Callable[[mx.array], mx.array]
    max_tokens: int
    next_token: mx.array
    next_logprobs: mx.array | None = None
    num_generated: int = field(default=0)


class SequentialBatch:
    """Sequences that decode in turn, one token each per step.

    Args:
        model: the mlx-lm model.
        stop_tokens: tokens that end an answer.
    """

    stream = generation_stream

    def __init__(self, model: Any, stop_tokens: Sequence[int]) -> None:
        self._model = model
        self._stop_tokens = frozenset(stop_tokens)
        self._sequences: dict[int, _Sequence] = {}
        self._num_inserted = 0

    def insert_segments(
        self,
        segments: Sequence[Sequence[Sequence[int]]],
        max_tokens: Sequence[int],
        caches: Sequence[list[Any]],
        all_tokens: Sequence[Sequence[int]],
        samplers: Sequence[Callable[[mx.array], mx.array]],
    ) -> list[int]:
        """Add sequences, each of one segment of one token; the rest of its prompt is in its cache.

        Returns:
            Their names: negative, where `BatchGenerator`'s are not.
        """
        uids = []
        for [[token_id]], limit, prompt_cache, tokens, sampler in zip(
            segments, max_tokens, caches, all_tokens, samplers, strict=True
        ):
            self._num_inserted += 1
            uids.append(-self._num_inserted)
            self._sequences[uids[-1]] = _Sequence(
                prompt_cache, [*tokens], sampler, limit, next_token=mx.array([token_id])
            )
        return uids

    def next(self) -> tuple[list[Any], list[Any]]:
        """One token of each sequence; as in `BatchGenerator`, its cache then holds that token too."""
        with mx.stream(self.stream):
            responses = [self._step(uid, sequence) for uid, sequence in self._sequences.items()]
        for response in responses:
            if response.finish_reason is not None:
                del self._sequences[response.uid]
        return [], responses

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[list[Any], list[int]]]:
        """The caches of sequences, which go on changing, and the tokens in them."""
        return {uid: (self._sequences[uid].prompt_cache, self._sequences[uid].token_ids) for uid in uids}

    def remove(
        self, uids: Sequence[int], *, return_prompt_caches: bool = False
    ) -> dict[int, tuple[list[Any], list[int]]]:
        """Take sequences out."""
        removed = self.extract_cache(uids) if return_prompt_caches else {}
        for uid in uids:
            del self._sequences[uid]
        return removed

    def close(self) -> None:
        """Nothing is held."""

    def _step(self, uid: int, sequence: _Sequence) -> Any:
        if sequence.next_logprobs is None:
            self._forward(sequence)  # the prompt's last token gives the answer's first
        token, logprobs = int(sequence.next_token.item()), sequence.next_logprobs
        self._forward(sequence)
        sequence.num_generated += 1
        finish_reason = "length" if sequence.num_generated >= sequence.max_tokens else None
        if token in self._stop_tokens:
            finish_reason = "stop"
        return Response(uid, token, logprobs, finish_reason, sequence.prompt_cache, sequence.token_ids)

    def _forward(self, sequence: _Sequence) -> None:
        """Run the model on the next token, and draw the one after it."""
        inputs = sequence.next_token
        logits = self._model(inputs[None], cache=sequence.prompt_cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sequence.token_ids.append(int(inputs.item()))
        sequence.next_token, sequence.next_logprobs = sequence.sampler(logprobs), logprobs[0]
        mx.eval(sequence.next_token, sequence.next_logprobs)
