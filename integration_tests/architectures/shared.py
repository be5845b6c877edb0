"""What the tables share: ordinary sizes under their usual names, and the blocks that whole families add to them."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VOCAB_SIZE = 512
# No multiple of a usual block size, and shorter than the prompts that run through it.
WINDOW = 48

# The keys of most config.json files. An architecture reads those that it knows; `ModelArgs.from_dict` drops the rest.
_ORDINARY: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

# A router over a few experts, under every name that occurs for the same thing.
EXPERTS: Config = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
}

# Multi-head latent attention: the cache holds a latent and a rotary part, of different widths.
LATENT: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

# The gated delta rule of the Qwen 3 hybrids.
GATED_DELTA: Config = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}


def config(*blocks: Config, **keys: Any) -> Config:
    """The ordinary sizes, then ``blocks``, then ``keys``, the later over the earlier."""
    merged = dict(_ORDINARY)
    for block in (*blocks, keys):
        merged.update(block)
    return merged


def layer_types(pattern: str) -> list[str]:
    """The words that config.json files use for the kinds of layers, one a letter of ``pattern``."""
    words = {
        "f": "full_attention",
        "s": "sliding_attention",
        "l": "linear_attention",
        "m": "mamba",
        "a": "attention",
        "c": "conv",
        "x": "conv_mixer",
    }
    return [words[letter] for letter in pattern]
