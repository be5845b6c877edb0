"""Architectures in which some layers see only the last tokens: sliding windows and chunks."""

from __future__ import annotations

from integration_tests.architectures.shared import EXPERTS, VOCAB_SIZE, WINDOW, Config, config, layer_types

_ROPE_BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def _windowed(pattern: str, *blocks: Config, **keys: object) -> Config:
    """A layer a letter of ``pattern``, s for sliding and f for full attention."""
    return config(
        {"num_hidden_layers": len(pattern), "layer_types": layer_types(pattern), "sliding_window": WINDOW},
        *blocks,
        keys,
    )


WINDOWED: dict[str, Config] = {
    "afmoe": _windowed("ssf", EXPERTS, num_dense_layers=1),
    "cohere2": _windowed("sfsf", sliding_window_pattern=2, logit_scale=1.0),
    "exaone4": _windowed("ssf", sliding_window_pattern="LLG"),
    "exaone_moe": _windowed("ssf", EXPERTS, is_moe_layer=[False, True, True]),
    "gemma3_text": _windowed("ssfssf", sliding_window_pattern=3, query_pre_attn_scalar=16.0),
    # The last two layers attend to the keys and values of the last earlier layer of their type: no cache of their own.
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": _windowed(
            "sfsfsf",
            model_type="gemma3n_text",
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            rope_local_base_freq=10000.0,
            final_logit_softcapping=30.0,
            activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
            hidden_size_per_layer_input=16,
            altup_num_inputs=2,
            altup_coef_clip=120.0,
            altup_correct_scale=True,
            altup_active_idx=0,
            laurel_rank=8,
        ),
    },
    "gemma4_text": _windowed(
        "sfsfsf",
        EXPERTS,
        num_kv_shared_layers=2,
        global_head_dim=32,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB_SIZE,
        enable_moe_block=True,
        top_k_experts=2,
    ),
    "gpt_oss": _windowed("sf", EXPERTS),
    # Each layer runs twice: the second pass has a window of its own and also sees the keys of the first.
    "iquestloopcoder": config(loop_window_size=WINDOW),
    "laguna": _windowed("ssf", EXPERTS, rope_parameters=_ROPE_BY_TYPE),
    "llama": _windowed("sf"),
    "llama4": {
        "model_type": "llama4",
        "text_config": config(
            EXPERTS,
            model_type="llama4_text",
            num_hidden_layers=4,
            attention_chunk_size=WINDOW,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=96,
            use_qk_norm=True,
            num_experts_per_tok=1,
        ),
    },
    "mellum": _windowed("sf", EXPERTS, rope_parameters=_ROPE_BY_TYPE),
    "mimo_v2_flash": config(
        EXPERTS,
        num_hidden_layers=3,
        hybrid_layer_pattern=[0, 1, 1],
        moe_layer_freq=[0, 1, 1],
        sliding_window_size=WINDOW,
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        layernorm_epsilon=1e-5,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        v_head_dim=12,
        swa_head_dim=16,
        swa_v_head_dim=12,
        partial_rotary_factor=0.5,
    ),
    "ministral3": _windowed(
        "sf",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    ),
    "muse_glimmer": _windowed("sssf", output_multiplier=1.0),
    "olmo3": _windowed("ssf"),
    "plamo3": _windowed("sfsf", sliding_window_pattern=2),
    "spark2_5": _windowed("sssf", rope_parameters=_ROPE_BY_TYPE),
    "step3p5": _windowed(
        "fssf",
        num_attention_groups=2,
        attention_other_setting={"num_attention_heads": 8, "num_attention_groups": 4},
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        moe_layers_enum="1,2,3",
    ),
}
