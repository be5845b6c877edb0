"""The real model, fetched once, and processes of its own for whatever needs one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_index_leftovers import llama_index_leaves_nothing  # noqa: F401 - a fixture

from integration_tests.architectures.page import PageWriter
from omlx_core.engine.shared import close_shared_engines
from omlx_core.model.sample_model import ensure_sample_model

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # With xdist, the reports of all workers come together in the process that has no `workerinput`.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(PageWriter(ROOT / "docs" / "architectures.md"))


@pytest.fixture(scope="session")
def sample_model() -> str:
    return str(ensure_sample_model(progress=False))


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OMLX_"):
            monkeypatch.delenv(name)


@pytest.fixture
def shared_engines():
    """Closes what the adapters have loaded."""
    yield
    close_shared_engines()


@pytest.fixture(scope="session")
def document() -> str:
    return (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")[:2000]


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a new process whose user cache folder is a temporary one."""

    def run(
        *arguments: str, stdin: str = "", timeout_s: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **home, **environment},
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
