"""What MLX doesn't ask of CUDA's driver: to move memory to the GPU ahead of its use.

Memory that a CPU and an NVIDIA GPU share is moved page by page when the other side touches it: 9 GB/s to an H100, and
40 GB/s when all of it is moved at once (`benchmarks/whole_requests.py`, SSD-warm). It is a hint: where it can't be
given, the pages move when they are needed.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading

import numpy as np

logger = logging.getLogger(__name__)

_IS_MANAGED = 8  # of CUpointer_attribute
_NON_BLOCKING = 1  # of CUstream_flags: MLX's streams must not wait for this one


class CudaDriver:
    """Some functions of ``libcuda``, whose signatures have been the same since CUDA 8.

    Args:
        library: the driver.
        ordinal: which GPU to move memory to.

    Raises:
        OSError: the driver has no such GPU.
    """

    def __init__(self, library: ctypes.CDLL, ordinal: int) -> None:
        self._library = library
        self._device = ctypes.c_int()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._thread = threading.local()
        self._check("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(ordinal))
        # The one that MLX uses; it stays as long as the process.
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._enter()
        self._check("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    def prefetch(self, memory: np.ndarray) -> None:
        """Begin to move memory to the GPU.

        Raises:
            OSError: it isn't memory that CUDA manages, or the driver refuses.
        """
        self._enter()
        address, managed = ctypes.c_uint64(memory.ctypes.data), ctypes.c_int()
        self._check("cuPointerGetAttribute", ctypes.byref(managed), ctypes.c_int(_IS_MANAGED), address)
        if not managed.value:
            raise OSError("the memory isn't managed by CUDA")
        self._check("cuMemPrefetchAsync", address, ctypes.c_size_t(memory.nbytes), self._device, self._stream)

    def _enter(self) -> None:
        """Contexts belong to threads."""
        if not getattr(self._thread, "has_context", False):
            self._check("cuCtxSetCurrent", self._context)
            self._thread.has_context = True

    def _check(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            raise OSError(f"{name} failed with CUresult {result}")


@functools.cache
def _driver() -> CudaDriver | None:
    try:
        return CudaDriver(ctypes.CDLL("libcuda.so.1"), 0)  # MLX computes on the first GPU that it is shown
    except (OSError, AttributeError) as exc:
        logger.debug("memory isn't moved to the GPU ahead of its use: %s", exc)
        return None


def prefetch(memory: np.ndarray) -> bool:
    """Begin to move memory to the GPU, if that can be asked for; any thread may call this.

    Args:
        memory: of an MLX array, to be read by the GPU next.

    Returns:
        Whether it was asked for.
    """
    driver = _driver()
    if driver is None or not memory.nbytes:
        return False
    try:
        driver.prefetch(memory)
    except OSError as exc:
        logger.debug("memory is not moved to the GPU ahead of its use: %s", exc)
        return False
    return True
