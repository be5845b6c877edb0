"""Answers that follow a schema, a pattern, a grammar or a choice, alone and beside answers that follow nothing."""

import itertools
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from omlx_core.mlx_backend import mx

import pytest
from constraint_trials import MODEL_VOCAB_SIZE, allowed_along, allowed_ids, answers
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from omlx_core.engine import constraint_compiler
from omlx_core.engine.constraint_compiler import ConstraintCompiler
from omlx_core.engine.constraints import Choice, Grammar, JSONSchema, Regex
from omlx_core.errors import InvalidConstraintError, InvalidRequestError, MissingDependencyError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "boss": {"$ref": "#/$defs/boss"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": ["boolean", "null"]}},
}
SUM = 'start: NUMBER ("+" NUMBER){1,4} "=" \nNUMBER: /[1-9][0-9]{0,2}/'


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(300)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return ConstraintCompiler(tokenizer)


def is_person(text):
    person = json.loads(text)
    return (
        [*person] in (["name", "age", "tags"], ["name", "age", "tags", "boss"])
        and len(person["name"]) <= 6
        and type(person["age"]) is int
        and 0 <= person["age"] <= 130
        and set(person["tags"]) <= {"a", "b"}
        and len(person["tags"]) <= 3
        and person.get("boss") in (True, False, None)
    )


FOLLOWED = [
    (JSONSchema(PERSON), is_person),
    (Regex(r"[a-f]{2,5}(-\d\d?)?|x/y"), re.compile(r"[a-f]{2,5}(-\d\d?)?|x/y").fullmatch),
    (Grammar(SUM), re.compile(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){1,4}=").fullmatch),
    (Choice(("yes", "yesterday", 'no "\\\n', "é😀")), ["yes", "yesterday", 'no "\\\n', "é😀"].__contains__),
]


@pytest.mark.parametrize(("constraint", "is_followed"), FOLLOWED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_their_constraint_and_end(model, tokenizer, compiler, constraint, is_followed, temperature):
    compiled = compiler.compile(constraint)
    processors = [compiled.make_processor() for _ in range(8)]
    texts = set()
    for token_ids in answers(model, tokenizer.eos_token_ids, processors, temperature=temperature):
        assert token_ids[-1] in tokenizer.eos_token_ids
        texts.add(tokenizer.decode(token_ids[:-1]))
    assert all(map(is_followed, texts)), texts
    assert [processor.error for processor in processors] == [None] * 8
    assert len(texts) > 1 or temperature == 0


def test_json_is_spaced_as_json_dumps_does(model, tokenizer, compiler):
    compiled = compiler.compile(JSONSchema(PERSON))
    for token_ids in answers(model, tokenizer.eos_token_ids, [compiled.make_processor() for _ in range(4)]):
        text = tokenizer.decode(token_ids[:-1])
        assert text == json.dumps(json.loads(text), ensure_ascii=False)


def test_a_schema_may_ask_for_other_spacing(tokenizer, compiler):
    compact = {"type": "array", "items": {"const": 1}, "x-guidance": {"item_separator": ","}}
    comma, space, one = (tokenizer.encode(text)[0] for text in (",", " ", "1"))
    processor = compiler.compile(JSONSchema(compact)).make_processor()
    after_comma = allowed_along(processor, tokenizer.encode("[1,"))[-1]
    assert one in after_comma
    assert space not in after_comma
    default = compiler.compile(JSONSchema({"type": "array", "items": {"const": 1}})).make_processor()
    assert allowed_along(default, [*tokenizer.encode("[1"), comma])[-1] == {space}


def test_properties_come_in_the_schemas_order(model, tokenizer, compiler):
    names = ["zebra", "ant", "mole"]
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": names[::-1]}
    [token_ids] = answers(
        model,
        tokenizer.eos_token_ids,
        [compiler.compile(JSONSchema({**schema, "additionalProperties": False})).make_processor()],
    )
    assert [*json.loads(tokenizer.decode(token_ids[:-1]))] == names


@pytest.mark.parametrize("pattern", ["^ab+$", "ab+"])
def test_a_pattern_matches_the_whole_answer_with_or_without_anchors(tokenizer, compiler, pattern):
    processor = compiler.compile(Regex(pattern)).make_processor()
    a, b, end = *tokenizer.encode("ab"), tokenizer.eos_token_id
    assert allowed_along(processor, [a, b]) == [{a}, {b}, {b, end}]


def test_an_empty_pattern_allows_an_empty_answer_only(tokenizer, compiler):
    assert allowed_along(compiler.compile(Regex("")).make_processor(), []) == [{tokenizer.eos_token_id}]


# Batches


def test_unconstrained_answers_are_those_without_constrained_neighbours(model, tokenizer, compiler):
    free = [None, None, None, None]
    mixed = [None, compiler.compile(JSONSchema(PERSON)).make_processor(), None, None]
    alone = answers(model, tokenizer.eos_token_ids, free, max_tokens=40)
    together = answers(model, tokenizer.eos_token_ids, mixed, max_tokens=40)
    assert [alone[position] for position in (0, 2, 3)] == [together[position] for position in (0, 2, 3)]
    assert alone[1] != together[1]


def test_each_answer_of_a_batch_follows_its_own_constraint(model, tokenizer, compiler):
    kinds = [(constraint, check) for constraint, check in FOLLOWED for _ in range(2)]
    processors = [compiler.compile(constraint).make_processor() for constraint, _ in kinds]
    for token_ids, (_, is_followed) in zip(answers(model, tokenizer.eos_token_ids, processors), kinds, strict=True):
        assert is_followed(tokenizer.decode(token_ids[:-1]))


def test_answers_of_one_constraint_are_independent(tokenizer, compiler):
    compiled = compiler.compile(Choice(("ab", "cd")))
    first, second = compiled.make_processor(), compiled.make_processor()
    a, b, c, d = tokenizer.encode("abcd")
    assert allowed_along(first, [a])[-1] == {b}
    assert allowed_along(second, [c])[-1] == {d}
    assert allowed_ids(first, [1, 2, 3, a, b]) == {tokenizer.eos_token_id}


def test_mlx_lms_plain_generation_follows_it_too(model, tokenizer, compiler):
    processor = compiler.compile(JSONSchema(PERSON)).make_processor()
    steps = generate_step(mx.array([1, 2, 3]), model, max_tokens=200, logits_processors=[processor])
    token_ids = [*itertools.takewhile(lambda token_id: token_id != tokenizer.eos_token_id, (step[0] for step in steps))]
    assert is_person(tokenizer.decode(token_ids))


# Tokens


def test_several_end_tokens_all_end_an_answer_and_nothing_else_does():
    tokenizer = TokenizerWrapper(tiny_tokenizer(300)._tokenizer, eos_token_ids=[260, 256])
    processor = ConstraintCompiler(tokenizer).compile(Choice(("a",))).make_processor()
    [a] = tokenizer.encode("a")
    assert allowed_along(processor, [a, 260]) == [{a}, {256, 257, 260}, {256, 257, 260}]


@pytest.mark.parametrize("vocab_size", [300, 301, 320, 512, 200])
def test_ids_beyond_the_tokenizers_are_never_allowed(tokenizer, compiler, vocab_size):
    processor = compiler.compile(Regex("(?s:.*)")).make_processor()
    allowed = allowed_ids(processor, [1, 2, 3], vocab_size)
    assert allowed == allowed_ids(compiler.compile(Regex("(?s:.*)")).make_processor(), [1], 300) & {*range(vocab_size)}
    assert len(allowed) > 100


def test_end_tokens_that_the_tokenizer_doesnt_have_are_passed_over(tokenizer):
    wide = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[400])
    processor = ConstraintCompiler(wide).compile(Choice(("a",))).make_processor()
    assert allowed_along(processor, tokenizer.encode("a"))[-1] == {257}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_allowed_logits_and_their_type_are_kept(tokenizer, compiler, dtype):
    logits = mx.random.normal((1, MODEL_VOCAB_SIZE), key=mx.random.key(0)).astype(dtype)
    masked = compiler.compile(Choice(("a", "b"))).make_processor()(mx.array([1]), logits)
    expected = [-mx.inf] * MODEL_VOCAB_SIZE
    for token_id in tokenizer.encode("ab"):
        expected[token_id] = logits[0, token_id].item()
    assert masked.dtype == dtype
    assert masked.tolist() == [expected]


# What is compiled


def test_a_grammar_is_compiled_once_and_the_oldest_are_dropped(tokenizer, monkeypatch):
    monkeypatch.setattr(constraint_compiler, "_MAX_CACHED_GRAMMARS", 2)
    compiler = ConstraintCompiler(tokenizer)
    first = compiler.compile(JSONSchema(PERSON)).matcher
    compiler.compile(Choice(("a",)))
    assert compiler.compile(JSONSchema(json.dumps(PERSON))).matcher is first
    second = compiler.compile(Choice(("b",))).matcher
    assert compiler.compile(JSONSchema(PERSON)).matcher is first
    compiler.compile(Choice(("c",)))
    assert compiler.compile(Choice(("b",))).matcher is not second


def test_threads_may_compile_at_the_same_time(tokenizer):
    compiler = ConstraintCompiler(tokenizer)
    barrier = threading.Barrier(8)

    def first_allowed(number):
        barrier.wait()
        processor = compiler.compile(Choice((str(number), f"{number} or so"))).make_processor()
        return processor._matcher.compute_ff_bytes()

    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(first_allowed, range(8))] == [str(number).encode() for number in range(8)]


def test_no_constraint_compiles_to_none(compiler):
    assert compiler.compile(None) is None


# Refused


@pytest.mark.parametrize(
    ("constraint", "reason", "remedy"),
    [
        (JSONSchema({"type": "strin"}), "Invalid type: strin", "change the schema"),
        (JSONSchema({"type": "array", "uniqueItems": True}), "uniqueItems", "strict=False"),
        (JSONSchema({"$ref": "#/$defs/nowhere"}), "nowhere", "change the schema"),
        (JSONSchema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum (3)", "change the schema"),
        (JSONSchema({"x-guidance": 3}), "x-guidance", "change the schema"),
        (JSONSchema({"x-guidance": {"spaces": 1}}), "unknown field `spaces`", "change the schema"),
        (Regex("(ab"), "unclosed group", "Rust's regex crate"),
        (Regex("(?=a)b"), "look-around", "Rust's regex crate"),
        (Grammar("start: missing"), 'unknown name: "missing"', "docs/syntax.md"),
        (Grammar('begin: "a"'), "no start rule", "docs/syntax.md"),
        (Grammar(""), "Empty grammar", "docs/syntax.md"),
        (Grammar("start: <no-such-token>"), "no-such-token", "docs/syntax.md"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("thinking_end", [(), (5,)])
def test_what_cant_be_followed_is_refused_with_reason_and_remedy(compiler, constraint, reason, remedy, thinking_end):
    with pytest.raises(InvalidConstraintError) as caught:
        compiler.compile(constraint, thinking_end=thinking_end)
    assert reason in str(caught.value)
    assert remedy in str(caught.value)
    assert isinstance(caught.value, InvalidRequestError)


def test_a_refusal_doesnt_repeat_a_long_schema_in_full(compiler):
    schema = {"type": "object", "properties": {f"property_{number}": {} for number in range(500)}, "not": {}}
    with pytest.raises(InvalidConstraintError) as caught:
        compiler.compile(JSONSchema(schema))
    assert len(str(caught.value)) < 600


def test_a_schema_that_isnt_strict_ignores_what_cant_be_enforced(model, tokenizer, compiler):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3, "uniqueItems": True}
    [token_ids] = answers(
        model, tokenizer.eos_token_ids, [compiler.compile(JSONSchema(schema, strict=False)).make_processor()]
    )
    assert {*json.loads(tokenizer.decode(token_ids[:-1]))} <= {1, 2}


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (JSONSchema, "{"),
        (JSONSchema, "[1]"),
        (JSONSchema, 3),
        (JSONSchema, None),
        (JSONSchema, {"const": {1, 2}}),
        (JSONSchema, {"maximum": float("nan")}),
        (Regex, None),
        (Grammar, b"start:"),
        (Choice, ()),
        (Choice, "yes"),
        (Choice, ("yes", "")),
        (Choice, ("yes", 1)),
        (Choice, None),
    ],
)
def test_values_of_the_wrong_kind_are_refused_at_once(make, value):
    with pytest.raises(InvalidConstraintError, match=r"give|no answer"):
        make(value)


def test_an_engine_without_tokenizer_refuses_constraints():
    with pytest.raises(InvalidConstraintError, match="no tokenizer"):
        ConstraintCompiler(None).compile(Regex("a"))


def test_a_tokenizer_that_llguidance_cant_read_is_named():
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"))
    with pytest.raises(InvalidConstraintError, match="fast tokenizers"):
        ConstraintCompiler(tokenizer).compile(Regex("a"))


def test_a_tokenizer_without_end_token_is_refused(tokenizer):
    endless = TokenizerWrapper(tokenizer._tokenizer)
    endless.eos_token_ids = None
    with pytest.raises(InvalidConstraintError, match="eos_token_ids"):
        ConstraintCompiler(endless).compile(Regex("a"))


def test_without_llguidance_the_extra_is_named(tokenizer, monkeypatch):
    for name in ("llguidance", "llguidance.hf", "llguidance.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    compiler = ConstraintCompiler(tokenizer)
    assert compiler.compile(None) is None
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'omlx-plugins[structured]'")):
        compiler.compile(Regex("a"))


# Values


def test_constraints_are_values():
    assert JSONSchema({"type": "object", "title": "é"}) == JSONSchema('{"type":"object", "title":"\\u00e9"}')
    assert JSONSchema({"a": 1, "b": 2}) != JSONSchema({"b": 2, "a": 1})  # the order of properties counts
    assert JSONSchema({}) != JSONSchema({}, strict=False)
    assert Choice(["a", "b"]) == Choice(("a", "b"))
    assert len({Regex("a"), Regex("a"), Grammar("a"), Choice(("a",)), JSONSchema("{}"), JSONSchema({})}) == 4


def test_a_schema_is_copied():
    schema = {"type": "object", "properties": {}}
    constraint = JSONSchema(schema)
    schema["properties"]["late"] = {}
    assert constraint == JSONSchema({"type": "object", "properties": {}})


def test_importing_constraints_imports_neither_mlx_nor_llguidance():
    code = "import sys, omlx_core.engine.constraints; print({'mlx', 'mlx_lm', 'numpy', 'llguidance'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
