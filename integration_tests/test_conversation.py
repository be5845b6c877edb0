"""A long conversation with tools, on the real model: every turn reads only what is new."""

import itertools
import json

import pytest

from omlx_core import CacheSettings, Engine

BLOCK_SIZE = 16
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
]
QUESTIONS = itertools.cycle(["How is the weather in Paris?", "And in Rome tomorrow?", "Naïve question: Zürich, warm?"])


@pytest.fixture(scope="module")
def engine(sample_model):
    with Engine.from_pretrained(sample_model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        yield engine


def test_each_of_ten_turns_with_tool_calls_prefills_only_what_is_new(engine):
    messages = [{"role": "system", "content": "You are a helpful weather assistant."}]
    known_tokens = 0
    surplus = []
    for turn, question in zip(range(5), QUESTIONS, strict=False):
        messages.append({"role": "user", "content": question})
        call = engine.generate(
            messages, tools=TOOLS, tool_choice="get_weather", max_tokens=60, temperature=0.8, seed=turn
        )
        [tool_call] = call.tool_calls
        assert (call.finish_reason, call.invalid_tool_calls) == ("tool_calls", [])
        assert set(tool_call.arguments) == {"city", "days"}
        function = {"name": tool_call.name, "arguments": json.dumps(dict(tool_call.arguments), ensure_ascii=False)}
        messages += [
            {
                "role": "assistant",
                "content": call.text,
                "tool_calls": [{"id": tool_call.id, "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": tool_call.id, "content": '{"celsius": 21}'},
        ]
        answer = engine.generate(messages, tools=TOOLS, max_tokens=12, temperature=0.8, seed=turn)
        messages.append({"role": "assistant", "content": answer.text})
        for result in (call, answer):
            new_tokens = result.usage.prompt_tokens - known_tokens
            surplus.append(result.usage.prompt_tokens - result.usage.cached_tokens - new_tokens)
            known_tokens = result.usage.prompt_tokens + result.usage.completion_tokens
    assert len(surplus) == 10
    # The first prompt is all new. Of what is known, only the tokens that don't fill a block are read again.
    assert max(surplus) <= BLOCK_SIZE


def test_answer_that_reads_otherwise_tokenized_keeps_its_ids(engine):
    """At a high temperature a model often spells a text in other tokens than the tokenizer would."""
    messages = [{"role": "user", "content": "Write some words. 2"}]
    answer = engine.generate(messages, max_tokens=50, temperature=1.3, seed=2)
    own_ids = engine.tokenizer.encode(answer.text, add_special_tokens=False)
    assert own_ids != [token_id for token_id in answer.token_ids if token_id not in engine.tokenizer.eos_token_ids]
    turn = [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "Go on."}]
    again = engine.generate(turn, max_tokens=1)
    known_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert again.usage.cached_tokens >= known_tokens - 1 - BLOCK_SIZE
    assert again.divergence is None


def test_structured_answers_and_free_ones_share_a_batch(engine):
    from omlx_core.engine.constraints import JSONSchema

    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}, "required": ["city"]}
    prompt = [{"role": "user", "content": "Name a city."}]
    alone = engine.generate(prompt, max_tokens=12)
    streams = [
        engine.stream(prompt, max_tokens=40, constraint=JSONSchema(schema)),
        engine.stream(prompt, max_tokens=12),
        engine.stream(prompt, max_tokens=40, constraint=JSONSchema(schema), temperature=1.0, seed=1),
    ]
    firsts = [next(stream) for stream in streams]
    constrained, free, sampled = [list(stream)[-1].result for stream in streams]
    assert len(firsts) == 3
    assert free.text == alone.text
    for result in (constrained, sampled):
        assert result.finish_reason == "stop"
        assert list(json.loads(result.text)) == ["city"]
