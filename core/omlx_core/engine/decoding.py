"""The answers being decoded: mlx-lm's continuous batch, and beside it the sequences that it can't take.

Ids of the batch are 0 and up, those of the others negative: what an id belongs to can be seen from it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import BatchGenerator

from omlx_core.engine.prompt_caches import PromptCaches, fork_prompt_cache
from omlx_core.engine.request import Request
from omlx_core.engine.sampling import make_logits_processors, make_sampler
from omlx_core.engine.sequential_batch import Response, SequentialBatch, needs_sequential_decoding
from omlx_core.engine.speculative import DraftedModel, SpeculativeBatch
from omlx_core.settings import EngineSettings
from omlx_core.state.prompt_state import PromptCache


class DecodingBatches:
    """Decodes many answers of one model. Belongs to the MLX thread.

    Args:
        model: the mlx-lm model.
        end_token_ids: tokens that end an answer.
        newline_token_ids: the tokens of a line break, which XTC spares as it spares those.
        prompt_caches: makes the model's prompt caches.
        settings: batch sizes.
    """

    def __init__(
        self,
        model: Any,
        end_token_ids: list[int],
        newline_token_ids: list[int],
        prompt_caches: PromptCaches,
        settings: EngineSettings,
    ) -> None:
        self._model = model
        self._end_token_ids = end_token_ids
        self._spared_token_ids = [*end_token_ids, *newline_token_ids]
        self._prompt_caches = prompt_caches
        self._settings = settings
        self._generator: BatchGenerator | None = None
        self._sequential_batch: SequentialBatch | None = None

    def add(self, request: Request) -> list[int]:
        """Begin to decode a request and its further samples, each on a fork of its prompt cache.

        Args:
            request: its prompt cache holds all tokens of the prompt but the last.

        Returns:
            An id for each sample.
        """
        samples, prompt_cache = request.samples, request.prompt_cache or []
        is_sequential = (
            isinstance(self._model, DraftedModel)
            or self._prompt_caches.quantization is not None
            or needs_sequential_decoding(self._model, prompt_cache, len(request.prompt_ids))
        )
        batch = self._sequential() if is_sequential else self._batch()
        processors = [_make_processors(sample) for sample in samples]
        uids: list[int] = batch.insert_segments(
            [[request.prompt_ids[-1:]] for _ in samples],
            max_tokens=[sample.params.max_tokens for sample in samples],
            caches=[prompt_cache, *(fork_prompt_cache(prompt_cache) for _ in samples[1:])],
            all_tokens=[request.prompt_ids[:-1] for _ in samples],
            samplers=[make_sampler(sample.params, self._spared_token_ids) for sample in samples],
            logits_processors=processors,
        )
        return uids

    def step(self, uids: Collection[int]) -> list[Response]:
        """One token of each answer.

        Args:
            uids: all ids that are being decoded.
        """
        # Each is asked for its share only: an empty step costs time too.
        has_batched, has_sequential = any(uid >= 0 for uid in uids), any(uid < 0 for uid in uids)
        return [
            *(self._batch().next()[1] if has_batched else ()),
            *(self._sequential().next()[1] if has_sequential else ()),
        ]

    def extract(self, uid: int) -> PromptCache:
        """A copy of an answer's prompt cache as it is now; costs time."""
        prompt_cache, _ = self._batch_of(uid).extract_cache([uid])[uid]
        return prompt_cache

    def remove(self, uid: int) -> PromptCache:
        """Decode an answer no further, and take out its prompt cache."""
        prompt_cache, _ = self._batch_of(uid).remove([uid], return_prompt_caches=True)[uid]
        return prompt_cache

    def close(self) -> None:
        """Drop all answers; the next one begins anew."""
        if self._generator is not None:
            self._generator.close()
        self._generator = self._sequential_batch = None

    def _batch(self) -> BatchGenerator:
        if self._generator is None:
            self._generator = BatchGenerator(
                self._model,
                stop_tokens=[[token_id] for token_id in self._end_token_ids],
                completion_batch_size=self._settings.max_batch_size,
                prefill_batch_size=self._settings.max_batch_size,
            )
        return self._generator

    def _sequential(self) -> SequentialBatch:
        if self._sequential_batch is None:
            prepare_step = self._prompt_caches.prepare_step
            if isinstance(self._model, DraftedModel):
                self._sequential_batch = SpeculativeBatch(
                    self._model, self._end_token_ids, prepare_step, self._settings.num_draft_tokens
                )
            else:
                self._sequential_batch = SequentialBatch(self._model, self._end_token_ids, prepare_step)
        return self._sequential_batch

    def _batch_of(self, uid: int) -> BatchGenerator | SequentialBatch:
        return self._batch() if uid >= 0 else self._sequential()


def _make_processors(request: Request) -> list[Any]:
    processors: list[Any] = make_logits_processors(request.params)
    if request.make_constraint is not None:
        request.constraint = request.make_constraint()
        processors.append(request.constraint)  # the last: what it forbids stays forbidden
    return processors
