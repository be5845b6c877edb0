"""Importing what only an extra brings."""

from __future__ import annotations

import importlib
from typing import Any

from omlx_core.errors import MissingDependencyError


def import_with_extra(module_name: str, attribute: str, *, extra: str, package: str) -> Any:
    """Import an attribute of a module that needs a package of an extra.

    Args:
        module_name: the module to import.
        attribute: its attribute.
        extra: the extra of this distribution that brings the package.
        package: the package's top-level import name.

    Raises:
        MissingDependencyError: the package isn't installed.
    """
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != package:
            raise  # something else is missing, and the extra would not bring it
        raise MissingDependencyError(
            f"{attribute} needs the package {package!r}, which isn't installed: pip install 'omlx-plugins[{extra}]'"
        ) from exc
