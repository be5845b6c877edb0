"""What a constraint's processor allows: around thinking, when the answer is complete, and when nothing fits."""

import logging
import sys
from functools import partial
from types import SimpleNamespace

from omlx_core.mlx_backend import mx

import numpy as np
import pytest
from constraint_trials import MODEL_VOCAB_SIZE, allowed_along, allowed_ids, answers, is_whole_answer, marked_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omlx_core import CacheSettings, Engine
from omlx_core.engine import constraint_processor
from omlx_core.engine.constraint_compiler import ConstraintCompiler
from omlx_core.engine.constraint_processor import apply_mask
from omlx_core.engine.constraints import Choice, Grammar, JSONSchema, Regex
from omlx_core.errors import UnmetConstraintError
from omlx_core.model.tool_calls import template_format

LONG_START, LONG_END = ("<|open|>", "think", "<|sep|>"), ("<|close|>", "think", "<|sep|>")


@pytest.fixture(scope="module")
def tokenizer():
    return marked_tokenizer("<think>", "</think>", "<|open|>", "<|close|>", "<|sep|>")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return ConstraintCompiler(tokenizer)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Token ids of text."""
    return lambda *texts: [token_id for text in texts for token_id in tokenizer.encode(text)]


def thinking(ids):
    return {"thinking_start": ids("<think>"), "thinking_end": ids("</think>")}


# Thinking


def test_thoughts_are_free_but_cant_end_the_answer(tokenizer, compiler, ids):
    processor = compiler.compile(Choice(("yes",)), **thinking(ids)).make_processor(starts_in_thinking=True)
    for allowed in allowed_along(processor, ids("no, <|im_start|>")):
        assert allowed == {*range(len(tokenizer))} - {tokenizer.eos_token_id}


@pytest.mark.parametrize("vocab_size", [200, 258, 305, 400])
def test_logits_may_be_narrower_or_wider_than_the_vocabulary_within_thinking(tokenizer, compiler, ids, vocab_size):
    processor = compiler.compile(Choice(("yes",)), **thinking(ids)).make_processor(starts_in_thinking=True)
    expected = {*range(min(vocab_size, len(tokenizer)))} - {tokenizer.eos_token_id}
    assert allowed_ids(processor, [1, 2, 3], vocab_size) == expected


def test_the_grammar_starts_after_thinking_and_up_to_two_line_breaks(compiler, ids):
    processor = compiler.compile(Choice(("yes",)), **thinking(ids)).make_processor(starts_in_thinking=True)
    allowed = allowed_along(processor, ids("hm", "</think>", "\n", "\n", "y", "e"))
    [newline], [y] = ids("\n"), ids("y")
    assert [{*after} for after in allowed[3:]] == [{newline, y}, {newline, y}, {y}, {*ids("e")}, {*ids("s")}]


def test_a_model_may_open_thinking_itself_or_answer_at_once(tokenizer, compiler, ids):
    compiled = compiler.compile(Choice(("yes",)), **thinking(ids))
    [newline], [y], [opening] = ids("\n"), ids("y"), ids("<think>")
    opened = allowed_along(compiled.make_processor(), ids("<think>", "a", "</think>", "y"))
    assert opened[0] == {newline, y, opening}
    assert len(opened[1]) == len(opened[2]) == len(tokenizer) - 1
    assert opened[3:] == [{newline, y}, {*ids("e")}]
    answered = allowed_along(compiled.make_processor(), ids("y", "e", "s"))
    assert opening not in set().union(*answered[1:])


def test_without_thinking_the_grammar_starts_at_once(compiler, ids):
    processor = compiler.compile(Choice(("yes",))).make_processor(starts_in_thinking=True)
    assert allowed_along(processor, []) == [{*ids("y")}]


def test_markers_of_several_tokens_are_followed_to_their_end(tokenizer, compiler, ids):
    start, end = ids(*LONG_START), ids(*LONG_END)
    compiled = compiler.compile(Choice(("yes",)), thinking_start=start, thinking_end=end)
    processor = compiled.make_processor()
    first, *opening = allowed_along(processor, start)
    assert start[0] in first
    assert opening[:-1] == [{token_id} for token_id in start[1:]]
    assert len(opening[-1]) == len(tokenizer) - 1
    thoughts = [*start, *ids("<|close|>", "thin", "<|sep|>"), *end]
    for count in range(len(start) + 1, len(thoughts)):
        assert len(allowed_ids(processor, [1, 2, 3, *thoughts[:count]])) == len(tokenizer) - 1
    assert allowed_ids(processor, [1, 2, 3, *thoughts]) == {*ids("\n"), *ids("y")}


def test_an_answer_may_begin_like_the_marker_of_thinking(compiler, ids):
    grammar = Grammar('start: <|open|> "tool" <|sep|>')
    compiled = compiler.compile(grammar, thinking_start=ids(*LONG_START), thinking_end=ids(*LONG_END))
    [t], [h], [o] = ids("t"), ids("h"), ids("o")
    as_answer = allowed_along(compiled.make_processor(), ids("<|open|>", "tool", "<|sep|>"))
    assert as_answer[2] == {h, o}
    assert as_answer[1] == {t}
    assert as_answer[3:] == [{o}, {*ids("l")}, {*ids("<|sep|>")}, {257}]
    as_thoughts = allowed_along(compiled.make_processor(), ids("<|open|>", "th"))
    assert as_thoughts[-1] == {*ids("i")}
    after_thoughts = allowed_along(compiled.make_processor(), ids(*LONG_START, "a", *LONG_END, "<|open|>"))
    assert after_thoughts[-2:] == [{*ids("\n"), *ids("<|open|>")}, {t}]


@pytest.mark.parametrize("constraint", [None, Choice(("yes",))])
def test_a_call_may_start_within_thinking(constraint):
    tokenizer = marked_tokenizer("<think>", "</think>", "<tool_call>", "</tool_call>", parser="json_tools")
    ping = {"type": "function", "function": {"name": "ping", "parameters": {}}}
    compiled = ConstraintCompiler(tokenizer).compile(
        constraint,
        tools=[ping],
        tool_choice="auto" if constraint else "required",
        call_format=template_format(tokenizer),
        thinking_end=tokenizer.encode("</think>"),
    )
    answer = 'so <tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    assert is_whole_answer(compiled, tokenizer, answer, starts_in_thinking=True)


def test_the_start_of_a_call_is_a_thought_where_none_may_be_made():
    tokenizer = marked_tokenizer("</think>", "<tool_call>", "</tool_call>", parser="json_tools")
    compiled = ConstraintCompiler(tokenizer).compile(
        Choice(("yes",)), call_format=template_format(tokenizer), thinking_end=tokenizer.encode("</think>")
    )
    processor = compiled.make_processor(starts_in_thinking=True)
    assert len(allowed_along(processor, tokenizer.encode("so <tool_call>"))[-1]) == len(tokenizer) - 1


def test_a_token_that_calls_share_with_other_markup_is_a_thought():
    tokenizer = marked_tokenizer("</think>", "<|open|>", "<|close|>", "<|sep|>", parser="kimi_k3")
    ping = {"type": "function", "function": {"name": "ping", "parameters": {}}}
    compiled = ConstraintCompiler(tokenizer).compile(
        Choice(("yes",)),
        tools=[ping],
        call_format=template_format(tokenizer),
        thinking_end=tokenizer.encode("</think>"),
    )
    processor = compiled.make_processor(starts_in_thinking=True)
    assert len(allowed_along(processor, tokenizer.encode("so <|open|>"))[-1]) == len(tokenizer) - 1


def test_a_thinking_models_answer_is_what_the_schema_asks_for(model, tokenizer, compiler, ids):
    compiled = compiler.compile(JSONSchema({"enum": [True, False]}), **thinking(ids))
    hurry = mx.zeros(MODEL_VOCAB_SIZE).at[ids("</think>")[0]].add(4)

    def thinker():
        processor = compiled.make_processor(starts_in_thinking=True)
        return lambda tokens, logits: processor(tokens, logits + hurry)

    all_thoughts = ""
    for token_ids in answers(model, tokenizer.eos_token_ids, [thinker() for _ in range(4)], max_tokens=1000):
        thoughts, _, answer = tokenizer.decode(token_ids[:-1]).partition("</think>")
        all_thoughts += thoughts
        assert answer.lstrip("\n") in ("true", "false")
        assert token_ids[-1] == tokenizer.eos_token_id
    assert all_thoughts


# The end


def test_after_a_complete_answer_only_end_tokens_are_allowed_for_ever(tokenizer, compiler, ids):
    end = tokenizer.eos_token_id
    processor = compiler.compile(Choice(("a",))).make_processor()
    assert allowed_along(processor, [*ids("a"), end, end]) == [{*ids("a")}, {end}, {end}, {end}]
    assert processor.error is None


def test_a_token_that_isnt_allowed_ends_the_answer_and_is_logged_once(tokenizer, compiler, ids, caplog):
    processor = compiler.compile(Regex("ab+")).make_processor()
    with caplog.at_level(logging.WARNING):
        allowed = allowed_along(processor, ids("ax", "b"))
    assert allowed[2:] == [{tokenizer.eos_token_id}] * 2
    assert "x" in processor.error
    assert "\n" not in processor.error
    assert [record.getMessage().count(processor.error) for record in caplog.records] == [1]


def test_engine_says_that_an_answer_could_not_follow_its_constraint(tokenizer):
    model = tiny_llama()
    with Engine(model, tokenizer, cache=CacheSettings(no_cache=True)) as engine:
        assert len(engine.generate("fine", max_tokens=30, constraint=Regex("[ab]{9}")).text) == 9
        # Logits that aren't numbers, from which a token is taken that isn't allowed.
        weight = mx.full(model.model.norm.weight.shape, mx.nan)
        mx.eval(weight)
        engine._scheduler.thread.call(partial(setattr, model.model.norm, "weight", weight))
        with pytest.raises(UnmetConstraintError, match=r"after token 1 .* use a simpler schema"):
            engine.generate("spoilt", max_tokens=30, constraint=Regex("[ab]{9}"))
        assert engine.num_active_requests == 0


def test_an_answer_that_fails_leaves_its_neighbours_alone(model, tokenizer, compiler):
    compiled = compiler.compile(JSONSchema({"type": "array", "items": {"enum": [1, 2]}, "minItems": 4, "maxItems": 9}))
    failing, fine = compiled.make_processor(), compiled.make_processor()

    def disturb(tokens, logits):
        return mx.full(logits.shape, mx.nan) if tokens.size == 5 else failing(tokens, logits)

    alone = answers(model, tokenizer.eos_token_ids, [None, compiled.make_processor()])
    disturbed, beside = answers(model, tokenizer.eos_token_ids, [disturb, fine])
    assert beside == alone[1]
    assert fine.error is None
    assert failing.error
    assert disturbed[-1] == tokenizer.eos_token_id


def test_a_character_without_token_ends_the_answer():
    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters.add_special_tokens(["</s>"])
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>"))
    processor = ConstraintCompiler(tokenizer).compile(Choice(("abc",))).make_processor()
    assert allowed_along(processor, [0, 1], vocab_size=3) == [{0}, {1}, {2}]
    assert processor.error


# Masks


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 65, 100])
def test_the_mask_is_applied_bit_by_bit(vocab_size):
    bits = np.random.default_rng(vocab_size).integers(0, 2, 64).astype(bool)
    mask = np.packbits(bits, bitorder="little").view(np.int32)[None]
    logits = mx.arange(vocab_size, dtype=mx.float32)[None]
    allowed = [*bits, *[False] * 36]
    expected = [float(index) if allowed[index] else -mx.inf for index in range(vocab_size)]
    assert apply_mask(logits, mask).tolist() == [expected]


def test_on_metal_the_mask_is_applied_by_llguidances_kernel(monkeypatch):
    monkeypatch.setattr(constraint_processor, "backend_name", lambda: "metal")
    kernel = SimpleNamespace(apply_token_bitmask=lambda logits, mask: (logits, mask))
    monkeypatch.setitem(sys.modules, "llguidance.mlx", kernel)
    logits, mask = mx.zeros((1, 40)), np.zeros((1, 2), dtype=np.int32)
    assert apply_mask(logits, mask) == (logits, mask)
