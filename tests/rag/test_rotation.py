"""Keys at other positions: turned as the model would have, or refused."""

from __future__ import annotations

from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama, tiny_mamba, tiny_qwen3

from omlx_core.state.rotation import UnmovableError, find_rotations, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def rotations_of(model: Any) -> list[Any]:
    return find_rotations(model, make_prompt_cache(model))


def keys_at(model: Any, position: int, token_ids: list[int]) -> mx.array:
    """The first layer's keys, which depend on nothing but a token and its position."""
    cache = make_prompt_cache(model)
    model(mx.array([[0] * position + token_ids]), cache=cache)
    return cache[0].keys[..., position : position + len(token_ids), :]


@pytest.mark.parametrize("distance", [0, 1, 100, 1000])
@pytest.mark.parametrize(
    "make",
    [
        tiny_llama,
        tiny_qwen3,
        lambda: tiny_llama(rope_traditional=True),
        lambda: tiny_llama(rope_scaling={"type": "linear", "factor": 4.0}),
        lambda: tiny_llama(rope_scaling=LLAMA3),
    ],
    ids=["llama", "qwen3", "traditional", "linear", "llama3"],
)
def test_turned_keys_are_those_that_the_model_computes_there(make, distance):
    model = make()
    token_ids = [5, 6, 7, 8, 9]
    moved = rotate(rotations_of(model)[0], keys_at(model, 3, token_ids), distance)
    assert mx.allclose(moved, keys_at(model, 3 + distance, token_ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_moved_as_well(dtype):
    assert len(rotations_of(tiny_llama(dtype))) == 2


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tiny_gemma3, "RotatingKVCache"),
        (tiny_lfm2, "ArraysCache"),
        (tiny_mamba, "ArraysCache"),
        (lambda: tiny_llama(rope_scaling={"type": "dynamic", "factor": 2.0}), "DynamicNTKScalingRoPE"),
        (
            lambda: tiny_llama(
                rope_scaling={
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.0,
                }
            ),
            "YarnRoPE",
        ),
    ],
)
def test_what_is_not_known_to_turn_is_refused(make, why):
    with pytest.raises(UnmovableError, match=why):
        rotations_of(make())


class ReversedRoPE(nn.RoPE):
    """Turns keys the other way round, as some embeddings of a known name might."""

    def __call__(self, x, offset=0):
        return super().__call__(x, offset=-offset)


def test_an_embedding_of_another_class_is_refused_even_if_it_is_derived_from_a_known_one():
    model = tiny_llama()
    model.layers[1].self_attn.rope = ReversedRoPE(16)
    with pytest.raises(UnmovableError, match="layer 1 has a ReversedRoPE"):
        rotations_of(model)


def test_a_layer_that_does_not_use_its_embedding_is_refused():
    model = tiny_llama()
    attention = model.layers[1].self_attn

    class Unturned(type(attention)):
        def __call__(self, x, mask=None, cache=None):
            rope, self.rope = self.rope, lambda x, offset=0: x
            try:
                return super().__call__(x, mask, cache)
            finally:
                self.rope = rope

    attention.__class__ = Unturned
    with pytest.raises(UnmovableError, match="layer 1 has other keys at another position"):
        rotations_of(model)


def test_a_layer_that_can_not_be_tried_is_refused():
    model = tiny_llama()
    type_of_layer = type(model.layers[1])

    class Odd(type_of_layer):
        def __call__(self, x, mask, cache, more):
            raise AssertionError("not reached")

    model.layers[1].__class__ = Odd
    with pytest.raises(UnmovableError, match="layer 1 can't be tried: TypeError"):
        rotations_of(model)
