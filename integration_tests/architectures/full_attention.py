"""Architectures whose every layer keeps the keys and values of all tokens, and computes densely."""

from __future__ import annotations

from integration_tests.architectures.shared import VOCAB_SIZE, Config, config

_GPT: Config = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 128,
    "n_ctx": 4096,
    "n_positions": 4096,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": VOCAB_SIZE,
}

FULL_ATTENTION: dict[str, Config] = {
    # Two layers that keep keys and values, two that reuse those of the last one.
    "afm7": config(hidden_dim=64, num_layers=4, num_kv_reuse_layers=2, num_heads=4, num_kv_heads=2),
    "apertus": config(post_norm=False, qk_norm=True),
    "cohere": config(use_qk_norm=True, logit_scale=1.0),
    "ernie4_5": config(use_bias=False),
    "exaone": config(num_layers=2, layer_norm_epsilon=1e-5),
    "gemma": config(),
    "gemma2": config(query_pre_attn_scalar=16.0),
    "glm": config(),
    "glm4": config(partial_rotary_factor=0.5),
    "gpt2": config(_GPT, num_key_value_heads=None),
    "gpt_bigcode": config(_GPT, num_key_value_heads=None),
    "gpt_neox": config(rotary_emb_base=10000, rotary_pct=0.25, num_key_value_heads=None),
    "gptj": config(_GPT, rotary_dim=8),
    "granite": config(logits_scaling=2.0, attention_multiplier=0.25, embedding_multiplier=4.0, residual_multiplier=0.5),
    "helium": config(),
    "hunyuan_v1_dense": config(rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 100.0}),
    "internlm2": config(),
    "internlm3": config(),
    "lille-130m": config(_GPT, block_size=4096, n_kv_heads=2),
    "mimo": config(),
    "minicpm": config(dim_model_base=32, scale_depth=1.4, scale_emb=2.0),
    # Each layer runs twice, with keys and values of its own each time.
    "nanbeige": config(num_loops=2),
    "nanochat": config(),
    "nemotron": config(hidden_act="relu2", norm_eps=1e-5),
    # A layer without attention has no cache; one without a feed-forward network has.
    "nemotron-nas": config(
        num_hidden_layers=4,
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    ),
    "olmo2": config(),
    "openelm": config(
        num_transformer_layers=2,
        model_dim=64,
        ffn_dim_divisor=16,
        num_query_heads=[2, 4],
        num_kv_heads=[1, 2],
        ffn_multipliers=[1.0, 1.5],
        share_input_output_layers=False,
    ),
    "phi": config(num_key_value_heads=4, partial_rotary_factor=0.5),
    "phi3": config(),
    # The tokens that it never generates are numbers in its code; with a smaller vocabulary it writes past the logits.
    # Every other layer is block-sparse.
    "phi3small": config(
        hidden_size=32,
        vocab_size=100352,
        num_attention_heads=2,
        num_key_value_heads=1,
        dense_attention_every_n_layers=2,
        ff_intermediate_size=48,
        gegelu_limit=20.0,
        layer_norm_epsilon=1e-5,
        mup_embedding_multiplier=1.0,
        mup_width_multiplier=1.0,
    ),
    "plamo": config(n_shared_head=2),
    "qwen": config(kv_channels=16, layer_norm_epsilon=1e-5, intermediate_size=192),
    "qwen2": config(),
    "qwen3": config(),
    "seed_oss": config(),
    # Every fourth layer goes without rotary positions.
    "smollm3": config(num_hidden_layers=4),
    "stablelm": config(use_qkv_bias=True, partial_rotary_factor=0.5, qk_layernorm=True),
    "starcoder2": config(norm_epsilon=1e-5),
    "talkie": config(),
    "telechat3": config(),
}
