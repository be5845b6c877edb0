"""Builds a tiny model of any architecture, the way mlx-lm does, with weights that depend on the seed alone."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from omlx_core.mlx_backend import mx

from mlx.utils import tree_flatten, tree_unflatten

from integration_tests.architectures.table import ARCHITECTURES

# What a state forgets with each token grows with these. Modules start them where it forgets everything within a few
# tokens, so that a wrong state would soon go unnoticed.
_FORGETTING = ("dt_bias", "dt_proj.bias", "recurrent_param", "w_lora.lora.2.bias")


def build_tiny(model_type: str, seed: int = 0) -> Any:
    """An evaluated float32 model of ``mlx_lm.models.<model_type>``, of about a megabyte.

    Equal arguments give equal weights in every process; MLX's global random state has no influence.

    Raises:
        KeyError: ``model_type`` isn't in ``ARCHITECTURES``.
    """
    # Some architectures write into the dicts that they are given.
    config = copy.deepcopy(ARCHITECTURES[model_type])
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": model_type, **config}))
    key = mx.random.key(seed)
    weights = []
    for name, initial in sorted(tree_flatten(model.parameters())):
        key, subkey = mx.random.split(key)
        weights.append((name, _draw(name, initial, subkey)))
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model


def _draw(name: str, initial: mx.array, key: mx.array) -> mx.array:
    """A value for one parameter: random where a checkpoint has something of its own, else what it starts from."""
    shape = initial.shape
    if initial.dtype == mx.uint32:  # packed, 16 values of 2 bits
        return mx.random.randint(0, 2**31 - 1, shape, key=key).astype(mx.uint32)
    if name.endswith(".scales"):
        return mx.full(shape, 0.04)
    if name.endswith(".biases"):
        return mx.full(shape, -1.5 * 0.04)
    if name.endswith(("quant_key_scale", "quant_value_scale")):
        return mx.full(shape, 0.02)
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(1.0, 4.0, shape, key=key))
    noise = mx.random.normal(shape, key=key) * (shape[-1] if shape else 1) ** -0.5
    if name.endswith(_FORGETTING):
        return noise - 4.0
    if initial.ndim > 1 or name.endswith("bias") or not mx.any(initial).item():
        return noise
    return initial.astype(mx.float32)
