"""The fingerprint of a model: everything that changes a KV value, and nothing that doesn't.

`describe_namespace` walks the model's modules. What it can't see is left to miss rather than to match wrongly: a new
version of MLX or another backend may round otherwise, and is another namespace.

Weights are identified by content. Each tensor is read twice, where it is, at the speed of memory: viewed as a matrix
of unsigned integers, the wrapping sums of its rows and of its columns are hashed, together with evenly spaced samples.
A changed element changes a sum, swapped elements change two; a change of every element, such as a negation, which can
leave sums alone modulo 2³², shows in the samples. Integer sums don't depend on their order, so each backend finds the
same. This tells models apart; it is no defence against weights made to collide.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from omlx_core.mlx_backend import backend_name, mx

import numpy as np

NAMESPACE_FORMAT_VERSION = 1
"""Raised when blocks of equal hash would mean something else than before."""

_WHOLE_BYTES = 4096
_NUM_SAMPLES = 1024
# State of training, and names that only mean something to Python.
_IGNORED_ATTRIBUTES = frozenset({"_no_grad", "_training"})


def describe_namespace(
    model: Any,
    *,
    tokenizer: Any | None,
    name: str,
    config: Mapping[str, Any] | None,
    adapter_path: str | None,
    block_size: int,
    layer_layout: Sequence[str],
) -> dict[str, Any]:
    """Describe a model and the way its KV is kept, for `hash_namespace` and for people.

    Equal facts give an equal description in every process. The model's name is part of it, as users expect of a
    shared cache folder; where the files lie is not. An adapter counts by its weights, rank and scale, which are in
    the model: moving its folder changes nothing.

    Call it on the thread that owns MLX; it evaluates the model's arrays.

    Args:
        model: an ``mlx.nn.Module``.
        tokenizer: mlx-lm's wrapper or a ``transformers`` tokenizer; None for token ids only.
        name: the model's name.
        config: the model's ``config.json``, if known.
        adapter_path: where an adapter was loaded from, if any.
        block_size: tokens per block.
        layer_layout: one line for each layer, on what its blocks hold.

    Returns:
        JSON-serialisable facts.
    """
    walk = _ModelWalk()
    walk.visit("model", model)
    parallel_rank, parallel_size = max(walk.groups, key=lambda group: group[1], default=(0, 1))
    return {
        "format_version": NAMESPACE_FORMAT_VERSION,
        "model": name,
        "model_class": _qualified_name(type(model)),
        "adapter": adapter_path is not None,
        "weights": walk.describe_arrays(),
        "structure_sha256": walk.structure_sha256(),
        "config": _plain(config),
        "tokenizer_sha256": _tokenizer_sha256(tokenizer),
        "tensor_parallel": {"rank": parallel_rank, "size": parallel_size},
        "block_size": block_size,
        "layer_layout": list(layer_layout),
        "backend": backend_name(),
        "versions": {package: importlib.metadata.version(package) for package in ("mlx", "mlx-lm")},
    }


def model_arrays(model: Any) -> dict[str, Any]:
    """Every array that a model holds, by path: its parameters, and what it keeps beside them, such as frequencies."""
    walk = _ModelWalk()
    walk.visit("model", model)
    return walk.arrays


class _ModelWalk:
    """Collects the arrays, the groups and all other attributes of a module and the modules in it."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.groups: set[tuple[int, int]] = set()
        self._facts: list[tuple[str, Any]] = []
        self._paths: dict[int, str] = {}

    def visit(self, path: str, value: Any) -> None:
        from mlx import nn

        if isinstance(value, mx.array):
            self.arrays[path] = value
        elif isinstance(value, mx.distributed.Group):
            self.groups.add((value.rank(), value.size()))
            self._facts.append((path, [value.rank(), value.size()]))
        elif isinstance(value, nn.Module):
            # A module may be shared, or know the one that it is in.
            first_path = self._paths.setdefault(id(value), path)
            self._facts.append((path, [_qualified_name(type(value)), first_path]))
            if first_path == path:
                self._visit_items(path, {**vars(value), **value})
        elif isinstance(value, dict):
            self._visit_items(path, value)
        elif isinstance(value, list | tuple):
            self._facts.append((path, len(value)))
            self._visit_items(path, dict(enumerate(value)))
        else:
            self._facts.append((path, _plain(value)))

    def _visit_items(self, path: str, items: Mapping[Any, Any]) -> None:
        for key, value in items.items():
            if key not in _IGNORED_ATTRIBUTES:
                self.visit(f"{path}.{key}", value)

    def structure_sha256(self) -> str:
        facts = json.dumps(sorted(self._facts, key=lambda fact: fact[0]), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def describe_arrays(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        probes = {path: _probe(array) for path, array in sorted(self.arrays.items())}
        mx.eval(list(probes.values()))
        for path, probe in probes.items():
            array = self.arrays[path]
            digest.update(json.dumps([path, str(array.dtype), array.shape]).encode())
            for part in probe:
                digest.update(np.asarray(part).tobytes())
        dtypes = Counter(str(array.dtype).removeprefix("mlx.core.") for array in self.arrays.values())
        return {
            "sha256": digest.hexdigest(),
            "size_bytes": sum(array.nbytes for array in self.arrays.values()),
            "dtypes": dict(sorted(dtypes.items())),
        }


def _probe(array: Any) -> list[Any]:
    """Small unsigned arrays, not yet evaluated, that change when ``array`` does."""
    if array.size == 0:
        return []
    words = _as_words(array)
    flat = words.reshape(-1)
    if array.nbytes <= _WHOLE_BYTES:
        return [flat]
    return [words.sum(axis=1), words.sum(axis=0), flat[:: max(1, flat.size // _NUM_SAMPLES)]]


def _as_words(array: Any) -> Any:
    """View an array as a matrix of the widest unsigned integers, up to 32 bits, that its rows divide into."""
    matrix = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    row_bytes = matrix.shape[-1] * matrix.dtype.size
    dtype = mx.uint32 if row_bytes % 4 == 0 else mx.uint16 if row_bytes % 2 == 0 else mx.uint8
    return matrix.view(dtype)


def _tokenizer_sha256(tokenizer: Any | None) -> str | None:
    """Hash what decides which text becomes which tokens."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        facts = json.loads(backend.to_str())
        # These follow the last call, not the model.
        facts["truncation"] = facts["padding"] = None
    else:
        facts = {"class": _qualified_name(type(tokenizer)), "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A JSON value that is equal in every process: no addresses, no order of sets."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return _plain_object(value)


def _plain_object(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=json.dumps)
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, mx.Dtype):
        return str(value)
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    return _qualified_name(value if callable(value) and hasattr(value, "__qualname__") else type(value))


def _qualified_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
