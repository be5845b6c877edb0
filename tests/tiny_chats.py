"""Tokenizers with merges and chat templates, for tests of chats: a text has many spellings in their tokens."""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MARKERS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]

# As Qwen 3 has it: reasoning is shown of the current question's answers only.
QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and message.content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# As Qwen 3's thinking models have it: an answer begins within its reasoning.
THINKING_TEMPLATE = QWEN_TEMPLATE.replace(
    "'<|im_start|>assistant\\n' }}\n    {%- if enable", "'<|im_start|>assistant\\n<think>\\n' }}\n    {%- if enable"
)

_MERGES = ["th", "the", " t", " th", " the", "he", "in", "er", "an", " a", "on", "or", "is", "ti", "ing", "me", "na"]
_MERGES += ["nam", "name", '{"', '{"name', '":', ' "', '", ', "ar", "arg", "argu", "um", "ent", '"}', "}}", "\\n", "  "]


def chat_tokenizer(
    template: str | dict[str, str] | None = QWEN_TEMPLATE,
    *,
    parser: str | None = "json_tools",
    markers: list[str] | None = None,
    vocab_size: int = 512,
) -> TokenizerWrapper:
    """A byte-level tokenizer with some merges, `markers` as special tokens, and one of mlx-lm's parsers.

    Every id up to `vocab_size` has a text of its own.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper  # imports MLX

    markers = MARKERS if markers is None else markers
    texts, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in _MERGES:
        pieces = [piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)]
        text = pieces[0]
        for end in range(2, len(text) + 1):
            if text[:end] not in texts:
                texts.append(text[:end])
                merges.append((text[: end - 1], text[end - 1]))
    texts += markers
    texts += [f"<filler-{number}>" for number in range(vocab_size - len(texts))]
    tokenizer = Tokenizer(models.BPE(vocab={text: position for position, text in enumerate(texts)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(markers)
    end = "<|im_end|>" if "<|im_end|>" in markers else markers[0]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, chat_template=template)
    return TokenizerWrapper(fast, BPEStreamingDetokenizer, **parser_options(parser))


def parser_options(parser: str | None) -> dict[str, Any]:
    """What mlx-lm hands a tokenizer wrapper for a parser of its own, by the parser's name."""
    if parser is None:
        return {}
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return {
        "tool_parser": module.parse_tool_call,
        "tool_call_start": module.tool_call_start,
        "tool_call_end": module.tool_call_end,
    }


def misspell(tokenizer: TokenizerWrapper, text: str, seed: int = 0) -> list[int]:
    """Token ids of a text that its tokenizer would not give: cut at random, special tokens left whole."""
    draw = random.Random(seed)
    ids: list[int] = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        piece = tokenizer.decode([token_id])
        if token_id in tokenizer.added_tokens_decoder or len(piece) < 2 or draw.random() < 0.3:
            ids.append(token_id)
        else:
            ids += [i for character in piece for i in tokenizer.encode(character, add_special_tokens=False)]
    return ids


def tool(name: str = "add", **properties: str) -> dict[str, Any]:
    """A tool whose arguments are of the JSON types given."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


def call(name: str = "add", call_id: str = "call_1", **arguments: Any) -> dict[str, Any]:
    """A tool call as a message carries it."""
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}
