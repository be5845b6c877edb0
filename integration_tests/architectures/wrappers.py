"""Wrappers of a text model of another table: vision-language models without their towers, and one packed format."""

from __future__ import annotations

from integration_tests.architectures.experts import MIXTURES
from integration_tests.architectures.full_attention import FULL_ATTENTION
from integration_tests.architectures.latent_attention import LATENT_ATTENTION
from integration_tests.architectures.recurrent import RECURRENT
from integration_tests.architectures.shared import EXPERTS, GATED_DELTA, VOCAB_SIZE, Config, config
from integration_tests.architectures.windows import WINDOWED


def _wrapped(text_config: Config, text_type: str) -> Config:
    return {"vocab_size": VOCAB_SIZE, "text_config": {"model_type": text_type, **text_config}}


WRAPPERS: dict[str, Config] = {
    "gemma3": _wrapped(WINDOWED["gemma3_text"], "gemma3_text"),
    "gemma4": _wrapped(WINDOWED["gemma4_text"], "gemma4_text"),
    "kimi_k25": _wrapped(LATENT_ATTENTION["deepseek_v3"], "deepseek_v3"),
    "kimi_vl": _wrapped(LATENT_ATTENTION["deepseek_v3"], "deepseek_v3"),
    "lfm2-vl": _wrapped(RECURRENT["lfm2"], "lfm2"),
    # Blocks of eight tokens, of which a query sees at most five; only sparse layers cache keys of the index.
    "minimax_m3_vl": _wrapped(
        config(
            EXPERTS,
            num_hidden_layers=3,
            dense_intermediate_size=96,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            index_n_heads=2,
            index_head_dim=16,
            index_block_size=8,
            index_topk_blocks=5,
        ),
        "minimax_m3",
    ),
    "mistral3": _wrapped(WINDOWED["ministral3"], "ministral3"),
    "pixtral": _wrapped(WINDOWED["llama"], "mistral"),
    # Two bits a weight; widths must be multiples of 128, and of the block where the input is rotated.
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": "model.embed_tokens", "embedding": True, "dtype": "float16", "block": 0},
            *(
                {"path": f"model.layers.{index}.mlp.{name}", "embedding": False, "dtype": "float16", "block": block}
                for index in range(4)
                for name, block in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 512))
            ),
        ],
        "text_config": config(
            GATED_DELTA, num_hidden_layers=4, hidden_size=128, intermediate_size=512, full_attention_interval=4
        ),
    },
    "qwen2_vl": _wrapped(FULL_ATTENTION["qwen2"], "qwen2"),
    "qwen3_vl": _wrapped(FULL_ATTENTION["qwen3"], "qwen3"),
    "qwen3_vl_moe": _wrapped(MIXTURES["qwen3_moe"], "qwen3_moe"),
}
