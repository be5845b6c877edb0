from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import pytest
from mlx import nn
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import tiny_llama, tiny_mamba

from omlx_core.cache.block_hash import hash_namespace
from omlx_core.model import fingerprint
from omlx_core.model.fingerprint import describe_namespace


def describe(model: Any, **overrides: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tokenizer": None,
        "name": "tiny",
        "config": {"model_type": "llama"},
        "adapter_path": None,
        "block_size": 16,
        "layer_layout": ["kv float32 2x16"] * 2,
    }
    return describe_namespace(model, **{**options, **overrides})


def fingerprint_of(model: Any, **overrides: Any) -> str:
    return hash_namespace(describe(model, **overrides)).hex()


def changed(array: mx.array, function: Any) -> mx.array:
    """A copy of a matrix that numpy code has changed."""
    import numpy as np

    copy = np.array(array)
    function(copy)
    return mx.array(copy)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
def test_is_the_same_for_a_second_model_of_equal_content(make: Any) -> None:
    assert fingerprint_of(make()) == fingerprint_of(make())


def test_is_the_same_in_another_process() -> None:
    script = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_fingerprint import fingerprint_of, tiny_llama, tiny_mamba\n"
        "print(fingerprint_of(tiny_llama('bfloat16')), fingerprint_of(tiny_mamba()))"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.split() == [fingerprint_of(tiny_llama("bfloat16")), fingerprint_of(tiny_mamba())]


def test_is_the_same_after_the_model_has_run() -> None:
    model = tiny_llama()
    before = fingerprint_of(model)

    mx.eval(model(mx.array([[1, 2, 3]])))

    assert fingerprint_of(model) == before


def test_does_not_modify_the_model() -> None:
    model, untouched = tiny_llama(), tiny_llama()

    describe(model)

    for (name, array), (_, expected) in zip(
        sorted(nn.utils.tree_flatten(model.parameters())),
        sorted(nn.utils.tree_flatten(untouched.parameters())),
        strict=True,
    ):
        assert array.dtype == expected.dtype, name
        assert mx.array_equal(array, expected), name


def _change_one_element(weight: Any) -> None:
    weight[37, 5] *= 1.0000002


def _swap_in_a_row(weight: Any) -> None:
    weight[9, [3, 41]] = weight[9, [41, 3]]


def _swap_in_a_column(weight: Any) -> None:
    weight[[3, 41], 9] = weight[[41, 3], 9]


def _swap_rows(weight: Any) -> None:
    weight[[3, 40]] = weight[[40, 3]]


def _negate(weight: Any) -> None:
    weight *= -1


def _transpose(weight: Any) -> None:
    weight[:] = weight.T.copy()


@pytest.mark.parametrize(
    "change", [_change_one_element, _swap_in_a_row, _swap_in_a_column, _swap_rows, _negate, _transpose]
)
def test_notices_a_change_in_one_matrix(change: Any) -> None:
    model = tiny_llama()
    before = fingerprint_of(model)
    projection = model.model.layers[1].self_attn.o_proj
    assert projection.weight.nbytes > fingerprint._WHOLE_BYTES

    projection.weight = changed(projection.weight, change)

    assert fingerprint_of(model) != before


def test_notices_a_change_in_a_norm() -> None:
    model = tiny_llama()
    before = fingerprint_of(model)

    model.model.norm.weight = changed(model.model.norm.weight, lambda weight: weight.__setitem__(63, 1.0000001))

    assert fingerprint_of(model) != before


def test_notices_matrices_that_changed_places() -> None:
    model = tiny_llama()
    before = fingerprint_of(model)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp

    first.up_proj, second.up_proj = second.up_proj, first.up_proj

    assert fingerprint_of(model) != before


@pytest.mark.parametrize("shape", [(3, 1500), (3, 3001), (3000, 3), (5, 7, 300), (9001,), (1,), ()])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.bool_])
def test_notices_the_last_element_of_any_shape_and_type(shape: tuple[int, ...], dtype: Any) -> None:
    size = max(1, mx.zeros(shape).size)

    def module(last: int) -> Any:
        result = nn.Module()
        result.weight = mx.array([0] * (size - 1) + [last]).reshape(shape).astype(dtype)
        return result

    assert fingerprint_of(module(0)) != fingerprint_of(module(1))


def test_tells_shapes_and_types_of_equal_bytes_apart() -> None:
    def module(weight: mx.array) -> Any:
        result = nn.Module()
        result.weight = weight
        return result

    zeros = mx.zeros((64, 64))
    fingerprints = [
        fingerprint_of(module(weight))
        for weight in (zeros, zeros.reshape(32, 128), zeros.view(mx.uint32), mx.zeros((0, 4)), mx.zeros((0, 5)))
    ]

    assert len(set(fingerprints)) == len(fingerprints)


def test_notices_an_array_that_is_no_parameter() -> None:
    """Such as the frequencies of a scaled RoPE."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    model = tiny_llama(rope_scaling=scaling)
    before = fingerprint_of(model)
    rope = model.model.layers[0].self_attn.rope

    rope._freqs = rope._freqs * 1.5

    assert fingerprint_of(model) != before


def test_notices_a_module_of_equal_weights_that_computes_otherwise() -> None:
    model = tiny_llama()
    before = fingerprint_of(model)

    model.model.layers[0].self_attn.rope.base = 500.0

    assert fingerprint_of(model) != before


def _with_adapter(scale: float, seed: int) -> Any:
    model = tiny_llama()
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    for layer in model.model.layers:
        adapter = layer.self_attn.q_proj
        adapter.lora_a = mx.random.normal(adapter.lora_a.shape, key=mx.random.key(seed))
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape, key=mx.random.key(seed + 1))
    model.eval()
    return model


def test_tells_adapters_apart_by_weights_and_scale() -> None:
    path = "adapters/mine"
    fingerprints = [
        fingerprint_of(tiny_llama()),
        fingerprint_of(_with_adapter(scale=10.0, seed=1), adapter_path=path),
        fingerprint_of(_with_adapter(scale=10.0, seed=2), adapter_path=path),
        fingerprint_of(_with_adapter(scale=20.0, seed=1), adapter_path=path),
    ]

    assert len(set(fingerprints)) == len(fingerprints)


def test_does_not_depend_on_where_an_adapter_lies() -> None:
    assert fingerprint_of(_with_adapter(10.0, 1), adapter_path="a") == fingerprint_of(
        _with_adapter(10.0, 1), adapter_path="/b/c"
    )


def test_tells_quantizations_apart() -> None:
    def quantized(**options: int) -> Any:
        model = tiny_llama()
        nn.quantize(model, **options)
        return model

    fingerprints = [
        fingerprint_of(tiny_llama()),
        fingerprint_of(quantized(group_size=64, bits=4)),
        fingerprint_of(quantized(group_size=64, bits=8)),
        fingerprint_of(quantized(group_size=32, bits=4)),
    ]

    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"config": {"model_type": "llama", "rope_theta": 1}},
        {"config": None},
        {"block_size": 32},
        {"layer_layout": ["kv float16 2x16"] * 2},
        {"layer_layout": ["kv float32 2x16"]},
    ],
)
def test_notices_everything_that_it_is_told(change: dict[str, Any]) -> None:
    model = tiny_llama()

    assert fingerprint_of(model, **change) != fingerprint_of(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tells_element_types_apart(dtype: str) -> None:
    assert fingerprint_of(tiny_llama(dtype)) != fingerprint_of(tiny_llama())


def test_notices_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = fingerprint_of(model)

    monkeypatch.setattr(fingerprint, "backend_name", lambda: "metal")

    assert fingerprint_of(model) != before


def test_notices_other_versions_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = fingerprint_of(model)

    monkeypatch.setattr(fingerprint.importlib.metadata, "version", lambda package: "99.0")

    assert fingerprint_of(model) != before


def test_reads_the_tensor_parallel_group_from_the_modules() -> None:
    model = tiny_llama()
    before = describe(model)
    group = mx.distributed.init()

    model.model.layers[0].self_attn.o_proj.group = group

    assert before["tensor_parallel"] == {"rank": 0, "size": 1}
    assert describe(model)["tensor_parallel"] == {"rank": group.rank(), "size": group.size()}
    assert describe(model)["structure_sha256"] != before["structure_sha256"]


class TestTokenizer:
    @staticmethod
    def tokenizer(merges: list[tuple[str, str]]) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "ba"])}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), pad_token="a")

    def test_of_other_merges_is_noticed(self) -> None:
        model = tiny_llama()

        assert fingerprint_of(model, tokenizer=self.tokenizer([("a", "b")])) != fingerprint_of(
            model, tokenizer=self.tokenizer([("b", "a")])
        )

    def test_counts_the_same_after_a_call_that_truncates_and_pads(self) -> None:
        model, tokenizer = tiny_llama(), self.tokenizer([("a", "b")])
        before = fingerprint_of(model, tokenizer=tokenizer)

        tokenizer(["abab", "a"], truncation=True, max_length=3, padding=True)

        assert fingerprint_of(model, tokenizer=tokenizer) == before

    def test_without_a_fast_backend_counts_by_its_vocabulary(self) -> None:
        class SlowTokenizer:
            def __init__(self, vocabulary: dict[str, int]) -> None:
                self.get_vocab = vocabulary.copy

        first, second = SlowTokenizer({"a": 0, "b": 1}), SlowTokenizer({"a": 1, "b": 0})

        assert describe(tiny_llama(), tokenizer=first) != describe(tiny_llama(), tokenizer=second)


def test_survives_modules_that_know_each_other() -> None:
    model = tiny_llama()
    model.model.layers[0].parent = model

    assert fingerprint_of(model) != fingerprint_of(tiny_llama())


def test_is_readable_json() -> None:
    description = describe(tiny_llama("bfloat16"), config={"limit": float("inf"), "ids": {3, 1, 2}})

    assert json.loads(json.dumps(description)) == description
    assert description["model"] == "tiny"
    assert description["model_class"] == "mlx_lm.models.llama.Model"
    assert description["weights"]["dtypes"] == {"bfloat16": 20}
    assert description["config"]["ids"] == [1, 2, 3]
