"""Architectures with multi-head latent attention: per token one latent and one rotary key, of different widths."""

from __future__ import annotations

from integration_tests.architectures.shared import EXPERTS, LATENT, WINDOW, Config, config

_YARN: Config = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# An index that picks fewer tokens than a prompt has.
_SPARSE: Config = {"index_head_dim": 16, "index_n_heads": 4, "index_topk": 40}

_LONGCAT = config(
    LATENT,
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=2,
    ffn_hidden_size=96,
    moe_topk=2,
    expert_ffn_hidden_size=32,
    n_routed_experts=4,
    num_layers=2,
    routed_scaling_factor=1.5,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)

LATENT_ATTENTION: dict[str, Config] = {
    "deepseek_v2": config(EXPERTS, LATENT, rope_scaling=_YARN, topk_method="greedy"),
    "deepseek_v3": config(EXPERTS, LATENT, topk_method="noaux_tc"),
    # Sparse attention: beside the latent, each layer caches the keys of its index.
    "deepseek_v32": config(EXPERTS, LATENT, _SPARSE, topk_method="noaux_tc"),
    # A window in every layer, and above it tokens compressed one to one or four to one. The layers, from below: only
    # the window; a source of 1:1; a source of 4:1 that also picks candidate blocks; one that picks among those; one
    # that takes over what was picked.
    "deepseek_v41": config(
        EXPERTS,
        num_hidden_layers=5,
        head_dim=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        o_groups=2,
        o_lora_rank=16,
        sliding_window=WINDOW,
        compress_ratios=[0, 1, 4, 4, 4],
        kv_source_layer_ids=[1, 2],
        index_source_layer_ids=[1, 2, 3],
        candidate_source_layer_id=2,
        candidate_topk_blocks=6,
        candidate_block_size=4,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=16,
        hc_mult=2,
        hc_sinkhorn_iters=4,
    ),
    "glm4_moe_lite": config(EXPERTS, LATENT, topk_method="noaux_tc"),
    "glm_moe_dsa": config(
        EXPERTS,
        LATENT,
        _SPARSE,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    ),
    "longcat_flash": _LONGCAT,
    # Its embedding looks at the tokens before, so that it has a cache as well.
    "longcat_flash_ngram": config(_LONGCAT, ngram_vocab_size_ratio=2, emb_neighbor_num=3, emb_split_num=2),
    "minicpm3": config(
        LATENT,
        dim_model_base=32,
        scale_depth=1.4,
        scale_emb=2.0,
        rope_scaling={"original_max_position_embeddings": 1024, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    ),
    "mistral4": config(EXPERTS, LATENT, rope_parameters=_YARN),
    "youtu_llm": config(LATENT),
}
