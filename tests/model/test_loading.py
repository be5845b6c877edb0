from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx.utils import tree_flatten
from tiny_models import VOCAB_SIZE, tiny_llama, tiny_mamba

from omlx_core.errors import ModelLoadError, ModelNotFoundError
from omlx_core.model.loading import context_length, load_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole model on disk: tiny llama, one token per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "models" / "tiny-llama"
    folder.mkdir(parents=True)
    model = tiny_llama()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {key: value for key, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB_SIZE)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_loads_a_folder(model_folder: Path) -> None:
    loaded = load_model(model_folder)

    prompt = mx.array([loaded.tokenizer.encode("t5 t6 t7")])
    assert loaded.name == "tiny-llama"
    assert loaded.config["model_type"] == "llama"
    assert loaded.adapter_path is None
    assert mx.array_equal(loaded.model(prompt), tiny_llama()(mx.array([[5, 6, 7]])))


def test_names_the_model_alike_for_each_way_to_write_its_path(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    (model_folder.parent / "latest").symlink_to("tiny-llama")

    assert {load_model(path).name for path in ("tiny-llama", "./tiny-llama/", str(model_folder), "latest")} == {
        "tiny-llama"
    }


def _never(*args: Any, **kwargs: Any) -> None:
    pytest.fail("asked the hub")


@pytest.mark.parametrize(
    "path", ["./missing", "../missing", "~/missing", "/missing", "a/b/c", "missing/", "models/typo"]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(
    model_folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parents[1])
    monkeypatch.setattr("mlx_lm.utils.snapshot_download", _never)

    with pytest.raises(ModelNotFoundError, match=rf"no model folder '{path}': check the path"):
        load_model(path)


@pytest.mark.parametrize("repo_id", ["owner/model-4bit", "model"])
def test_a_repository_without_network_is_not_found(
    repo_id: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ModelNotFoundError, match=rf"'{repo_id}' is neither a folder here nor .*: check the name"):
        load_model(repo_id)


def test_a_folder_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")

    with pytest.raises(ModelNotFoundError, match="is a file: name a folder"):
        load_model(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"config.json": "{"}, "JSONDecodeError"),
        ({"config.json": '{"model_type": "unheard-of"}'}, "unheard-of not supported"),
        ({"model.safetensors": "garbage"}, "safetensors"),
        ({"model.safetensors": None}, "No safetensors found"),
    ],
)
def test_unreadable_files_are_named(model_folder: Path, damage: dict[str, str | None], reason: str) -> None:
    for name, content in damage.items():
        (model_folder / name).unlink()
        if content is not None:
            (model_folder / name).write_text(content)

    with pytest.raises(ModelLoadError, match=rf"tiny-llama' can't be loaded \(.*{reason}") as raised:
        load_model(model_folder)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapters.safetensors"])
def test_a_missing_adapter_is_named(model_folder: Path, tmp_path: Path, missing: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in {"adapter_config.json", "adapters.safetensors"} - {missing}:
        (adapter / name).touch()

    with pytest.raises(ModelNotFoundError, match=rf"adapter_path='.*' holds no {missing}"):
        load_model(model_folder, adapter_path=str(adapter))


def test_loads_an_adapter(model_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": lora}))
    name = "model.layers.1.self_attn.q_proj"
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {f"{name}.lora_a": mx.ones((64, 2)), f"{name}.lora_b": mx.ones((2, 64))},
    )

    loaded = load_model(model_folder, adapter_path=str(adapter))

    prompt = mx.array([[5, 6, 7]])
    assert loaded.adapter_path == str(adapter)
    assert not mx.array_equal(loaded.model(prompt), tiny_llama()(prompt))


@pytest.mark.parametrize(
    ("model", "config", "tokenizer", "expected"),
    [
        (tiny_llama, {"max_position_embeddings": 8192}, SimpleNamespace(model_max_length=77), 8192),
        (tiny_llama, None, None, 4096),
        (tiny_llama, {"max_position_embeddings": None}, None, 4096),
        (tiny_mamba, {"text_config": {"max_position_embeddings": 1024}}, None, 1024),
        (tiny_mamba, {"n_positions": 1024}, None, 1024),
        (tiny_mamba, {}, SimpleNamespace(model_max_length=2048), 2048),
        (tiny_mamba, {}, SimpleNamespace(model_max_length=int(1e30)), None),
        (tiny_mamba, None, None, None),
        (lambda: SimpleNamespace(args=SimpleNamespace(text_config={"n_ctx": 5})), None, None, 5),
    ],
)
def test_context_length_comes_from_the_config_then_the_arguments_then_the_tokenizer(
    model: Any, config: Any, tokenizer: Any, expected: int | None
) -> None:
    assert context_length(model(), config, tokenizer) == expected
