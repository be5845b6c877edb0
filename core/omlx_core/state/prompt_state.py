"""The state of a whole model after a prompt: one cache per layer, as mlx-lm's `make_prompt_cache` gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omlx_core.mlx_backend import mx

from omlx_core.cache.payload import BlockPayload
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import to_payloads, with_arrays
from omlx_core.state.handlers import LayerStateHandler, find_handler

PromptCache = list[Any]
"""One mlx-lm cache object per layer."""


class UnsupportedLayerError(Exception):
    """A layer's cache class has no handler: the model runs uncached. Never leaves the engine."""


class PromptStateCodec:
    """Turns token ranges of a prompt cache into block payloads, and a run of payloads into a prompt cache.

    Args:
        template: a prompt cache of the model, fresh or used; only its classes matter.

    Raises:
        UnsupportedLayerError: naming the classes that can't be cached.
    """

    def __init__(self, template: PromptCache) -> None:
        self._handlers: list[LayerStateHandler] = []
        unknown = set()
        for layer in template:
            handler = find_handler(layer)
            if handler is None:
                unknown.add(type(layer).__name__)
            else:
                self._handlers.append(handler)
        if unknown or not self._handlers:
            raise UnsupportedLayerError(", ".join(sorted(unknown)) or "no layers")

    @property
    def layout(self) -> list[str]:
        """The kind of each layer; part of the namespace."""
        return [handler.kind for handler in self._handlers]

    def capture(self, prompt_cache: PromptCache, ranges: Sequence[tuple[int, int]]) -> list[BlockPayload]:
        """Copy token ranges out of a running prompt cache, in one evaluation.

        Raises:
            CacheInvariantError: a layer has not seen all these tokens.
        """
        self._check_length(prompt_cache, at_least=max(stop for _, stop in ranges))
        return to_payloads(
            [
                {
                    f"{index}.{name}": array
                    for index, (handler, layer) in enumerate(zip(self._handlers, prompt_cache, strict=True))
                    for name, array in handler.capture(layer, start, stop).items()
                }
                for start, stop in ranges
            ]
        )

    def restore(
        self, payloads: Sequence[BlockPayload], *, num_tokens: int, capacity: int
    ) -> tuple[PromptCache, list[BlockPayload]]:
        """Build a prompt cache from blocks, evaluated and sharing no memory with them.

        Args:
            payloads: the blocks from the first token on, at least one.
            num_tokens: tokens that they hold together.
            capacity: tokens to have room for without reallocation.

        Returns:
            The prompt cache, and the payloads with MLX arrays, to be kept in RAM.

        Raises:
            CacheInvariantError: some layer would not hold `num_tokens` tokens.
        """
        payloads = with_arrays(payloads)
        by_layer = [self._split_layers(payload) for payload in payloads]
        prompt_cache = [
            handler.restore([layers[index] for layers in by_layer], capacity)
            for index, handler in enumerate(self._handlers)
        ]
        self._check_length(prompt_cache, exactly=num_tokens)
        mx.eval([layer.state for layer in prompt_cache])
        return prompt_cache, payloads

    def _split_layers(self, payload: BlockPayload) -> Sequence[Mapping[str, mx.array]]:
        layers: list[dict[str, mx.array]] = [{} for _ in self._handlers]
        for name, tensor in payload.tensors.items():
            index, _, member = name.partition(".")
            layers[int(index)][member] = tensor.array
        return layers

    def _check_length(self, prompt_cache: PromptCache, *, at_least: int = 0, exactly: int | None = None) -> None:
        for index, (handler, layer) in enumerate(zip(self._handlers, prompt_cache, strict=True)):
            held = handler.num_tokens(layer)
            if held < at_least or (exactly is not None and held != exactly):
                wanted = at_least if exactly is None else exactly
                raise CacheInvariantError(f"layer {index} holds {held} tokens where its blocks say {wanted}")
