"""Chats through the engine: what arrives of an answer, and what of a conversation is computed again."""

import json

from omlx_core.mlx_backend import mx

import pytest
from mlx_lm.models.llama import Model
from tiny_chats import QWEN_TEMPLATE, chat_tokenizer, misspell, tool
from tiny_models import tiny_llama
from tiny_tokenizer import CHAT_TEMPLATE

from omlx_core import CacheSettings, Engine, EngineSettings
from omlx_core.errors import InvalidPromptError, InvalidToolError

BLOCK_SIZE = 4
ADD = tool("add", a="integer", b="integer")
USER = {"role": "user", "content": "the sum in the ring"}


class ScriptedModel(Model):
    """A llama that says what it is told: the token at each place of a sequence comes from `script`."""

    def __call__(self, inputs, cache=None, **options):
        logits = super().__call__(inputs, cache=cache, **options)
        offsets = mx.array(cache[0].offset).reshape(-1).tolist()
        next_ids = [self.script[offset] if offset < len(self.script) else 0 for offset in offsets]
        return mx.where(mx.arange(logits.shape[-1]) == mx.array(next_ids)[:, None, None], 1.0, mx.zeros_like(logits))


@pytest.fixture
def model():
    model = tiny_llama()
    model.__class__ = ScriptedModel
    return model


def tell(engine, model, prompt, answer_ids, **options):
    """Tell the model how to answer a prompt; returns the prompt's length."""
    object.__setattr__(model, "script", [])
    length = engine.generate(prompt, max_tokens=1, store=False, **options).usage.prompt_tokens
    object.__setattr__(model, "script", [0] * length + answer_ids)
    return length


def answer(engine, model, prompt, text, **options):
    """Have the model answer in tokens of its own; returns the chunks and the length of prompt and answer."""
    answer_ids = [*misspell(engine.tokenizer, text, seed=len(prompt)), engine.tokenizer.eos_token_id]
    length = tell(engine, model, prompt, answer_ids, **options)
    chunks = list(engine.stream(prompt, max_tokens=200, **options))
    assert chunks[-1].result.token_ids == answer_ids
    return chunks, length + len(answer_ids)


def converse(engine, model, template_call, num_turns=10):
    """A conversation with a call in every second turn; yields what was reused, and what could have been."""
    messages = [{"role": "system", "content": "Be brief."}, USER]
    reusable = 0
    for turn in range(num_turns):
        call = template_call % (json.dumps({"name": "add", "arguments": {"a": turn, "b": 1}}))
        text = f"in the ring\n{call}" if turn % 2 else "the name in the ring"
        chunks, length = answer(engine, model, messages, text, tools=[ADD])
        result = chunks[-1].result
        yield result.usage.cached_tokens, reusable
        # The last token ended the answer, and need not have been computed.
        reusable = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
        calls = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in result.tool_calls
        ]
        messages.append({"role": "assistant", "content": result.text, "tool_calls": calls})
        messages += [{"role": "tool", "content": "3", "tool_call_id": call["id"]} for call in calls]
        if not calls:
            messages.append(USER)


@pytest.mark.parametrize(
    ("template", "parser", "call"),
    [
        (QWEN_TEMPLATE, "json_tools", "<tool_call>\n%s\n</tool_call>"),
        (CHAT_TEMPLATE, None, "<tool_call>%s</tool_call>"),
    ],
)
def test_every_turn_of_a_conversation_computes_only_what_is_new(model, template, parser, call):
    tokenizer = chat_tokenizer(template, parser=parser)
    cache = CacheSettings(block_size=BLOCK_SIZE)
    with Engine(model, tokenizer, cache=cache) as engine:
        turns = [*converse(engine, model, call)]
    assert all(reused >= reusable for reused, reusable in turns)
    with Engine(model, tokenizer, cache=cache, settings=EngineSettings(token_faithful_history=False)) as engine:
        turns = [*converse(engine, model, call, num_turns=4)]
    assert sum(reused for reused, _ in turns) < sum(reusable for _, reusable in turns)


def test_chunks_of_a_chat_join_to_its_result(model):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    text = f"<think>\nthe thing\n</think>\n\nin the ring\n{call}\n<tool_call>oops</tool_call>"
    with Engine(model, chat_tokenizer()) as engine:
        chunks, _ = answer(engine, model, [USER], text, tools=[ADD])
    result = chunks[-1].result
    assert (result.text, result.reasoning, result.finish_reason) == ("in the ring", "the thing", "tool_calls")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert [call.text for call in result.invalid_tool_calls] == ["oops"]
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == result.reasoning
    assert [call for chunk in chunks for call in chunk.tool_calls] == result.tool_calls
    assert [call for chunk in chunks for call in chunk.invalid_tool_calls] == result.invalid_tool_calls


def test_answer_that_is_cut_off_within_a_call_has_an_invalid_one(model):
    with Engine(model, chat_tokenizer()) as engine:
        tell(engine, model, [USER], engine.tokenizer.encode('<tool_call>\n{"name": "add"'), tools=[ADD])
        result = engine.generate([USER], tools=[ADD], max_tokens=5)
    assert (result.finish_reason, result.text, result.tool_calls) == ("length", "", [])
    assert result.invalid_tool_calls[0].text.startswith('\n{"name')


def test_text_prompt_is_answered_with_text(model):
    with Engine(model, chat_tokenizer()) as engine:
        text = "<think>\nHm</think><tool_call>{}</tool_call>"
        chunks, _ = answer(engine, model, "the ", text)
    assert (chunks[-1].result.text, chunks[-1].result.reasoning) == (text, "")


def test_what_a_chat_cannot_have_is_refused_at_once(model):
    with Engine(model, chat_tokenizer(CHAT_TEMPLATE, parser=None)) as engine:
        with pytest.raises(InvalidToolError, match="knows no tools"):
            engine.stream([USER], tools=[ADD], tool_format="template")
        with pytest.raises(InvalidToolError, match="isn't a chat"):
            engine.stream("text", tools=[ADD])
        with pytest.raises(InvalidPromptError, match=r"prompt\[0\]\['role'\]='usr'"):
            engine.stream([{"role": "usr", "content": "x"}])
        with pytest.raises(InvalidPromptError, match="end with an assistant's message"):
            engine.stream([USER], continue_final_message=True)
