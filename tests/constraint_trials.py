"""Tokenizers with the markers of real chat models, and answers of a random model that follows constraints."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from omlx_core.mlx_backend import mx

from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_tokenizer import tiny_tokenizer
from tokenizers import AddedToken

from omlx_core.engine.constraint_compiler import CompiledConstraint
from omlx_core.engine.constraint_processor import ConstraintProcessor
from omlx_core.engine.sampling import LogitsProcessor

END_TOKEN = "<|im_end|>"
# More than the tokenizers below have: a model's logits are often wider than its vocabulary.
MODEL_VOCAB_SIZE = 512


def marked_tokenizer(*markers: str, parser: str | None = None, chat_template: str | None = None) -> TokenizerWrapper:
    """A byte-level tokenizer that has markers as single tokens; as in Qwen's, Hugging Face calls them not special.

    Args:
        markers: the tokens to add.
        parser: the name of mlx-lm's parser of the model's tool calls.
        chat_template: the template that says how calls are written.
    """
    tokenizer = tiny_tokenizer(300, **({"chat_template": chat_template} if chat_template else {}))._tokenizer
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in markers])
    if parser is None:
        return TokenizerWrapper(tokenizer)
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return TokenizerWrapper(
        tokenizer,
        tool_parser=module.parse_tool_call,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
    )


def answers(
    model: Any,
    end_token_ids: Sequence[int],
    processors: Sequence[LogitsProcessor | None],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_tokens: int = 200,
    favoured: Sequence[int] = (),
) -> list[list[int]]:
    """The tokens of answers that are generated in one batch of mlx-lm, each with its own processor or none.

    All have prompts of their own length, and nothing is shared by the samplers of two. A random model hardly ever ends
    what may go on: constrained answers take `favoured` tokens more often.
    """
    bias = mx.zeros(MODEL_VOCAB_SIZE).at[mx.array([*favoured], dtype=mx.int32)].add(4)
    keys = mx.random.split(mx.random.key(seed), len(processors))
    generator = BatchGenerator(model, stop_tokens=[[token_id] for token_id in end_token_ids])
    uids = generator.insert(
        [[7 * position + offset for offset in range(position + 2)] for position in range(len(processors))],
        max_tokens=[max_tokens] * len(processors),
        samplers=[make_sampler(0) if temperature == 0 else _sampler(key, temperature) for key in keys],
        logits_processors=[
            [] if processor is None else [lambda _, logits: logits + bias, processor] for processor in processors
        ],
    )
    token_ids: dict[int, list[int]] = {uid: [] for uid in uids}
    num_open = len(uids)
    while num_open:
        for response in generator.next()[1]:
            token_ids[response.uid].append(response.token)
            num_open -= response.finish_reason is not None
    generator.close()
    return [token_ids[uid] for uid in uids]


def _sampler(key: mx.array, temperature: float) -> Any:
    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, subkey = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=subkey)

    return sample


def allowed_ids(
    processor: ConstraintProcessor, token_ids: Sequence[int], vocab_size: int = MODEL_VOCAB_SIZE
) -> set[int]:
    """The tokens that a processor leaves possible after a sequence."""
    row = processor(mx.array(token_ids, dtype=mx.int32), mx.zeros((1, vocab_size)))
    return {token_id for token_id, logit in enumerate(row.tolist()[0]) if logit == 0}


def allowed_along(
    processor: ConstraintProcessor, token_ids: Sequence[int], vocab_size: int = MODEL_VOCAB_SIZE
) -> list[set[int]]:
    """What is allowed first, and after each of some tokens, which are fed one by one after a prompt."""
    prompt = [1, 2, 3]
    return [allowed_ids(processor, [*prompt, *token_ids[:count]], vocab_size) for count in range(len(token_ids) + 1)]


def is_whole_answer(compiled: CompiledConstraint, tokenizer: TokenizerWrapper, text: str, **options: Any) -> bool:
    """Whether a text follows a constraint from its beginning to its end; `options` are those of `make_processor`."""
    processor = compiled.make_processor(**options)
    return tokenizer.eos_token_id in allowed_along(processor, tokenizer.encode(text))[-1] and processor.error is None
