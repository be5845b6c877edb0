"""What keys and values in eight bits (`cold_kv_bits=8`) do to what a model says behind them, and what they save.

    python benchmarks/cold_bits.py [--texts 24] [--context 512] [--continuation 64]

Pieces of this project's own documents are read by SmolLM2-135M. The keys and values of each context are put into blocks
and back, once as they are and once by way of eight bits, and the rest of the piece is scored behind both: its mean
log-probability, and how often the likeliest token is the same. Then both are continued greedily.

A table goes to standard error, JSON to standard output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omlx_core.mlx_backend import mx

import numpy as np
from harness import Figure, print_report, print_table
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from omlx_core.cache.parts import PrefixContent
from omlx_core.cache.payload import BlockPayload
from omlx_core.cache.quantized_payload import dequantize, quantize
from omlx_core.model.sample_model import ensure_sample_model
from omlx_core.state.prompt_state import PromptCache, PromptStateCodec

BLOCK_SIZE = 256
ROOT = Path(__file__).parents[1]


def read_texts(tokenizer: Any, num_texts: int, num_tokens: int) -> list[list[int]]:
    """Pieces of documentation of so many tokens, evenly spread."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    token_ids = tokenizer.encode("\n\n".join(page.read_text(encoding="utf-8") for page in pages))
    starts = np.linspace(0, len(token_ids) - num_tokens, num_texts).astype(int)
    return [token_ids[start : start + num_tokens] for start in starts]


def read_context(model: Any, token_ids: Sequence[int]) -> PromptCache:
    prompt_cache: PromptCache = make_prompt_cache(model)
    model(mx.array(token_ids)[None], cache=prompt_cache)
    mx.eval([layer.state for layer in prompt_cache])
    return prompt_cache


def by_way_of(blocks: Callable[[BlockPayload], BlockPayload], codec: PromptStateCodec, state: PromptCache) -> Any:
    """A prompt cache of the blocks of another one, each changed first."""
    num_tokens = state[0].offset
    copies = codec.rows_of(state, num_tokens)
    rows = [blocks(copies.copy(start, start + BLOCK_SIZE)) for start in range(0, num_tokens, BLOCK_SIZE)]
    prompt_cache, _ = codec.restore(PrefixContent(rows, {}), num_tokens=num_tokens, capacity=num_tokens)
    return prompt_cache


def score(model: Any, prompt_cache: Any, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each token behind the first, and the likeliest one in its place."""
    logits = model(mx.array(token_ids[:-1])[None], cache=prompt_cache)[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logprobs, mx.array(token_ids[1:])[:, None], axis=-1)[:, 0]
    return np.array(own), np.array(mx.argmax(logprobs, axis=-1))


def continued(model: Any, prompt_cache: Any, token_id: int, num_tokens: int) -> list[int]:
    """What is said after a context and one token more, the likeliest token each time."""
    tokens = generate_step(mx.array([token_id]), model, max_tokens=num_tokens, prompt_cache=prompt_cache)
    return [int(token) for token, _ in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--context", type=int, default=512, help=f"tokens; a multiple of {BLOCK_SIZE}")
    parser.add_argument("--continuation", type=int, default=64, help="tokens that are scored, and generated")
    args = parser.parse_args()
    model, tokenizer = load(str(ensure_sample_model()))[:2]
    codec = PromptStateCodec(make_prompt_cache(model), BLOCK_SIZE)
    ways: dict[str, Callable[[BlockPayload], BlockPayload]] = {
        "exact": lambda block: block,
        "eight bits": lambda block: dequantize(quantize(block)),
    }
    scores: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    likeliest: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    same_answers, saved = [], []
    for text in tqdm(read_texts(tokenizer, args.texts, args.context + args.continuation), desc="texts"):
        context, rest = text[: args.context], text[args.context - 1 :]
        state, answers = read_context(model, context), []
        for way, change in ways.items():
            own, places = score(model, by_way_of(change, codec, state), rest[1:])
            scores[way].append(own)
            likeliest[way].append(places)
            answers.append(continued(model, by_way_of(change, codec, state), rest[1], args.continuation))
        same_answers.append(answers[0] == answers[1])
        block = codec.rows_of(state, BLOCK_SIZE).copy(0, BLOCK_SIZE)
        saved.append(quantize(block).size_bytes / block.size_bytes)
    means = {way: float(np.mean(np.concatenate(values))) for way, values in scores.items()}
    agreement = np.mean(np.concatenate(likeliest["exact"]) == np.concatenate(likeliest["eight bits"]))
    figures = [
        Figure("bytes of a block, of the exact ones", float(np.mean(saved)), "x"),
        Figure("mean log-probability of the text; limit: exact", means["eight bits"], "", limit=means["exact"]),
        Figure("likeliest token is the exact one's", 100 * float(agreement), "%"),
        Figure(f"greedy answers of {args.continuation} tokens that are equal", 100 * float(np.mean(same_answers)), "%"),
    ]
    print_table(figures)
    print_report(arguments=vars(args), figures=[figure.as_dict() for figure in figures])


if __name__ == "__main__":
    main()
