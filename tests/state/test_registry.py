"""Cache classes of others: restored exactly once a handler is registered, never guessed, never spoilt by a handler."""

import re
import sys
import types
from pathlib import Path

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama, tiny_mamba
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, Engine
from omlx_core.cache.parts import CHECKPOINT, PartKey, PrefixContent
from omlx_core.errors import CacheInvariantError, EngineError, InvalidSettingError
from omlx_core.state import handlers, registered, registry
from omlx_core.state.handlers import RecurrentHandler, TokenSlicedHandler
from omlx_core.state.prompt_state import PromptStateCodec, UnsupportedLayerError
from omlx_core.state.protocols import CheckpointHandler, RowHandler
from omlx_core.state.registry import class_name, register_state_handler

# Cache classes that keep everything negated: who takes one for its parent gets other answers.


class NegatedKVCache(KVCache):
    def update_and_fetch(self, keys, values):
        return [-array for array in super().update_and_fetch(-keys, -values)]


class NegatedRotatingKVCache(RotatingKVCache):
    def update_and_fetch(self, keys, values):
        return [-array for array in super().update_and_fetch(-keys, -values)]


class NegatedArraysCache(ArraysCache):
    def __setitem__(self, index, value):
        self.cache[index] = -value

    def __getitem__(self, index):
        return None if self.cache[index] is None else -self.cache[index]


# Handlers that give and take arrays without a copy, which is all that the contract asks of them.


class NegatedKVHandler(TokenSlicedHandler):
    def rows(self, leaf, start, stop):
        return {"keys": leaf.keys[..., start:stop, :], "values": leaf.values[..., start:stop, :]}

    def restore(self, leaf, fetch, num_tokens, capacity):
        restored = type(leaf)()
        pieces = fetch(0, num_tokens)
        for name in ("keys", "values"):
            rows = [piece[name] for piece in pieces]
            setattr(restored, name, rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=2))
        restored.offset = num_tokens
        return restored


class NegatedArraysHandler:
    def describe(self, leaf):
        return f"negated({len(leaf.cache)})"

    def checkpoint(self, leaf):
        return {str(index): array for index, array in enumerate(leaf.cache)}

    def restore(self, leaf, arrays):
        restored = type(leaf)(len(leaf.cache))
        for name, array in arrays.items():
            restored.cache[int(name)] = array
        return restored


def make_arrays_handler():
    return NegatedArraysHandler()


ARRAYS_HANDLER = NegatedArraysHandler()
NEGATED = {KVCache: NegatedKVCache, RotatingKVCache: NegatedRotatingKVCache, ArraysCache: NegatedArraysCache}
HANDLERS = {
    NegatedKVCache: f"{__name__}:NegatedKVHandler",
    NegatedRotatingKVCache: "omlx_core.state.handlers:WindowedHandler",
    NegatedArraysCache: f"{__name__}:NegatedArraysHandler",
}
MODELS = {
    "rows": tiny_llama,
    "window and rows": tiny_gemma3,
    "checkpoint": tiny_mamba,
    "checkpoint and rows": tiny_lfm2,
}


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_handlers", {})
    monkeypatch.setattr(registered, "_found", {})


def with_classes(model, classes):
    """Have a model make caches of other classes."""
    make_cache = model.make_cache if hasattr(model, "make_cache") else lambda: [KVCache() for _ in model.layers]

    def make_other_cache():
        layers = make_cache()
        for layer in layers:
            layer.__class__ = classes[type(layer)]
        return layers

    model.make_cache = make_other_cache
    return model


def register(*cache_classes):
    for cache_class in cache_classes:
        register_state_handler(class_name(cache_class), HANDLERS[cache_class])


def generate(engine, prompt, max_tokens=5):
    return engine.generate(prompt, max_tokens=max_tokens, logprobs=True)


def open_engine(model, directory=None):
    return Engine(model, name="tiny", cache=CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=directory))


def cold_run(model, prompt):
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        return generate(engine, prompt)


def assert_same(result, cold):
    assert (result.token_ids, result.logprobs) == (cold.token_ids, cold.logprobs)


# Engines.


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_class_is_cached_and_restored_exactly_once_it_is_registered(make_model, tmp_path: Path):
    model, prompt = with_classes(make_model(), NEGATED), tokens(70)
    cold = cold_run(model, prompt)
    assert cold.token_ids == cold_run(make_model(), prompt).token_ids
    with open_engine(model, tmp_path) as engine:
        assert [generate(engine, prompt).usage.cached_tokens for _ in range(2)] == [0, 0]
    register(*HANDLERS)
    with open_engine(model, tmp_path) as engine:
        for cached_tokens in (0, 64):
            result = generate(engine, prompt)
            assert_same(result, cold)
            assert result.usage.cached_tokens == cached_tokens
    with open_engine(model, tmp_path) as engine:
        result = generate(engine, prompt)
        assert_same(result, cold)
        assert result.usage.cached_tokens_cold == 64


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_mamba, tiny_lfm2])
def test_answer_is_kept_as_the_class_keeps_it(make_model):
    model, prompt = with_classes(make_model(), NEGATED), tokens(70)
    register(*HANDLERS)
    with open_engine(model) as engine:
        turn = prompt + generate(engine, prompt, max_tokens=30).token_ids + tokens(20, seed=2)
        result = generate(engine, turn)
    assert result.usage.cached_tokens == 96
    assert_same(result, cold_run(model, turn))


def test_model_whose_handler_is_broken_runs_uncached_and_the_log_says_why_once(caplog):
    model = with_classes(tiny_llama(), NEGATED)
    register_state_handler(class_name(NegatedKVCache), "no_such_package.handlers:Handler")
    for _ in range(2):
        with open_engine(model) as engine:
            assert [generate(engine, tokens(50)).usage.cached_tokens for _ in range(2)] == [0, 0]
    assert caplog.text.count("no_such_package.handlers:Handler") == 1
    assert "No module named 'no_such_package'" in caplog.text
    assert f"no way to cut {class_name(NegatedKVCache)} into blocks" in caplog.text


def test_handler_that_breaks_the_contract_fails_the_request_by_name(monkeypatch):
    monkeypatch.setattr(NegatedKVHandler, "rows", lambda *_: {})
    register(NegatedKVCache)
    with (
        open_engine(with_classes(tiny_llama(), NEGATED)) as engine,
        pytest.raises(EngineError, match=r"test_registry:NegatedKVHandler failed in rows"),
    ):
        generate(engine, tokens(50))


def test_two_handlers_share_no_blocks_and_neither_do_two_classes_of_one(monkeypatch, tmp_path: Path):
    class OtherKVCache(NegatedKVCache):
        pass

    monkeypatch.setattr(sys.modules[__name__], "OtherKVHandler", NegatedKVHandler, raising=False)

    def cached_tokens(cache_class, handler):
        registry._handlers.clear()
        registry._handlers[class_name(cache_class)] = f"{__name__}:{handler}"  # a local class has no name to register
        with open_engine(with_classes(tiny_llama(), {KVCache: cache_class}), tmp_path) as engine:
            return generate(engine, tokens(50)).usage.cached_tokens

    assert cached_tokens(NegatedKVCache, "NegatedKVHandler") == 0
    assert cached_tokens(NegatedKVCache, "OtherKVHandler") == 0
    assert cached_tokens(OtherKVCache, "NegatedKVHandler") == 0
    assert cached_tokens(NegatedKVCache, "NegatedKVHandler") == 48


# Registration.


@pytest.mark.parametrize(
    ("cache_class", "handler", "message"),
    [
        ("package.Cache", "package:Handler", "cache class 'package.Cache' is not of the form"),
        ("package:Cache", "package.Handler", "state handler 'package.Handler' is not of the form"),
        ("package:", "package:Handler", "'package:'"),
        (":Cache", "package:Handler", "':Cache'"),
        ("package:Cache", "package: Handler", "'package: Handler'"),
        ("package:Cache", "package:Handler()", r"'package:Handler\(\)'"),
        ("package:<locals>.Cache", "package:Handler", "<locals>"),
        (KVCache, "package:Handler", "cache class <class .*KVCache'> is not of the form"),
    ],
)
def test_malformed_name_is_refused(cache_class, handler, message):
    with pytest.raises(InvalidSettingError, match=message):
        register_state_handler(cache_class, handler)


@pytest.mark.parametrize("cache_class", [*handlers._HANDLERS, CacheList])
def test_built_in_class_cannot_be_replaced(cache_class):
    with pytest.raises(InvalidSettingError, match=f"{class_name(cache_class)} is built in and can't be replaced"):
        register_state_handler(class_name(cache_class), "package:Handler")


def test_first_registration_counts():
    assert register_state_handler("package:Outer.Cache", "package:first") == "package:first"
    assert register_state_handler("package:Outer.Cache", "package:second") == "package:first"


def test_subclass_of_a_registered_class_is_not_cached():
    class Subclass(NegatedKVCache):
        pass

    register(NegatedKVCache)
    with pytest.raises(UnsupportedLayerError, match="Subclass"):
        PromptStateCodec([NegatedKVCache(), Subclass()], BLOCK_SIZE)


def test_handler_is_imported_when_its_class_is_met_and_not_before(tmp_path: Path, monkeypatch):
    (tmp_path / "lazy_handlers.py").write_text(f"from {__name__} import NegatedKVHandler\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    register_state_handler(class_name(NegatedKVCache), "lazy_handlers:NegatedKVHandler")
    PromptStateCodec([KVCache()], BLOCK_SIZE)
    assert "lazy_handlers" not in sys.modules
    try:
        PromptStateCodec([NegatedKVCache()], BLOCK_SIZE)
        assert "lazy_handlers" in sys.modules
    finally:
        sys.modules.pop("lazy_handlers", None)


@pytest.mark.parametrize("handler", ["NegatedArraysHandler", "ARRAYS_HANDLER", "make_arrays_handler"])
def test_handler_is_an_instance_or_made_by_a_class_or_a_function(handler):
    register_state_handler(class_name(NegatedArraysCache), f"{__name__}:{handler}")
    codec = PromptStateCodec([NegatedArraysCache(2)], BLOCK_SIZE)
    assert codec.has_checkpoints
    assert codec.layout == [f"0: negated(2) [{class_name(NegatedArraysCache)} by {__name__}:{handler}]"]


def _raise(*_):
    raise RuntimeError("no licence")


class BothKinds(NegatedArraysHandler, TokenSlicedHandler):
    pass


BROKEN_TARGETS = {
    "a module that doesn't exist": ("no_such_package:Handler", "ModuleNotFoundError: .*no_such_package"),
    "an attribute that doesn't exist": ("broken_handlers:absent", "AttributeError: .*absent"),
    "a number": ("broken_handlers:number", "a int must have the methods of one kind"),
    "an object that lacks methods": (
        "broken_handlers:Partial",
        "a Partial .* it lacks needed, restore of RowHandler and checkpoint, restore of CheckpointHandler",
    ),
    "a handler of both kinds": ("broken_handlers:BothKinds", "a BothKinds .* lacks nothing of RowHandler and nothing"),
    "a factory that raises": ("broken_handlers:factory", "RuntimeError: no licence"),
    "a handler that can't describe": ("broken_handlers:Undescribed", "RuntimeError: no licence"),
    "a handler whose window raises": ("broken_handlers:Windowless", "RuntimeError: no licence"),
}


@pytest.mark.parametrize(("target", "reason"), BROKEN_TARGETS.values(), ids=BROKEN_TARGETS)
def test_broken_handler_counts_as_none_and_is_named_once_in_the_log(target, reason, monkeypatch, caplog):
    module = types.ModuleType("broken_handlers")
    methods = dict.fromkeys(("describe", "num_tokens", "window", "rows"), _raise)
    module.number, module.factory, module.BothKinds = 7, _raise, BothKinds
    module.Partial = type("Partial", (), methods)
    module.Undescribed = type("Undescribed", (TokenSlicedHandler,), {"describe": _raise})
    module.Windowless = type("Windowless", (TokenSlicedHandler,), {"window": _raise})
    monkeypatch.setitem(sys.modules, "broken_handlers", module)
    register_state_handler(class_name(NegatedKVCache), target)
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match="NegatedKVCache"):
            PromptStateCodec([NegatedKVCache(), NegatedKVCache()], BLOCK_SIZE)
    [record] = caplog.records
    assert f"the state handler {target} of {class_name(NegatedKVCache)} is left out: " in record.message
    assert re.search(reason, record.message), record.message


# The contract.


def filled(cache_class=NegatedKVCache, num_tokens=2 * BLOCK_SIZE):
    layer = cache_class()
    keys, values = (mx.random.normal((1, 2, num_tokens, 8), key=mx.random.key(seed)) for seed in (1, 2))
    layer.update_and_fetch(keys, values)
    mx.eval(layer.state)
    return layer


def filled_arrays():
    layer = NegatedArraysCache(2)
    layer[0], layer[1] = (mx.random.normal((1, 4, 8), key=mx.random.key(seed)) for seed in (1, 2))
    mx.eval(layer.cache)
    return layer


def bytes_of(payload):
    """What a payload holds, by its bytes and by its arrays."""
    tensors = payload.tensors.values()
    return [(bytes(tensor.data), bytes(memoryview(tensor.array.reshape(-1).view(mx.uint8)))) for tensor in tensors]


def overwrite(array):
    array[...] = 7
    mx.eval(array)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_blocks_share_nothing_with_the_caches_they_are_cut_from_and_restored_to(num_blocks):
    register(NegatedKVCache)
    layers = [filled(num_tokens=num_blocks * BLOCK_SIZE)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    blocks = [
        codec.rows_of(layers, (i + 1) * BLOCK_SIZE).copy(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE)
        for i in range(num_blocks)
    ]
    before = [bytes_of(block) for block in blocks]
    num_tokens = num_blocks * BLOCK_SIZE
    [restored], _ = codec.restore(PrefixContent(blocks, {}), num_tokens=num_tokens, capacity=num_tokens)
    for layer in (*layers, restored):
        overwrite(layer.keys)
        overwrite(layer.values)
    assert [bytes_of(block) for block in blocks] == before


def test_checkpoints_share_nothing_with_the_caches_they_are_taken_of_and_restored_to():
    register(NegatedArraysCache)
    layers = [filled_arrays()]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    checkpoint = codec.capture_checkpoint(layers)
    before = bytes_of(checkpoint)
    empty = codec.rows_of(layers, BLOCK_SIZE).copy(0, BLOCK_SIZE)
    content = PrefixContent([empty], {PartKey(0, CHECKPOINT): checkpoint})
    [restored], _ = codec.restore(content, num_tokens=BLOCK_SIZE, capacity=BLOCK_SIZE)
    for layer in (*layers, restored):
        for array in layer.cache:
            overwrite(array)
    assert bytes_of(checkpoint) == before


def test_captured_blocks_do_not_keep_the_cache_they_were_cut_from():
    register(NegatedKVCache)
    mx.clear_cache()
    before = mx.get_active_memory()
    layers = [filled(num_tokens=4096)]
    payload = PromptStateCodec(layers, BLOCK_SIZE).rows_of(layers, BLOCK_SIZE).copy(0, BLOCK_SIZE)
    del layers
    # Allocations are rounded up to pages of at most 16 KiB.
    assert mx.get_active_memory() - before <= payload.size_bytes + 2 * 16384


ROWS = {"keys": mx.zeros((1, 2, BLOCK_SIZE, 8)), "values": mx.zeros((1, 2, BLOCK_SIZE, 8))}
BROKEN_CAPTURES = {
    "rows that are gone": (None, r"tokens 0 to 16 are gone from a cache without a window"),
    "no rows": ({}, "no arrays"),
    "too few rows": ({"keys": mx.zeros((1, 2, 15, 8))}, r"keys has the shape \(1, 2, 15, 8\), not \[1, heads, 16 "),
    "rows without heads": ({"keys": mx.zeros((1, 8, BLOCK_SIZE))}, r"shape \(1, 8, 16\)"),
    "rows of two sequences": ({"keys": mx.zeros((2, 2, BLOCK_SIZE, 8))}, r"shape \(2, 2, 16, 8\)"),
    "a name with a dot": ({"k.eys": ROWS["keys"]}, "'k.eys' is empty or has a dot"),
}


@pytest.mark.parametrize(("rows", "message"), BROKEN_CAPTURES.values(), ids=BROKEN_CAPTURES)
def test_rows_that_would_make_wrong_blocks_are_refused(rows, message, monkeypatch):
    register(NegatedKVCache)
    monkeypatch.setattr(NegatedKVHandler, "rows", lambda *_: rows)
    layers = [filled()]
    with pytest.raises(EngineError, match=f"NegatedKVHandler failed in rows.*{message}.*update or uninstall"):
        PromptStateCodec(layers, BLOCK_SIZE).rows_of(layers, BLOCK_SIZE).copy(0, BLOCK_SIZE)


def test_layer_of_another_class_than_the_registered_is_refused():
    register(NegatedKVCache)
    codec = PromptStateCodec([NegatedKVCache()], BLOCK_SIZE)
    with pytest.raises(EngineError, match=r"a mlx_lm.models.cache:KVCache came in place of a .*:NegatedKVCache"):
        codec.rows_of([filled(KVCache)], BLOCK_SIZE).copy(0, BLOCK_SIZE)


RESTORED = {
    "an empty cache": (NegatedKVCache, EngineError, "restored a cache that is empty"),
    "another class": (lambda: filled(KVCache), EngineError, "KVCache came in place of"),
    "another length": (lambda: filled(num_tokens=31), CacheInvariantError, "holds 31 tokens where its blocks say 32"),
    "nothing": (lambda: None, EngineError, "NoneType came in place of"),
}


@pytest.mark.parametrize(("make", "error", "message"), RESTORED.values(), ids=RESTORED)
def test_restored_layer_that_would_answer_wrongly_is_refused(make, error, message, monkeypatch):
    register(NegatedKVCache)
    monkeypatch.setattr(NegatedKVHandler, "restore", lambda *_: make())
    layers = [filled()]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    blocks = [codec.rows_of(layers, (i + 1) * BLOCK_SIZE).copy(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE) for i in range(2)]
    with pytest.raises(error, match=message):
        codec.restore(PrefixContent(blocks, {}), num_tokens=32, capacity=32)


def test_checkpoint_without_arrays_of_a_layer_that_is_filled_is_refused(monkeypatch):
    register(NegatedArraysCache)
    monkeypatch.setattr(NegatedArraysHandler, "checkpoint", lambda *_: {})
    layers = [filled_arrays()]
    with pytest.raises(EngineError, match=r"NegatedArraysHandler failed in checkpoint.*no arrays"):
        PromptStateCodec(layers, BLOCK_SIZE).capture_checkpoint(layers)


def test_layer_that_is_never_filled_is_restored_empty():
    register(NegatedArraysCache, NegatedKVCache)
    layers = [NegatedArraysCache(2), NegatedKVCache(), filled()]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    content = PrefixContent(
        [codec.rows_of(layers, BLOCK_SIZE).copy(0, BLOCK_SIZE)],
        {PartKey(0, CHECKPOINT): codec.capture_checkpoint(layers)},
    )
    restored, _ = codec.restore(content, num_tokens=BLOCK_SIZE, capacity=BLOCK_SIZE)
    assert [layer.empty() for layer in restored] == [True, True, False]
    assert restored[2].offset == BLOCK_SIZE


def test_recurrent_handler_is_a_checkpoint_handler():
    assert isinstance(RecurrentHandler(), CheckpointHandler)
    assert not isinstance(RecurrentHandler(), RowHandler)
