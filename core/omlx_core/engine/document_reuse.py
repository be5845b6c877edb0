"""Documents without a prefix: keys and values computed once for a document by itself, and moved to wherever it stands.

**Approximate.** A document's keys and values depend on what is before it, and here they are those of the document
alone. The keys are turned to their new positions, and the first tokens of each document are computed in their place,
where they would otherwise draw attention as if they began the prompt: LegoLink of EPIC (Hu et al. 2025,
arXiv:2410.15332). Everything between and behind the documents is computed as ever, on top of that.

What is kept of a document is stored under extra keys that no request for an exact answer can have, and a request that
has put one in place keeps nothing from there on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.generate import generation_stream

from omlx_core.cache.tiered_cache import CapturedBlock, TieredCache
from omlx_core.engine.prompt_caches import PromptCaches
from omlx_core.engine.request import DocumentSpan, Request
from omlx_core.errors import InvalidParameterError
from omlx_core.state.prompt_state import PromptCache, PromptStateCodec
from omlx_core.state.rotation import UnmovableError, find_rotations, rotate

logger = logging.getLogger(__name__)

_PADDING_ID = 0


@dataclass(slots=True)
class Alone:
    """A document while it is computed by itself.

    Attributes:
        prompt_cache: its keys and values so far.
        num_computed: for how many tokens.
    """

    prompt_cache: PromptCache
    num_computed: int = 0


class DocumentReuse:
    """Puts documents in place in the prompts of one model. Belongs to the scheduler's thread.

    Args:
        model: the mlx-lm model.
        name: its name, for errors.
        prompt_caches: makes its prompt caches.
        cache: where documents are kept.
        codec: cuts them into blocks; None keeps none, since the model runs uncached.
    """

    def __init__(
        self, model: Any, name: str, prompt_caches: PromptCaches, cache: TieredCache, codec: PromptStateCodec | None
    ) -> None:
        self._model = model
        self._name = name
        self._prompt_caches = prompt_caches
        self._cache = cache
        self._codec = codec
        self._rotations: list[Any] | None = None

    def check(self) -> None:
        """Find out whether the model's keys can be moved; tries its layers, the first time.

        Raises:
            InvalidParameterError: they can't, or nothing is cached.
        """
        if self._rotations is not None:
            return
        try:
            if self._codec is None:
                raise UnmovableError("it runs without a prefix cache")
            if self._prompt_caches.quantization is not None:
                raise UnmovableError("its keys are quantized")
            with mx.stream(generation_stream):
                self._rotations = find_rotations(self._model, self._prompt_caches.make())
        except UnmovableError as exc:
            raise InvalidParameterError(
                f"document_reuse='approximate' is not for {self._name}: {exc}. Use 'exact', and "
                "omlx_plugins.rag's CacheAwareReorder"
            ) from exc

    def end_of_step(self, request: Request, wanted: int) -> int:
        """Where the next step of a prefill must end, so that the next document can be put in place."""
        if not request.documents:
            return wanted
        first = request.documents[0].start + request.params.document_recompute_tokens
        return min(wanted, first) if request.num_computed < first else wanted

    def advance(self, request: Request, step_size: int) -> bool:
        """Put the documents in place whose turn it is; of one that isn't kept, compute a step by itself.

        Returns:
            Whether something was computed, so that it is another's turn.
        """
        while request.documents:
            span = request.documents[0]
            first = span.start + request.params.document_recompute_tokens
            if request.num_computed >= span.stop or first >= span.stop:
                del request.documents[0]  # known from a prefix, or too short to gain anything
                continue
            if request.num_computed < first:
                return False
            with mx.stream(generation_stream):
                has_computed = self._advance_document(request, span, step_size)
            if has_computed:
                return True
        return False

    def _advance_document(self, request: Request, span: DocumentSpan, step_size: int) -> bool:
        token_ids = request.prompt_ids[span.start : span.stop]
        extra_keys = (*request.params.extra_keys, "document", f"{len(token_ids)} tokens")
        if request.alone is None:
            kept = self._restore(token_ids, extra_keys)
            if kept is not None:
                self._put(request, span, kept)
                return False
            if not request.params.store:
                del request.documents[0]  # nobody would have anything of it: it is computed in its place
                return False
            request.alone = Alone(self._prompt_caches.make())
        alone = request.alone
        step = token_ids[alone.num_computed : alone.num_computed + step_size]
        self._model(mx.array(step)[None], cache=alone.prompt_cache)
        mx.eval([layer.state for layer in alone.prompt_cache])
        alone.num_computed += len(step)
        if alone.num_computed == len(token_ids):
            self._put(request, span, alone.prompt_cache)
            request.alone = None
            try:
                self._store(token_ids, extra_keys, alone.prompt_cache)
            except Exception:  # the answer must not suffer
                logger.exception("a document of %d tokens could not be stored in the cache", len(token_ids))
        return True

    def _put(self, request: Request, span: DocumentSpan, document: PromptCache) -> None:
        """Append the rest of a document to a prompt; from then on the request stores nothing."""
        start, stop = request.num_computed - span.start, span.stop - span.start
        prompt_cache = request.prompt_cache or []
        for leaf, source, rotation in zip(prompt_cache, document, self._rotations or (), strict=True):
            keys, values = (rows[..., start:stop, :] for rows in (source.keys, source.values))
            leaf.update_and_fetch(rotate(rotation, keys, span.start), values)
        mx.eval([leaf.state for leaf in prompt_cache])
        del request.documents[0]
        request.num_computed = span.stop
        for sample in request.samples:
            sample.approximate_tokens += stop - start
        if request.table is not None:
            # Without a table nothing of this sequence can get a name, and so nobody can find it.
            self._cache.release(request.table)
            request.table = None

    # What is kept of a document: whole blocks, the last of them filled up with rows of zeros. They are cut off when it
    # is put in place; how many they are is among the extra keys, lest a token pass for one of them.

    def _restore(self, token_ids: Sequence[int], extra_keys: tuple[str, ...]) -> PromptCache | None:
        codec = self._codec
        if codec is None:
            return None
        padded = self._padded(token_ids)
        pending = self._cache.match(padded, extra_keys, codec.needs, max_tokens=len(padded))
        try:
            if pending.table.num_tokens < len(padded):
                return None
            content = self._cache.finish_restore(pending, len(padded))
            if content is None or pending.table.num_tokens < len(padded):
                return None
            prompt_cache, content = codec.restore(content, num_tokens=len(padded), capacity=len(padded))
            self._cache.promote(pending.table, content)
            return prompt_cache
        except Exception:  # whatever is wrong with the blocks, the document can be computed
            logger.exception("a document of %d tokens could not be restored and is computed again", len(token_ids))
            return None
        finally:
            pending.cancel()
            self._cache.release(pending.table)

    def _store(self, token_ids: Sequence[int], extra_keys: tuple[str, ...], prompt_cache: PromptCache) -> None:
        codec = self._codec
        if codec is None:
            return
        padded = self._padded(token_ids)
        num_missing = len(padded) - len(token_ids)
        for leaf in prompt_cache if num_missing else ():
            rows = [
                mx.zeros((*array.shape[:2], num_missing, array.shape[3]), array.dtype)
                for array in (leaf.keys, leaf.values)
            ]
            leaf.update_and_fetch(*rows)
        pending = self._cache.match(padded, extra_keys, codec.needs, max_tokens=len(padded))
        pending.cancel()
        try:
            copies = codec.rows_of(prompt_cache, len(padded))
            self._cache.append_tokens(pending.table, padded[pending.table.num_tokens :])
            self._cache.store(
                pending.table,
                lambda start, stop, has_rows: CapturedBlock(None if has_rows else copies.copy(start, stop)),
            )
        finally:
            self._cache.release(pending.table)

    def _padded(self, token_ids: Sequence[int]) -> list[int]:
        size = self._cache.block_size
        return [*token_ids, *[_PADDING_ID] * (-len(token_ids) % size)]
