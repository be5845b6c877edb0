"""Arrays in memory that the CPU can write to, whatever computes with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from omlx_core.mlx_backend import backend_name, mx

_MAX_STREAMS = 8
_streams = threading.local()

ArraySpec = tuple[tuple[int, ...], mx.Dtype]
"""Shape and element type."""


def make_zeros(specs: Sequence[ArraySpec]) -> list[mx.array]:
    """Arrays of zeros for the CPU to write to, being filled: to be evaluated before. Only the MLX thread calls this.

    The first touch of memory costs more than a copy to it (on Linux, 250 ms per GB), and MLX gives none untouched. So
    each is filled by one of several threads: MLX has one per CPU stream.

    Args:
        specs: of each array.
    """
    if backend_name() == "metal":  # memory is shared there, and the GPU the fastest to fill it
        arrays = [mx.zeros(shape, dtype) for shape, dtype in specs]
    else:
        streams = _cpu_streams()
        arrays = [
            mx.zeros(shape, dtype, stream=streams[number % len(streams)]) for number, (shape, dtype) in enumerate(specs)
        ]
    mx.async_eval(arrays)
    return arrays


def _cpu_streams() -> list[mx.Stream]:
    """Those of this thread: MLX's streams belong to the thread that made them."""
    streams: list[mx.Stream] | None = getattr(_streams, "of_cpu", None)
    if streams is None:
        streams = [mx.new_stream(mx.cpu) for _ in range(min(_MAX_STREAMS, os.cpu_count() or 1))]
        _streams.of_cpu = streams
    return streams
