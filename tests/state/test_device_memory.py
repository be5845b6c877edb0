"""Blocks in a GPU's own memory: nothing looks at them from the CPU but what is written, and that is a copy."""

from omlx_core.mlx_backend import mx

import numpy as np
import pytest
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_llama
from tiny_prompts import BLOCK_SIZE, tokens

from omlx_core import CacheSettings, Engine
from omlx_core.state import prompt_state
from omlx_core.state.arrays import DeviceCopy, to_payloads
from omlx_core.state.packed_blocks import PackedTensor


@pytest.fixture
def device_memory(monkeypatch):
    """What the engine does on a GPU with memory of its own; counts the looks at bytes, by whether it was a copy."""
    monkeypatch.setattr(prompt_state, "has_device_memory", lambda: True)
    looks = {True: 0, False: 0}
    view = DeviceCopy.view

    def counted(self):
        looks[self._copy is not None] += 1
        return view(self)

    monkeypatch.setattr(DeviceCopy, "view", counted)
    return looks


@pytest.mark.parametrize("num_tensors", [1, 3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_copy_to_be_written_has_the_same_bytes_in_memory_of_its_own(dtype, num_tensors):
    arrays = {f"{i}": mx.random.normal((1, 2, 16, i + 4)).astype(dtype) for i in range(num_tensors)}
    [eager] = to_payloads([arrays])
    [payload] = to_payloads([arrays], on_device=True, are_written=True)
    assert payload.layout == eager.layout
    for name, tensor in payload.tensors.items():
        assert bytes(tensor.data) == bytes(eager.tensors[name].data)
        seen = memoryview(tensor.array.view(mx.uint8))
        assert np.frombuffer(tensor.data, np.uint8).ctypes.data != np.frombuffer(seen, np.uint8).ctypes.data
    payload.release_copies()
    for name, tensor in payload.tensors.items():
        assert tensor.source._copy is None
        assert bytes(tensor.data) == bytes(eager.tensors[name].data)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_lfm2])
def test_answers_are_the_same_from_ram_and_ssd(make, device_memory, tmp_path):
    model, prompt = make(), tokens(10 * BLOCK_SIZE + 5)
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        cold = engine.generate(prompt, max_tokens=8, logprobs=True)
    for has_read in (False, True):
        with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)) as engine:
            for _ in range(2):
                warm = engine.generate(prompt, max_tokens=8, logprobs=True)
                assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
            assert warm.usage.cached_tokens_hot == 10 * BLOCK_SIZE
            assert engine.cache.flush()
            held = [block.payload for block in engine.cache._paged._pool._blocks if block.payload is not None]
            tensors = [tensor for payload in held for tensor in payload.tensors.values()]
            sources = [tensor.source for tensor in tensors]
            assert {type(source) for source in sources} == {DeviceCopy}
            # All that was read, windows and checkpoints as well as rows, is in the few arrays that it was read to.
            assert not has_read or {type(tensor.array) for tensor in tensors} == {PackedTensor}
            assert {source._copy for source in sources} == {None}
    assert device_memory[True] > 0
    assert device_memory[False] == 0


def test_without_an_ssd_tier_nothing_is_copied_or_looked_at(device_memory):
    with Engine(tiny_llama(), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate(tokens(100), max_tokens=3)
        assert engine.generate(tokens(100), max_tokens=3).usage.cached_tokens == 96
    assert device_memory == {True: 0, False: 0}
