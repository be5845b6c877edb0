"""The one place that imports MLX first: ``from omlx_core.mlx_backend import mx``.

MLX's CPU wheels for Linux link the reference BLAS, which is some thirty times slower than OpenBLAS. The extra ``cpu``
brings an OpenBLAS; its ``cblas_*`` symbols take over if it is loaded globally before ``mlx.core``. ``OMLX_OPENBLAS=0``
keeps the reference BLAS, whose results don't depend on how many rows are multiplied at once: with it a generation
from a reused prefix equals one from scratch to the last bit.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from omlx_core.errors import MissingDependencyError

logger = logging.getLogger(__name__)

BackendName = Literal["metal", "cuda", "cpu", "cpu+openblas"]

# Wheels that ship OpenBLAS under its plain symbol names: the first is built for x86-64 only and needs the Fortran
# runtime beside it, the second finds that among the system's libraries.
_OPENBLAS_DISTRIBUTIONS = ("ngsolve-openblas", "cmeel-openblas")
_CUDA_DISTRIBUTIONS = ("mlx-cuda-12", "mlx-cuda-13")


def backend_name() -> BackendName:
    """What computes on MLX's default device; results of different backends differ in their last bits."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return "metal" if mx.metal.is_available() else "cuda"
    return "cpu+openblas" if _openblas is not None else "cpu"


def has_device_memory() -> bool:
    """Whether arrays are in memory of the GPU's own, which the CPU can't look at or write to without moving them.

    Where they aren't, writing to their memory is the fastest way to fill them. Where they are, to copy pieces and have
    the GPU join them was measured to be faster.
    """
    return backend_name() == "cuda"


def _installed_files(distribution: str) -> list[Path] | None:
    """The files of an installed distribution; None if it isn't installed."""
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return [Path(str(file.locate())) for file in files or ()]


def _load_openblas() -> ctypes.CDLL | None:
    """Put OpenBLAS in front of the reference BLAS that `mlx-cpu` links; None where that isn't wanted or possible."""
    mlx_files = _installed_files("mlx-cpu")
    if (
        sys.platform != "linux"
        or os.environ.get("OMLX_OPENBLAS") == "0"
        or mlx_files is None
        or any(_installed_files(name) is not None for name in _CUDA_DISTRIBUTIONS)
    ):
        return None
    libraries = [
        file
        for name in _OPENBLAS_DISTRIBUTIONS
        for file in _installed_files(name) or ()
        if file.name.startswith("libopenblas") and ".so" in file.name
    ]
    if not libraries:
        logger.warning("OpenBLAS isn't installed, prefill is slow: pip install 'omlx-plugins[cpu]'")
        return None
    if "mlx.core" in sys.modules:
        logger.warning(
            "mlx.core was imported before omlx_core, too late for OpenBLAS: prefill is slow. Import "
            "omlx_core.mlx_backend first, or set OMLX_OPENBLAS=0 if that is what you want"
        )
        return None
    try:
        return _load_beside_fortran_runtime(libraries[0], mlx_files)
    except OSError as exc:
        logger.warning(
            "OpenBLAS can't be loaded (%s), prefill is slow: reinstall omlx-plugins[cpu], or install your system's "
            "package of the library that it names",
            exc,
        )
        return None


def _load_beside_fortran_runtime(openblas: Path, mlx_files: list[Path]) -> ctypes.CDLL:
    """Load OpenBLAS with the Fortran runtime that `mlx-cpu` ships.

    OpenBLAS asks for ``libgfortran.so.5`` next to itself, and few machines have one. `mlx-cpu` does, under another
    name, so both are loaded from a folder of links, which is not needed any more once they are.
    """
    with tempfile.TemporaryDirectory(prefix="omlx-openblas-") as name:
        folder = Path(name)
        for file in mlx_files:
            if file.name.startswith("libgfortran"):
                (folder / "libgfortran.so.5").symlink_to(file)
            elif file.name.startswith("libquadmath"):
                (folder / file.name).symlink_to(file)
        link = folder / openblas.name
        link.symlink_to(openblas)
        return ctypes.CDLL(str(link), mode=ctypes.RTLD_GLOBAL)


def _limit_threads(openblas: ctypes.CDLL) -> None:
    """Use half of the cores, unless ``OPENBLAS_NUM_THREADS`` says otherwise.

    OpenBLAS's threads wait for each other by spinning. Where something else needs a core, as many threads as cores
    were seen to prefill seven times slower than half as many.
    """
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        openblas.openblas_set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))


def _import_mlx() -> Any:
    try:
        import mlx.core
    except ImportError as exc:
        if sys.platform == "linux":
            remedy = (
                "on Linux MLX needs a backend: pip install 'omlx-plugins[cpu]', or 'omlx-plugins[cuda13]' for an "
                "NVIDIA GPU ('omlx-plugins[cuda12]' with an older driver)"
            )
        elif sys.platform == "darwin":
            remedy = "MLX needs Apple silicon, macOS 14 or later and a native Python: pip install --upgrade mlx"
        else:
            remedy = f"MLX runs on macOS and Linux, not on {sys.platform}"
        raise MissingDependencyError(f"mlx.core can't be imported ({exc}): {remedy}") from exc
    return mlx.core


_openblas = _load_openblas()
if _openblas is not None:
    _limit_threads(_openblas)
mx = _import_mlx()
