"""Memory is sent to an NVIDIA GPU ahead of its use where the driver can be asked, and nothing fails where it can't."""

import ctypes
import threading

import numpy as np
import pytest
from filled_layers import BLOCK_SIZE, capture, filled_layer

from omlx_core.state import cuda_memory, packed_blocks, prompt_state
from omlx_core.state.cuda_memory import CudaDriver, prefetch
from omlx_core.state.prompt_state import PromptStateCodec

MEMORY = np.zeros(4096, np.uint8)


class Driver:
    """Stands in for libcuda: notes what it is asked, and refuses what it is told to."""

    def __init__(self, *refused, is_managed=1):
        self.refused = refused
        self.is_managed = is_managed
        self.calls = []

    def __getattr__(self, name):
        def function(*arguments):
            self.calls.append((name, arguments, threading.get_ident()))
            if name == "cuPointerGetAttribute":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = self.is_managed
            return 201 if name in self.refused else 0

        return function

    def named(self, name):
        return [arguments for each, arguments, _ in self.calls if each == name]


@pytest.fixture
def use(monkeypatch):
    def use(library):
        monkeypatch.setattr(cuda_memory, "_driver", lambda: CudaDriver(library, 0))
        return library

    return use


def test_all_of_the_memory_is_asked_for(use):
    library = use(Driver())
    assert prefetch(MEMORY)
    [(address, size, _, _)] = library.named("cuMemPrefetchAsync")
    assert (address.value, size.value) == (MEMORY.ctypes.data, 4096)


def test_every_thread_enters_the_context_once(monkeypatch):
    library = Driver()
    driver = CudaDriver(library, 0)
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    for _ in range(2):
        thread = threading.Thread(target=lambda: (prefetch(MEMORY), prefetch(MEMORY)))
        thread.start()
        thread.join()
    entered = [thread for name, _, thread in library.calls if name == "cuCtxSetCurrent"]
    assert len(entered) == 3
    assert len(library.named("cuMemPrefetchAsync")) == 4


@pytest.mark.parametrize(
    "library", [Driver("cuMemPrefetchAsync"), Driver(is_managed=0)], ids=["refused", "not managed"]
)
def test_what_the_driver_does_not_do_is_left(use, library):
    use(library)
    assert not prefetch(MEMORY)


@pytest.mark.parametrize("refused", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuStreamCreate"])
def test_a_driver_without_a_gpu_is_not_used(monkeypatch, refused):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(refused))
    cuda_memory._driver.cache_clear()
    assert not prefetch(MEMORY)
    cuda_memory._driver.cache_clear()


def test_without_a_driver_nothing_is_asked_for(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda_memory._driver.cache_clear()
    assert not prefetch(MEMORY)
    cuda_memory._driver.cache_clear()


def test_a_block_that_was_read_is_sent_whole(monkeypatch):
    monkeypatch.setattr(prompt_state, "has_device_memory", lambda: True)
    sent = []
    monkeypatch.setattr(packed_blocks, "prefetch", lambda data: sent.append(data.nbytes))
    layers = [filled_layer(2 * BLOCK_SIZE, value_dim=4)]
    codec = PromptStateCodec(layers, BLOCK_SIZE)
    payload = capture(codec, layers, 2)[1]
    buffers = codec.allocate({1: payload.layout}, capacity=2 * BLOCK_SIZE)
    buffers.prepare(1)
    buffers.complete(1)
    assert sum(sent) == payload.size_bytes
