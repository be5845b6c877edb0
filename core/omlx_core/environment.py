"""What a measurement has to say of where it was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omlx_core.mlx_backend import backend_name, mx

_DISTRIBUTIONS = ("omlx-plugins", "mlx", "mlx-lm", "numpy")


def describe_environment() -> dict[str, Any]:
    """The machine, its load in the minute before, what computes on it, and the versions of what is measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": mx.device_info().get("device_name", "CPU"),
        "backend": backend_name(),
        "load": None if load is None else round(load, 2),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _DISTRIBUTIONS}},
    }


def _version(distribution: str) -> str | None:
    """None where it can be imported without being installed, as from a checkout."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
