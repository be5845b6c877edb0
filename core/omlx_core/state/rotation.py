"""Keys at another position: what rotary embeddings allow, and other layers don't.

A rotary embedding turns a key by an angle that is its position times a frequency, so a key computed at one position is
turned on to another one by the difference (RoFormer, Su et al. 2021, arXiv:2104.09864). That holds for plain rotations
only: an embedding that also scales keys would scale them twice, and one whose frequencies depend on the length has no
fixed angle. Whatever isn't known to be plain, and shown to be so by the layer itself, is refused.
"""

from __future__ import annotations

from typing import Any

from omlx_core.mlx_backend import mx

from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import rope_utils
from mlx_lm.models.cache import KVCache

from omlx_core.state.prompt_state import PromptCache

_PLAIN = (nn.RoPE, rope_utils.Llama3RoPE, rope_utils.ProportionalRoPE)
_PROBE_TOKENS = 4
_PROBE_POSITION = 37
_TOLERANCE = 0.03  # of the largest key: two roundings in bfloat16, far from any other angle


class UnmovableError(Exception):
    """A layer's keys can't be moved to other positions; says which and why. Never leaves the engine."""


def find_rotations(model: Any, prompt_cache: PromptCache) -> list[Any]:
    """The rotary embedding of each layer. Runs every layer on a few tokens, at two positions.

    Args:
        model: an mlx-lm model.
        prompt_cache: a fresh prompt cache of it.

    Raises:
        UnmovableError: a layer keeps something else than a key and a value for each token, or its keys don't turn with
            their positions in a way that is known.
    """
    others = {type(leaf).__name__ for leaf in prompt_cache if type(leaf) is not KVCache}
    if others:
        raise UnmovableError(f"it has layers with {', '.join(sorted(others))}, and only KVCache will do")
    layers = getattr(model, "layers", None)
    width = getattr(getattr(model, "args", None), "hidden_size", None)
    if layers is None or width is None or len(layers) != len(prompt_cache):
        raise UnmovableError("its layers can't be told apart")
    rotations = [_find_rotation(index, layer) for index, layer in enumerate(layers)]
    for index, (layer, rotation) in enumerate(zip(layers, rotations, strict=True)):
        _probe(index, layer, rotation, width)
    return rotations


def rotate(rotation: Any, keys: mx.array, distance: int) -> mx.array:
    """Keys ``[1, heads, tokens, size]``, each as it would be so many positions further on."""
    _, heads, tokens, size = keys.shape
    # As if each were alone in its sequence, at that position: `mx.fast.rope` counts positions along the third axis.
    turned: mx.array = rotation(keys.reshape(1, heads * tokens, 1, size), offset=distance)
    return turned.reshape(keys.shape)


def _find_rotation(index: int, layer: Any) -> Any:
    found = [module for module in layer.modules() if "rope" in type(module).__name__.lower()]
    if len(found) != 1:
        raise UnmovableError(f"layer {index} has {len(found)} rotary embeddings, and one is needed")
    [rotation] = found
    is_plain = type(rotation) in _PLAIN or (
        # These two scale keys as well, unless the scale is 1.
        (type(rotation) is rope_utils.YarnRoPE and rotation.mscale == 1.0)
        or (type(rotation) is rope_utils.SuScaledRoPE and rotation._scale == 1.0)
    )
    if not is_plain:
        raise UnmovableError(f"layer {index} has a {type(rotation).__name__}, which does more than turn keys")
    return rotation


def _probe(index: int, layer: Any, rotation: Any, width: int) -> None:
    """See whether a layer's keys at one position are those at another, turned on."""
    dtypes = [array.dtype for _, array in tree_flatten(layer.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    hidden = mx.random.normal((1, _PROBE_TOKENS, width), key=mx.random.key(index)).astype(dtypes[0])
    try:
        here, there = KVCache(), KVCache()
        layer(hidden, None, here)
        rows = [array[..., :_PROBE_TOKENS, :] for array in (here.keys, here.values)]
        there.update_and_fetch(
            *(mx.zeros((*array.shape[:2], _PROBE_POSITION, array.shape[3]), array.dtype) for array in rows)
        )
        layer(hidden, None, there)
        moved = [array[..., _PROBE_POSITION:, :][..., :_PROBE_TOKENS, :] for array in (there.keys, there.values)]
        expected = [rotate(rotation, rows[0], _PROBE_POSITION), rows[1]]
        is_equal = all(_is_close(a, b) for a, b in zip(moved, expected, strict=True))
    except Exception as exc:  # a model's layer is a program of its own
        raise UnmovableError(f"layer {index} can't be tried: {type(exc).__name__}: {exc}") from exc
    if not is_equal:
        raise UnmovableError(f"layer {index} has other keys at another position than turned ones")


def _is_close(array: mx.array, expected: mx.array) -> bool:
    array, expected = array.astype(mx.float32), expected.astype(mx.float32)
    return bool((mx.abs(array - expected).max() <= _TOLERANCE * mx.abs(expected).max()).item())
