"""The prompt caches of one model, as the settings want them: bounded, quantized, or as mlx-lm makes them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from omlx_core.mlx_backend import mx

from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, make_prompt_cache

from omlx_core.errors import InvalidSettingError
from omlx_core.settings import EngineSettings
from omlx_core.state.handlers import find_handler, leaves_of, rebuild
from omlx_core.state.prompt_state import PromptCache
from omlx_core.state.protocols import Handler
from omlx_core.state.quantized import KVQuantization, QuantizedHandler

logger = logging.getLogger(__name__)


def fork_prompt_cache(prompt_cache: PromptCache) -> PromptCache:
    """A prompt cache of the same content that goes on by itself; no element is copied until either is written to."""
    forked = {}
    for path, leaf in leaves_of(prompt_cache).items():
        forked[path] = copy.copy(leaf)
        # mlx-lm's caches write to slices of their arrays, which changes the Python object in place.
        vars(forked[path]).update(tree_map(lambda item: item[...] if isinstance(item, mx.array) else item, vars(leaf)))
    return rebuild(prompt_cache, forked)


def when_filled(states: Sequence[Any]) -> mx.array:
    """An array that is computed once all layers are, and shares no memory with them: to hold it costs nothing.

    Args:
        states: of each layer's cache, its `state`.
    """
    filled = [item for _, item in tree_flatten(states) if isinstance(item, mx.array) and item.size]
    if not filled:
        return mx.array(True)
    element = filled[-1][(0,) * filled[-1].ndim]
    return mx.equal(element, element)


class PromptCaches:
    """Makes a model's prompt caches, and quantizes them when they are long enough. Belongs to the MLX thread.

    Args:
        model: the mlx-lm model, loaded.
        name: its name, for errors and the log.
        settings: `max_kv_size`, `kv_bits`, `kv_group_size` and `quantized_kv_start` count here.
        block_size: tokens per block of the prefix cache; keys and values are quantized at the end of a block.

    Attributes:
        quantization: how keys and values are quantized; None if they are not.

    Raises:
        InvalidSettingError: the model can't run on quantized keys and values, or has none that could be.
    """

    def __init__(self, model: Any, name: str, settings: EngineSettings, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self._max_kv_size = settings.max_kv_size
        self._is_bounded = settings.max_kv_size is not None and not hasattr(model, "make_cache")
        self.quantization: KVQuantization | None = None
        if settings.max_kv_size is not None and not self._is_bounded:
            logger.warning("max_kv_size=%d has no effect on %s, which sets its own", settings.max_kv_size, name)
        if settings.kv_bits is not None:
            start_tokens = -(-settings.quantized_kv_start // block_size) * block_size
            self.quantization = KVQuantization(settings.kv_bits, settings.kv_group_size, start_tokens)
            self._try_quantized(name)

    def make(self) -> PromptCache:
        """A fresh prompt cache."""
        cache: PromptCache = make_prompt_cache(self._model, self._max_kv_size)
        return cache

    def reserve(self, prompt_cache: PromptCache, num_tokens: int) -> None:
        """Give layers that keep every row room for a whole request, once its first step has shown their rows' shape.

        mlx-lm's cache grows by a copy of itself with each step, which takes a time that grows with the square of a
        prompt. Those that will be quantized are left alone: their room would be quantized too.

        Args:
            prompt_cache: holds the first step.
            num_tokens: to have room for.
        """
        if self.quantization is not None:
            return
        for leaf in leaves_of(prompt_cache).values():
            if type(leaf) is KVCache and leaf.keys is not None and leaf.keys.shape[2] < num_tokens:
                leaf.keys, leaf.values = (_with_room(rows, num_tokens) for rows in (leaf.keys, leaf.values))

    def prepare_step(self, prompt_cache: PromptCache) -> None:
        """To be called before each step of a sequence: quantizes what is due."""
        if self.quantization is not None:
            self.quantization.apply(prompt_cache)

    def end_of_step(self, num_tokens: int, wanted: int) -> int:
        """Where the next step of a prefill must end.

        A bounded cache forgets between two steps, so what a prompt comes to depends on where it is cut: it is read
        block by block, whether or not it begins with restored ones. Quantization starts between two steps as well.

        Args:
            num_tokens: tokens that are computed.
            wanted: where it would end if it were free to.
        """
        if self._is_bounded:
            return num_tokens - num_tokens % self._block_size + self._block_size
        start_tokens = self.quantization.start_tokens if self.quantization else 0
        return min(wanted, start_tokens) if num_tokens < start_tokens else wanted

    def find_handler(self, leaf: Any) -> Handler | None:
        """How the prefix cache keeps a layer."""
        if self.quantization is not None and type(leaf) is KVCache:
            return QuantizedHandler(self.quantization)
        return find_handler(leaf)

    def _try_quantized(self, name: str) -> None:
        """Run three tokens: attention of one's own, sinks, and odd head sizes fail on quantized keys and values."""
        how = KVQuantization(self.quantization.bits, self.quantization.group_size, 0) if self.quantization else None
        prompt_cache = self.make()
        if how is None or not any(how.is_due(leaf) for leaf in leaves_of(prompt_cache).values()):
            raise InvalidSettingError(
                f"kv_bits={self.quantization and self.quantization.bits}: {name} has no layer with full attention to "
                "quantize: leave kv_bits out"
            )
        how.apply(prompt_cache)
        try:
            for token_ids in ([0, 0], [0]):
                mx.eval(self._model(mx.array([token_ids]), cache=prompt_cache))
        except Exception as exc:
            raise InvalidSettingError(
                f"kv_bits={how.bits}, kv_group_size={how.group_size}: {name} can't run on quantized keys and values "
                f"({type(exc).__name__}: {exc}): leave kv_bits out, or try another kv_group_size"
            ) from exc


def _with_room(rows: mx.array, num_tokens: int) -> mx.array:
    """Rows ``[batch, heads, tokens, size]``, and zeros up to so many tokens."""
    num_missing = num_tokens - rows.shape[2]
    return mx.concatenate([rows, mx.zeros((*rows.shape[:2], num_missing, rows.shape[3]), rows.dtype)], axis=2)
