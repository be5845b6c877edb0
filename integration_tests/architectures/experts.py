"""Architectures that keep the keys and values of all tokens, and send each token to a few experts."""

from __future__ import annotations

from integration_tests.architectures.shared import EXPERTS, VOCAB_SIZE, Config, config

MIXTURES: dict[str, Config] = {
    "Klear": config(EXPERTS),
    "bailing_moe": config(EXPERTS, use_qk_norm=True),
    "dbrx": config(
        d_model=64,
        n_layers=2,
        n_heads=4,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek": config(EXPERTS),
    "dots1": config(EXPERTS, scoring_func="sigmoid"),
    "ernie4_5_moe": config(
        use_bias=False,
        moe_num_experts=4,
        moe_layer_start_index=1,
        moe_intermediate_size=32,
        moe_k=2,
        moe_num_shared_experts=1,
    ),
    "glm4_moe": config(EXPERTS, use_qk_norm=True, partial_rotary_factor=0.5),
    "granitemoe": config(
        EXPERTS, logits_scaling=2.0, attention_multiplier=0.25, embedding_multiplier=4.0, residual_multiplier=0.5
    ),
    # Every other layer attends to the keys and values of the one before it, and caches them once more.
    "hunyuan": config(
        EXPERTS,
        num_hidden_layers=4,
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 100.0},
    ),
    "llama4_text": config(num_hidden_layers=4, intermediate_size_mlp=96, no_rope_layers=[1, 1, 1, 0], use_qk_norm=True),
    "minimax": config(EXPERTS, rotary_dim=8),
    "mixtral": config(EXPERTS),
    "olmoe": config(EXPERTS),
    "phimoe": config(
        EXPERTS,
        rope_scaling={
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    ),
    "phixtral": config(EXPERTS, num_vocab=VOCAB_SIZE, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8),
    "qwen2_moe": config(EXPERTS),
    "qwen3_moe": config(EXPERTS),
    "solar_open": config(EXPERTS, partial_rotary_factor=1.0),
}
