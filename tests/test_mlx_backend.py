from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omlx_core import mlx_backend
from omlx_core.errors import MissingDependencyError

LOAD = mlx_backend._load_beside_fortran_runtime
# macOS has no affinity; what needs this runs on Linux only.
HALF_OF_THE_CORES = max(1, len(os.sched_getaffinity(0)) // 2) if sys.platform == "linux" else 0
SHOW_BACKEND = "from omlx_core.mlx_backend import backend_name, mx; print(backend_name())"


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(name)
    return Path(spec.submodule_search_locations[0])


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


has_openblas = pytest.mark.skipif(
    sys.platform != "linux" or not _is_installed("mlx-cpu") or not _is_installed("ngsolve-openblas"),
    reason="needs MLX's CPU backend on Linux with OpenBLAS, as the extra 'cpu' installs them on x86-64",
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMLX_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@has_openblas
def test_openblas_answers_the_multiplications_of_mlx() -> None:
    multiply = f"{SHOW_BACKEND}; a = mx.ones((64, 64)); mx.eval(a @ a)"

    result = run_python(multiply, LD_DEBUG="bindings")

    bindings = [line for line in result.stderr.splitlines() if "libmlx" in line and "`cblas_sgemm'" in line]
    assert result.stdout == "cpu+openblas\n"
    assert bindings
    assert all(" to " in line and "libopenblas" in line.split(" to ")[1] for line in bindings)


@has_openblas
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, HALF_OF_THE_CORES), ({"OPENBLAS_NUM_THREADS": "2"}, 2)],
)
def test_openblas_takes_half_of_the_cores_unless_told_otherwise(environment: dict[str, str], expected: int) -> None:
    threads = "from omlx_core import mlx_backend as m; print(m._openblas.openblas_get_num_threads())"

    assert run_python(threads, **environment).stdout == f"{expected}\n"


@has_openblas
def test_the_switch_keeps_the_reference_blas() -> None:
    result = run_python(SHOW_BACKEND, OMLX_OPENBLAS="0")

    assert (result.stdout, result.stderr) == ("cpu\n", "")


@has_openblas
def test_says_once_that_mlx_was_imported_too_early_for_openblas() -> None:
    result = run_python(f"import mlx.core; {SHOW_BACKEND}; import omlx_core.mlx_backend")

    assert result.stdout == "cpu\n"
    assert result.stderr.count("too late for OpenBLAS") == 1


class TestChoiceOfOpenBLAS:
    """With invented installations; nothing is loaded into this process."""

    @pytest.fixture(autouse=True)
    def installation(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[Path]]:
        library = tmp_path / "libopenblas.so.0"
        library.write_bytes(b"no library")
        installed = {"mlx-cpu": [], "ngsolve-openblas": [library]}
        monkeypatch.setattr(mlx_backend, "_installed_files", installed.get)
        monkeypatch.setattr(mlx_backend, "_load_beside_fortran_runtime", lambda library, mlx_files: library)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
        monkeypatch.delenv("OMLX_OPENBLAS")
        return installed

    def test_is_made_for_the_cpu_backend(self, installation: dict[str, list[Path]]) -> None:
        assert mlx_backend._load_openblas() == installation["ngsolve-openblas"][0]

    @pytest.mark.parametrize("cuda", ["mlx-cuda-12", "mlx-cuda-13"])
    def test_is_none_beside_cuda(self, installation: dict[str, list[Path]], cuda: str) -> None:
        installation[cuda] = []

        assert mlx_backend._load_openblas() is None

    def test_is_none_outside_linux(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")

        assert mlx_backend._load_openblas() is None

    def test_warns_where_it_is_not_installed(
        self, installation: dict[str, list[Path]], caplog: pytest.LogCaptureFixture
    ) -> None:
        del installation["ngsolve-openblas"]

        assert mlx_backend._load_openblas() is None
        assert "pip install 'omlx-plugins[cpu]'" in caplog.text

    def test_is_none_with_a_warning_if_the_library_is_damaged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(mlx_backend, "_load_beside_fortran_runtime", LOAD)

        assert mlx_backend._load_openblas() is None
        assert "OpenBLAS can't be loaded" in caplog.text


@pytest.mark.parametrize(
    ("platform", "remedy"),
    [
        ("linux", r"pip install 'omlx-plugins\[cpu\]', or 'omlx-plugins\[cuda13\]'"),
        ("darwin", "pip install --upgrade mlx"),
        ("win32", "MLX runs on macOS and Linux, not on win32"),
    ],
)
def test_missing_mlx_is_named_with_the_platforms_remedy(
    monkeypatch: pytest.MonkeyPatch, platform: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setattr(sys, "platform", platform)

    with pytest.raises(MissingDependencyError, match=remedy):
        mlx_backend._import_mlx()


MODULES = sorted(path for package in ("omlx_core", "omlx_plugins") for path in _package_folder(package).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(path.parts[-3:]))
def test_every_module_puts_openblas_in_place_before_it_imports_mlx(path: Path) -> None:
    if path.name == "mlx_backend.py":
        return
    is_in_place = False
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        is_in_place = is_in_place or "omlx_core.mlx_backend" in names
        imports_mlx = any(name.split(".")[0] in ("mlx", "mlx_lm") for name in names)
        assert is_in_place or not imports_mlx, f"line {node.lineno}"


@has_openblas
def test_the_engine_and_the_adapters_compute_with_openblas() -> None:
    entrances = "from omlx_plugins.langchain import ChatOMLX; from omlx_core import Engine; Engine; "

    assert run_python(entrances + SHOW_BACKEND).stdout == "cpu+openblas\n"
