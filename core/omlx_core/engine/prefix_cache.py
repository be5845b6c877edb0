"""Puts the prefix cache of one model together. Runs on the MLX thread, once, after the model is loaded."""

from __future__ import annotations

import logging
from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from omlx_core.cache.block_hash import hash_namespace
from omlx_core.cache.events import EventBus
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.ssd_cache import PagedSSDCacheManager
from omlx_core.cache.tiered_cache import TieredCache
from omlx_core.engine.prompt_caches import PromptCaches
from omlx_core.errors import InvalidSettingError
from omlx_core.model.fingerprint import describe_namespace
from omlx_core.model.loading import LoadedModel, architecture_of
from omlx_core.settings import CacheSettings
from omlx_core.state.prompt_state import PromptStateCodec, UnsupportedLayerError

logger = logging.getLogger(__name__)

# Models whose tokens, in mlx-lm 0.32 itself, depend on where a prompt is cut; a restored prefix is a cut.
_CUT_DEPENDENT = {
    "phi3small": "its block-sparse layers let a token see later ones of the same prefill step",
    "plamo3": "its mask admits one token more than its window keeps",
}


def _computes_single_tokens_in_latents(model: Any) -> bool:
    """Whether a model has latent attention of the kind that absorbs its projections for a single token."""
    return any(isinstance(module, (MultiLinear, QuantizedMultiLinear)) for module in model.modules())


def open_prefix_cache(
    loaded: LoadedModel, settings: CacheSettings, prompt_caches: PromptCaches
) -> tuple[TieredCache, PromptStateCodec | None]:
    """Open both tiers for a model.

    Args:
        loaded: the model.
        settings: how prefixes are cached.
        prompt_caches: makes the model's prompt caches.

    Returns:
        The cache, and how the model's state is cut into blocks. No codec means that the model runs uncached, because
        the settings say so or because a layer's cache class is unknown; the latter is said once in the log.

    Raises:
        CacheDirectoryError: the SSD tier's folder can't be used.
        InvalidSettingError: `cold_kv_bits` with keys and values that are quantized already.
    """
    is_cold_quantized = settings.cold_kv_bits is not None and settings.paged_ssd_cache_dir is not None
    if is_cold_quantized and prompt_caches.quantization is not None:
        raise InvalidSettingError(
            f"cold_kv_bits={settings.cold_kv_bits} with kv_bits={prompt_caches.quantization.bits}: keys and values "
            "would be quantized twice: leave one of them out"
        )
    codec = None
    architecture = architecture_of(getattr(loaded.model, "target", loaded.model))  # behind a draft, if there is one
    if architecture in _CUT_DEPENDENT:
        logger.warning("%s runs without a prefix cache: %s", loaded.name, _CUT_DEPENDENT[architecture])
    elif not settings.no_cache:
        try:
            codec = PromptStateCodec(
                prompt_caches.make(),
                settings.block_size,
                find=prompt_caches.find_handler,
                is_latent=_computes_single_tokens_in_latents(loaded.model),
                are_written=settings.paged_ssd_cache_dir is not None and not settings.ssd_read_only,
            )
        except UnsupportedLayerError as exc:
            logger.warning("%s runs without a prefix cache: no way to cut %s into blocks", loaded.name, exc)
    description = describe_namespace(
        loaded.model,
        tokenizer=loaded.tokenizer,
        name=loaded.name,
        config=loaded.config,
        adapter_path=loaded.adapter_path,
        block_size=settings.block_size,
        layer_layout=codec.layout if codec else [],
    )
    if is_cold_quantized:
        description = {**description, "cold_kv_bits": settings.cold_kv_bits}
    namespace = hash_namespace(description)
    events = EventBus(namespace)
    ssd = None
    location = settings.prepare_ssd_cache_dir() if codec else None
    if location is not None:
        ssd = PagedSSDCacheManager(
            location.directory,
            max_size_bytes=location.max_size_bytes,
            namespace=namespace,
            description=description,
            min_free_bytes=location.min_free_bytes,
            write_budget_bytes=location.write_budget_bytes,
            checkpoint_share=settings.checkpoint_share,
            quantizes=is_cold_quantized,
            read_only=location.read_only,
            events=events,
        )
    paged = PagedCacheManager(
        namespace,
        block_size=settings.block_size,
        initial_blocks=settings.initial_cache_blocks,
        hot_max_bytes=settings.hot_cache_max_bytes,
        checkpoint_share=settings.checkpoint_share,
        cold=ssd,
        events=events,
    )
    return TieredCache(paged, ssd, events, max_pinned_bytes=settings.max_pinned_bytes), codec
