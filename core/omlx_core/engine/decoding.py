"""The answers being decoded: mlx-lm's continuous batch, and beside it what it can't take and what would be alone in it.

An answer that is alone moves to the batch when a second one comes, and stays there to its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import BatchGenerator

from omlx_core.engine.prompt_caches import PromptCaches, fork_prompt_cache
from omlx_core.engine.request import Request
from omlx_core.engine.sampling import make_logits_processors, make_sampler
from omlx_core.engine.sequential_batch import Response, SequentialBatch, needs_sequential_decoding
from omlx_core.engine.speculative import DraftedModel, SpeculativeBatch
from omlx_core.settings import EngineSettings
from omlx_core.state.prompt_state import PromptCache

Batch: TypeAlias = BatchGenerator | SequentialBatch

_Place = tuple[Batch, int]
"""Where an answer is decoded, and its id there."""


class DecodingBatches:
    """Decodes many answers of one model. Belongs to the MLX thread.

    Args:
        model: the mlx-lm model.
        end_token_ids: tokens that end an answer.
        newline_token_ids: the tokens of a line break, which XTC spares as it spares those.
        prompt_caches: makes the model's prompt caches.
        settings: batch sizes.
        announce: called with an answer's first token if that is known before its step ends.
    """

    def __init__(
        self,
        model: Any,
        end_token_ids: list[int],
        newline_token_ids: list[int],
        prompt_caches: PromptCaches,
        settings: EngineSettings,
        *,
        announce: Callable[[Response], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._end_token_ids = end_token_ids
        self._spared_token_ids = [*end_token_ids, *newline_token_ids]
        self._prompt_caches = prompt_caches
        self._settings = settings
        self._announce = announce
        self._generator: BatchGenerator | None = None
        self._sequential_batch: SequentialBatch | None = None
        self._new_ids = itertools.count()
        self._places: dict[int, _Place] = {}
        self._lone: int | None = None  # the answer that the batch could take, decoded without it
        self._drawn: list[Response] = []  # the token that such an answer had been given when it moved

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
        is_lone = not is_sequential and len(samples) == 1 and self._lone is None and not self._is_used(self._generator)
        if not is_sequential and not is_lone:
            self._move_lone()
        batch = self._sequential() if is_sequential or is_lone else self._batch()
        processors = [_make_processors(sample) for sample in samples]
        inner_ids = batch.insert_segments(
            [[request.prompt_ids[-1:]] for _ in samples],
            max_tokens=[sample.params.max_tokens for sample in samples],
            caches=[prompt_cache, *(fork_prompt_cache(prompt_cache) for _ in samples[1:])],
            all_tokens=[request.prompt_ids[:-1] for _ in samples],
            samplers=[make_sampler(sample.params, self._spared_token_ids) for sample in samples],
            logits_processors=processors,
        )
        ids = [next(self._new_ids) for _ in inner_ids]
        self._places.update({id_: (batch, inner_id) for id_, inner_id in zip(ids, inner_ids, strict=True)})
        if is_lone:
            self._lone = ids[0]
        return ids

    def step(self) -> list[Response]:
        """One token of each answer."""
        outer_ids = {place: id_ for id_, place in self._places.items()}
        responses, self._drawn = self._drawn, []
        used = dict.fromkeys(batch for batch, _ in self._places.values())  # an empty one would take time
        for batch in used:
            for response in batch.next()[1]:
                response.uid = outer_ids[batch, response.uid]
                responses.append(response)
        for response in responses:
            if response.finish_reason is not None:
                self._forget(response.uid)
        return responses

    def extract(self, uid: int) -> PromptCache:
        """A copy of an answer's prompt cache as it is now; costs time."""
        batch, inner_id = self._places[uid]
        prompt_cache, _ = batch.extract_cache([inner_id])[inner_id]
        return prompt_cache

    def remove(self, uid: int) -> PromptCache:
        """Decode an answer no further, and take out its prompt cache."""
        batch, inner_id = self._places[uid]
        self._forget(uid)
        prompt_cache, _ = batch.remove([inner_id], return_prompt_caches=True)[inner_id]
        return prompt_cache

    def close(self) -> None:
        """Drop all answers; the next one begins anew."""
        if self._generator is not None:
            self._generator.close()
        self._generator = self._sequential_batch = self._lone = None
        self._places.clear()
        self._drawn.clear()

    def _move_lone(self) -> None:
        """Have the answer that is alone go on in the batch, unless it has only its last token to give."""
        if self._lone is None:
            return
        id_, self._lone = self._lone, None
        batch, lone_id = self._places[id_]
        sequence = batch.unfinished(lone_id)
        if sequence is None:
            return
        num_left = sequence.max_tokens - sequence.num_generated
        if sequence.next_logprobs is not None:  # drawn already: the batch begins with the one after it
            token = int(sequence.next_token.item())
            self._drawn.append(Response(id_, token, sequence.next_logprobs, None, None, None))
            num_left -= 1
        [inner_id] = self._batch().insert_segments(
            [[sequence.next_token.tolist()]],
            max_tokens=[num_left],
            caches=[sequence.prompt_cache],
            all_tokens=[sequence.token_ids],
            samplers=[sequence.sampler],
            logits_processors=[sequence.processors],
        )
        batch.remove([lone_id])
        self._places[id_] = self._batch(), inner_id

    def _forget(self, uid: int) -> None:
        del self._places[uid]
        if self._lone == uid:
            self._lone = None
        self._drawn = [response for response in self._drawn if response.uid != uid]

    def _is_used(self, batch: Batch | None) -> bool:
        return any(place[0] is batch for place in self._places.values())

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
                    self._model, self._end_token_ids, prepare_step, self._settings.num_draft_tokens, self._pass_on
                )
            else:
                self._sequential_batch = SequentialBatch(self._model, self._end_token_ids, prepare_step, self._pass_on)
        return self._sequential_batch

    def _pass_on(self, first: Response) -> None:
        """Announce a first token of the sequential batch under its answer's id."""
        place = self._sequential_batch, first.uid
        first.uid = next(id_ for id_, known in self._places.items() if known == place)
        self._announce(first)


def _make_processors(request: Request) -> list[Any]:
    processors: list[Any] = make_logits_processors(request.params)
    if request.make_constraint is not None:
        request.constraint = request.make_constraint()
        processors.append(request.constraint)  # the last: what it forbids stays forbidden
    return processors
