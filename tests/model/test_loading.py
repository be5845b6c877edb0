from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx.utils import tree_flatten
from model_folders import save_model_folder
from tiny_models import tiny_llama, tiny_mamba

from omlx_core.errors import ModelLoadError, ModelNotFoundError
from omlx_core.model import load_progress
from omlx_core.model.load_progress import LoadProgress, load_progress_bar
from omlx_core.model.loading import context_length, estimate_size_bytes, load_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A whole model on disk: tiny llama, one token per id."""
    return save_model_folder(tmp_path / "models" / "tiny-llama", tiny_llama())


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


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter for one layer of the model."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": lora}))
    name = "model.layers.1.self_attn.q_proj"
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {f"{name}.lora_a": mx.ones((64, 2)), f"{name}.lora_b": mx.ones((2, 64))},
    )
    return adapter


def test_loads_an_adapter(model_folder: Path, adapter: Path) -> None:
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


# Size and progress


def test_a_models_size_is_that_of_its_weights(model_folder: Path) -> None:
    weights = tree_flatten(tiny_llama().parameters())

    assert load_model(model_folder).size_bytes == sum(weight.nbytes for _, weight in weights)


def test_an_array_that_is_held_twice_counts_once(model_folder: Path) -> None:
    loaded = load_model(model_folder)
    size_bytes = loaded.size_bytes

    loaded.model.model.copy_of_a_reference = loaded.model.model.embed_tokens.weight

    assert loaded.size_bytes == size_bytes


def test_the_estimate_is_the_size_of_the_files_that_are_read(model_folder: Path, adapter: Path) -> None:
    (model_folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    size_bytes = (model_folder / "model.safetensors").stat().st_size

    assert estimate_size_bytes(model_folder) == size_bytes
    assert size_bytes >= load_model(model_folder).size_bytes
    adapter_bytes = (adapter / "adapters.safetensors").stat().st_size
    assert estimate_size_bytes(model_folder, str(adapter)) == size_bytes + adapter_bytes


def test_the_estimate_of_a_repository_is_that_of_its_downloaded_files(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        assert options["local_files_only"]
        return str(model_folder)

    monkeypatch.setattr("mlx_lm.utils.snapshot_download", snapshot_download)

    assert estimate_size_bytes("owner/model-4bit") == (model_folder / "model.safetensors").stat().st_size


def test_a_repository_that_is_not_here_has_no_estimate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert estimate_size_bytes("owner/model-4bit") is None


def test_a_missing_folder_has_no_estimate_but_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        estimate_size_bytes(tmp_path / "missing")


def test_progress_counts_the_bytes_read_up_to_the_models_size(model_folder: Path) -> None:
    reports: list[LoadProgress] = []

    size_bytes = load_model(model_folder, on_progress=reports.append).size_bytes

    assert {(report.model, report.total_bytes) for report in reports} == {(str(model_folder), size_bytes)}
    assert [report.phase for report in reports] == ["reading"] * (len(reports) - 1) + ["ready"]
    read_bytes = [report.read_bytes for report in reports]
    assert read_bytes[0] == 0
    assert read_bytes == sorted(read_bytes)
    assert read_bytes[-2:] == [size_bytes, size_bytes]
    # Large arrays one by one, small ones together.
    assert 5 < len(set(read_bytes)) <= len(tree_flatten(tiny_llama().parameters())) - 3


def test_weights_are_in_memory_when_progress_says_so(model_folder: Path) -> None:
    active_bytes: list[tuple[int, int]] = []
    before_bytes = mx.get_active_memory()

    load_model(
        model_folder,
        on_progress=lambda report: active_bytes.append((report.read_bytes, mx.get_active_memory() - before_bytes)),
    )

    assert len(active_bytes) > 5
    # Small arrays come in whole buffers, so a little more is in use than was read; arrays yet to be read aren't.
    assert all(read_bytes <= in_use_bytes < read_bytes + 64 * 1024 for read_bytes, in_use_bytes in active_bytes)


def test_progress_says_that_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reports: list[LoadProgress] = []

    with pytest.raises(ModelNotFoundError):
        load_model("owner/model-4bit", on_progress=reports.append)

    assert reports == [LoadProgress("owner/model-4bit", "downloading")]


@pytest.mark.parametrize("phase", ["reading", "ready"])
def test_what_a_listener_raises_gives_the_load_up(model_folder: Path, phase: str) -> None:
    def give_up(report: LoadProgress) -> None:
        if report.phase == phase:
            raise TimeoutError("took too long")

    with pytest.raises(TimeoutError, match="took too long"):
        load_model(model_folder, on_progress=give_up)


def test_a_weight_that_cannot_be_read_is_an_error_of_the_model(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"

    def cut(report: LoadProgress) -> None:  # the header was read, the weights weren't
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)

    with pytest.raises(ModelLoadError, match="tiny-llama' can't be loaded"):
        load_model(model_folder, on_progress=cut)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_the_bytes_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    monkeypatch.setattr(load_progress, "tqdm", functools.partial(load_progress.tqdm, mininterval=0))

    with load_progress_bar() as show:
        show(LoadProgress("some/model", "downloading"))
        for read_bytes in (0, 1000, 3000):
            show(LoadProgress("some/model", "reading", read_bytes, 4000))
        shown = terminal.getvalue()

    assert "Loading some/model" in shown
    assert all(part in shown for part in ("0.00/4.00k", "1.00k/4.00k", "3.00k/4.00k"))
    assert terminal.getvalue().endswith("\r")


def test_the_bar_of_a_failed_load_is_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())

    def load() -> None:
        with load_progress_bar() as show:
            show(LoadProgress("some/model", "reading", 0, 4000))
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        load()

    assert terminal.getvalue().endswith("\r")


def test_without_a_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", output := io.StringIO())

    with load_progress_bar() as show:
        show(LoadProgress("some/model", "reading", 0, 4000))

    assert output.getvalue() == ""
