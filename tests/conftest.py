"""What every test starts from: reproducible arithmetic, no settings of the user's, no network."""

from __future__ import annotations

import os

# Before anything imports MLX: with the reference BLAS, equal work gives equal bits.
os.environ["OMLX_OPENBLAS"] = "0"

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from llama_index_leftovers import llama_index_leaves_nothing  # noqa: F401 - a fixture

# A merge must not depend on luck; at a desk, new examples are tried each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hide the user's ``OMLX_*`` settings and cache folder; returns the one used instead."""
    for name in list(os.environ):
        if name.startswith("OMLX_") and name != "OMLX_OPENBLAS":
            monkeypatch.delenv(name)
    cache_dir = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(cache_dir))
    return cache_dir


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse names and addresses; the socket pairs of event loops need neither."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(f"tests run without network, this one asks for {args[-1]!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
