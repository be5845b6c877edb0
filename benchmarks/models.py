"""The models that the benchmarks run: random weights in the shapes of known models, and small ones of each family.

Nothing here needs more than MLX and mlx-lm, so that the large shapes run where little else is installed.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from omlx_core.mlx_backend import mx

from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

_CONTEXT_TOKENS = 1 << 20  # no shape's own limit gets in the way of a length

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 8192,
    "max_position_embeddings": _CONTEXT_TOKENS,
}
_QWEN3 = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "max_position_embeddings": _CONTEXT_TOKENS,
}
_QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
}

SHAPES: dict[str, dict[str, Any]] = {
    # Full attention, windows, recurrent layers: four to eight layers each, for a CPU.
    "small-full": {"model_type": "qwen3", **_SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "small-windowed": {
        "model_type": "gemma3_text",
        **_SMALL,
        "num_hidden_layers": 6,
        "sliding_window": 512,
        "sliding_window_pattern": 3,
    },
    "small-hybrid": {
        **_QWEN3_NEXT,
        **_SMALL,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    # So small that Python is most of a step.
    "minimal": {
        "model_type": "qwen3",
        **_SMALL,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 256,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "gemma3-12b": {
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "num_hidden_layers": 48,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 262208,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "max_position_embeddings": _CONTEXT_TOKENS,
    },
    # 64 of its 512 experts: 160 GB would fit no single GPU, and what a token computes or caches stays the same.
    "qwen3-next": {
        **_QWEN3_NEXT,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e7,
        "vocab_size": 151936,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "tie_word_embeddings": False,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
}
# `RowsModel`: what it computes grows with the tokens alone.
LINEAR = "linear"
SAMPLE_MODEL = "smollm2"
FAMILIES = ("small-full", "small-windowed", "small-hybrid")


class RowsModel(nn.Module):
    """Fills its caches as a transformer does, and looks only at the rows of the tokens at hand.

    Attention takes a time that grows with the square of a prompt and hides what else does. A kilobyte per token.
    """

    NUM_HEADS = 2
    HEAD_DIM = 32

    def __init__(self) -> None:
        super().__init__()
        size = self.NUM_HEADS * self.HEAD_DIM
        self.args = SimpleNamespace(vocab_size=1024, max_position_embeddings=_CONTEXT_TOKENS)
        self.embedding = nn.Embedding(self.args.vocab_size, size)
        self.layers = [nn.Linear(size, size, bias=False) for _ in range(2)]

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        batch_size, length = inputs.shape
        hidden = self.embedding(inputs)
        for layer, layer_cache in zip(self.layers, cache or [], strict=False):
            rows = layer(hidden).reshape(batch_size, length, self.NUM_HEADS, self.HEAD_DIM).transpose(0, 2, 1, 3)
            _, values = layer_cache.update_and_fetch(rows, rows)
            hidden = hidden + values[:, :, -length:].transpose(0, 2, 1, 3).reshape(batch_size, length, -1)
        return self.embedding.as_linear(hidden)


def vocab_size(model: Any) -> int:
    return int(model.args.vocab_size)


def build(shape: str, *, layers: int | None = None, vocab_size: int | None = None, seed: int = 0) -> Any:
    """A model of a shape, or the real SmolLM2; the same weights in every process.

    Args:
        shape: a key of `SHAPES`, `LINEAR`, or `SAMPLE_MODEL`.
        layers: fewer or more of them than the shape has.
        vocab_size: another one than the shape has.
        seed: of the weights.
    """
    if shape == SAMPLE_MODEL:
        from omlx_core.model.loading import load_model
        from omlx_core.model.sample_model import ensure_sample_model

        return load_model(ensure_sample_model()).model
    if shape == LINEAR:
        model = RowsModel()
        _randomize(model, mx.float32, seed)
        return model
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    _randomize(model, mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32, seed)
    model.eval()
    return model


def _randomize(model: Any, dtype: mx.Dtype, seed: int) -> None:
    """Draw the matrices one by one, so that no more than one exists twice; keep what vectors start from."""
    key = mx.random.key(seed)
    parameters = sorted(tree_flatten(model.parameters()))
    for name, initial in parameters:
        key, subkey = mx.random.split(key)
        if initial.ndim > 1 and not name.endswith("A_log"):
            weight = mx.random.normal(initial.shape, dtype, scale=initial.shape[-1] ** -0.5, key=subkey)
        else:
            weight = initial.astype(dtype)
        mx.eval(weight)
        model.update(tree_unflatten([(name, weight)]))
