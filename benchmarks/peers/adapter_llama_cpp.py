"""llama.cpp through llama-cpp-python: its saved state, in RAM and in a session file.

Guarantees: a session file is written in place, without fsync, rename or checksum. The state is that of the context,
the whole sequence, its keys and values in float16. The model is the GGUF file itself, 4-bit weights on llama.cpp's own
kernels, where ours and mlx-lm compute in float32 what these weights mean: compare its warm times with its own cold one.
"""

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
from protocol import Stopwatch, serve

FILE_NAME = "session.bin"
CONTEXT_TOKENS = 4096


def open_model(gguf: str, warm_up: list[int]) -> llama_cpp.Llama:
    llama = llama_cpp.Llama(gguf, n_ctx=CONTEXT_TOKENS, verbose=False)
    answer(llama, warm_up, 1, Stopwatch())
    return llama


def answer(llama: llama_cpp.Llama, prompt: list[int], max_tokens: int, watch: Stopwatch) -> tuple[float, list[int]]:
    """Seconds until the first token, on a watch that has been running since the request came, and all tokens."""
    steps = llama.generate(prompt, temp=0.0)  # greedy; reads again only what the context doesn't hold
    first = next(steps)
    ttft_s = watch.elapsed_s()
    return ttft_s, [first, *(next(steps) for _ in range(max_tokens - 1))]


def ask_twice(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    llama = open_model(model, warm_up)
    cold_s, cold = answer(llama, prompt, max_tokens, Stopwatch())
    state = llama.save_state()
    tokens = llama.input_ids[: llama.n_tokens].tolist()
    session = str(Path(directory) / FILE_NAME).encode()
    token_array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if not llama_cpp.llama_state_save_file(llama.ctx, session, token_array, len(tokens)):
        raise RuntimeError("the session file was not written")
    answer(llama, warm_up, 1, Stopwatch())  # another prompt takes the context
    watch = Stopwatch()
    llama.load_state(state)
    ram_s, ram = answer(llama, prompt, max_tokens, watch)
    return {"cold_s": cold_s, "cold": cold, "ram_s": ram_s, "ram": ram}


def ask_again(model: str, directory: str, prompt: list[int], warm_up: list[int], max_tokens: int) -> dict[str, Any]:
    llama = open_model(model, warm_up)
    watch = Stopwatch()
    tokens, count = (llama_cpp.llama_token * CONTEXT_TOKENS)(), ctypes.c_size_t()
    session = str(Path(directory) / FILE_NAME).encode()
    if not llama_cpp.llama_state_load_file(llama.ctx, session, tokens, CONTEXT_TOKENS, ctypes.byref(count)):
        raise RuntimeError("the session file was not read")
    # What `Llama.load_state` does for a state in RAM.
    llama.input_ids[: count.value] = tokens[: count.value]
    llama.n_tokens = count.value
    llama._requires_eval = True
    ssd_s, ssd = answer(llama, prompt, max_tokens, watch)
    return {"ssd_s": ssd_s, "ssd": ssd}


if __name__ == "__main__":
    serve({"ask_twice": ask_twice, "ask_again": ask_again}, ("llama-cpp-python", "numpy"))
