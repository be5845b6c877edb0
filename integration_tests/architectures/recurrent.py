"""Architectures in which some or all layers keep a state of fixed size instead of tokens."""

from __future__ import annotations

from integration_tests.architectures.shared import (
    EXPERTS,
    GATED_DELTA,
    LATENT,
    WINDOW,
    Config,
    config,
    layer_types,
)

_BAILING: Config = {
    "layer_group_size": 2,
    "group_norm_size": 2,
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "num_hidden_layers": 4,
}

# The second layer has latent attention: what it rounds otherwise reaches the states of the layers after it.
_KIMI: Config = {
    "num_hidden_layers": 4,
    "linear_attn_config": {
        "kda_layers": [1, 3, 4],
        "num_heads": 2,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}

_LFM2: Config = {
    "num_hidden_layers": 4,
    "layer_types": layer_types("ccfc"),
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
}

RECURRENT: dict[str, Config] = {
    # Convolutions over keys and values beside every attention, which is full or windowed.
    "baichuan_m1": config(num_hidden_layers=3, sliding_window=WINDOW, sliding_window_layers=[0, 1], conv_window=2),
    "bailing_hybrid": config(EXPERTS, LATENT, _BAILING),
    "bailing_moe_linear": config(EXPERTS, _BAILING),
    "bailing_moe_v3": config(EXPERTS, LATENT, _BAILING),
    "falcon_h1": config(
        mamba_d_conv=4,
        mamba_d_head=16,
        mamba_d_ssm=64,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_n_heads=4,
        mamba_chunk_size=32,
    ),
    # All three kinds: full attention, a window, a convolution.
    "gear": config(num_hidden_layers=4, layer_types=layer_types("xsfx"), sliding_window=WINDOW, conv_L_cache=3),
    "granitemoehybrid": config(
        EXPERTS,
        num_hidden_layers=3,
        layer_types=layer_types("mam"),
        logits_scaling=2.0,
        attention_multiplier=0.25,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_proj_bias=False,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=1,
        mamba_conv_bias=True,
    ),
    "jamba": config(
        EXPERTS,
        num_hidden_layers=4,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=8,
        mamba_expand=2,
    ),
    "kimi_k3": {
        "model_type": "kimi_k3",
        "text_config": config(EXPERTS, LATENT, _KIMI, attn_res_block_size=2, mla_use_output_gate=True),
    },
    "kimi_linear": config(EXPERTS, LATENT, _KIMI, model_max_length=4096),
    "lfm2": config(
        _LFM2,
        block_dim=64,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2_moe": config(EXPERTS, _LFM2, use_expert_bias=True, num_dense_layers=1),
    "mamba": config(
        intermediate_size=128, state_size=8, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=4
    ),
    "mamba2": config(
        intermediate_size=128,
        num_heads=8,
        head_dim=16,
        state_size=16,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=[0.0, float("inf")],
        time_step_rank=4,
    ),
    # Layers of experts and of plain networks have no cache.
    "nemotron_h": config(
        EXPERTS,
        hybrid_override_pattern=["M", "E", "*", "-", "M"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=1,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
    ),
    "olmo_hybrid": config(
        GATED_DELTA,
        num_hidden_layers=4,
        layer_types=layer_types("lllf"),
        linear_num_key_heads=4,
        linear_allow_neg_eigval=True,
    ),
    "plamo2": config(
        num_hidden_layers=4,
        hidden_size_per_head=16,
        full_attention_idx=[1, 3],
        mamba_d_state=16,
        mamba_num_heads=4,
        mamba_step=2,
    ),
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": config(GATED_DELTA, num_hidden_layers=4, full_attention_interval=4),
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": config(EXPERTS, GATED_DELTA, num_hidden_layers=4, full_attention_interval=4),
    },
    "qwen3_next": config(
        EXPERTS, GATED_DELTA, num_hidden_layers=4, full_attention_interval=4, partial_rotary_factor=0.25
    ),
    # Recurrent, recurrent, window, recurrent.
    "recurrent_gemma": config(
        num_hidden_layers=4,
        block_types=["recurrent", "recurrent", "attention"],
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
    ),
    "rwkv7": config(norm_eps=1e-5, a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8),
}
