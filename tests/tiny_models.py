"""Random-weight models of a few hundred kilobytes; the same seed gives the same weights in every process."""

from __future__ import annotations

from typing import Any

from omlx_core.mlx_backend import mx

from mlx.utils import tree_flatten, tree_unflatten

VOCAB_SIZE = 512


def tiny_llama(dtype: str = "float32", seed: int = 0, **overrides: Any) -> Any:
    """A llama with two layers, four heads of 16, and two KV heads; ``overrides`` go to its ``ModelArgs``."""
    from mlx_lm.models.llama import Model, ModelArgs

    options = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    return _with_random_weights(Model(ModelArgs(**{**options, **overrides})), dtype, seed)


def tiny_qwen3(dtype: str = "float32", seed: int = 0) -> Any:
    """A qwen3 with two layers: unlike a llama, it leaves the choice of its caches to mlx-lm."""
    from mlx_lm.models.qwen3 import Model, ModelArgs

    args = ModelArgs(
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        head_dim=16,
        rms_norm_eps=1e-6,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    return _with_random_weights(Model(args), dtype, seed)


def tiny_gemma3(window: int = 48, head_dim: int = 16, dtype: str = "float32", seed: int = 0) -> Any:
    """A gemma3 with four layers of a sliding window and two of full attention."""
    from mlx_lm.models.gemma3_text import Model, ModelArgs

    args = ModelArgs(
        model_type="gemma3_text",
        hidden_size=64,
        num_hidden_layers=6,
        intermediate_size=128,
        num_attention_heads=4,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        sliding_window=window,
        sliding_window_pattern=3,
        max_position_embeddings=4096,
    )
    return _with_random_weights(Model(args), dtype, seed)


def tiny_lfm2(dtype: str = "float32", seed: int = 0) -> Any:
    """An lfm2 with two short convolutions and two layers of full attention."""
    from mlx_lm.models.lfm2 import Model, ModelArgs

    args = ModelArgs(
        model_type="lfm2",
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=64,
        block_ff_dim=128,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        rope_theta=10000.0,
        full_attn_idxs=[1, 3],
    )
    return _with_random_weights(Model(args), dtype, seed)


def tiny_mamba(dtype: str = "float32", seed: int = 0, **overrides: Any) -> Any:
    """A mamba with two layers: its caches are ``ArraysCache``, which hold a state instead of tokens."""
    from mlx_lm.models.mamba import Model, ModelArgs

    options = {
        "model_type": "mamba",
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "vocab_size": VOCAB_SIZE,
    }
    return _with_random_weights(Model(ModelArgs(**{**options, **overrides})), dtype, seed)


def _with_random_weights(model: Any, dtype: str, seed: int) -> Any:
    """Draw matrices and biases from ``seed``; keep the constants that norms and state spaces start from."""
    key = mx.random.key(seed)
    weights = []
    for name, initial in sorted(tree_flatten(model.parameters())):
        weight = initial
        if (initial.ndim > 1 and not name.endswith("A_log")) or name.endswith("bias"):
            key, subkey = mx.random.split(key)
            weight = mx.random.normal(initial.shape, key=subkey) * initial.shape[-1] ** -0.5
        weights.append((name, weight.astype(getattr(mx, dtype))))
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model
