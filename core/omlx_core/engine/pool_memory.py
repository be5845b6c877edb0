"""What has to leave a pool so that another model fits. Plain arithmetic: no engines, no locks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omlx_core.errors import ModelMemoryError
from omlx_core.sizes import format_size, total_memory_bytes


@dataclass(frozen=True, slots=True)
class Occupant:
    """A model that takes memory, or is about to.

    Attributes:
        model_id: its id in the pool.
        size_bytes: what it takes.
        obstacle: why it must stay, such as ``"pinned"``; None if it may leave.
    """

    model_id: str
    size_bytes: int
    obstacle: str | None = None


def choose_leaving(occupants: Sequence[Occupant], model_id: str, size_bytes: int, limit_bytes: int) -> list[Occupant]:
    """The occupants that must leave before a model fits: the first ones that may, and no more than needed.

    Args:
        occupants: in the order in which they should leave.
        model_id: the model that comes.
        size_bytes: what it takes; 0 if that isn't known yet.
        limit_bytes: what all may take together.

    Raises:
        ModelMemoryError: it doesn't fit, even if all leave that may.
    """
    if size_bytes > limit_bytes:
        raise ModelMemoryError(
            f"the model {model_id!r} takes {format_size(size_bytes)} and all models together may take "
            f"{format_size(limit_bytes)}: raise max_model_memory, or use a smaller or further quantized model"
        )
    excess_bytes = sum(occupant.size_bytes for occupant in occupants) + size_bytes - limit_bytes
    leaving = []
    for occupant in occupants:
        if excess_bytes > 0 and occupant.obstacle is None:
            leaving.append(occupant)
            excess_bytes -= occupant.size_bytes
    if excess_bytes > 0:
        staying = ", ".join(
            f"{occupant.model_id!r} ({format_size(occupant.size_bytes)}, {occupant.obstacle})"
            for occupant in occupants
            if occupant.obstacle is not None
        )
        raise ModelMemoryError(
            f"the model {model_id!r} takes {format_size(size_bytes)}, which is {format_size(excess_bytes)} more than "
            f"max_model_memory leaves: of {format_size(limit_bytes)} in all, {staying} can't be unloaded; ask again "
            "when they are idle, unpin one, or raise max_model_memory"
        )
    return leaving


def device_memory_bytes() -> int:
    """The memory that MLX loads models into: an NVIDIA GPU's own, otherwise this machine's."""
    from omlx_core.mlx_backend import mx

    info = mx.device_info()
    return int(info.get("total_memory") or info.get("memory_size") or total_memory_bytes())
