"""The engine of omlx-plugins: local models on MLX with a paged two-tier KV cache.

``import omlx_core`` is cheap; MLX is imported with the first use of `Engine`, or the first model of a `ModelPool`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omlx_core.engine.constraints import Choice, Grammar, JSONSchema, Regex
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import GenerationChunk, GenerationResult, Usage
from omlx_core.settings import CacheSettings, EngineSettings

if TYPE_CHECKING:
    from omlx_core.engine.engine import Engine
    from omlx_core.engine.pool import ModelPool

__all__ = [
    "CacheSettings",
    "Choice",
    "Engine",
    "EngineSettings",
    "GenerationChunk",
    "GenerationParams",
    "GenerationResult",
    "Grammar",
    "JSONSchema",
    "ModelPool",
    "Regex",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from omlx_core.engine.engine import Engine

        return Engine
    if name == "ModelPool":
        from omlx_core.engine.pool import ModelPool

        return ModelPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
