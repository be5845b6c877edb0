"""A byte-level tokenizer with a chat template, made on the spot for models of random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(vocab_size: int = 512, *, chat_template: str | None = CHAT_TEMPLATE) -> TokenizerWrapper:
    """One token for each byte, two special tokens, and fillers up to `vocab_size`, so that every id has a text."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper  # imports MLX, which the engine configures first

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*alphabet, *SPECIAL_TOKENS]
    if vocab_size < len(texts):
        raise ValueError(f"vocab_size={vocab_size} is less than the {len(texts)} tokens that bytes and chat need")
    texts += [f"<filler-{number}>" for number in range(vocab_size - len(texts))]
    tokenizer = Tokenizer(models.BPE(vocab={text: position for position, text in enumerate(texts)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=chat_template)
    return TokenizerWrapper(fast)
