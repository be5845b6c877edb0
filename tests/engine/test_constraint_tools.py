"""Forced tool calls are what mlx-lm's parsers read, with arguments that the tool's schema allows."""

import json

import pytest
from constraint_trials import allowed_along, answers, is_whole_answer, marked_tokenizer

from omlx_core.engine.constraint_compiler import ConstraintCompiler
from omlx_core.engine.constraint_tools import call_syntax_of
from omlx_core.engine.constraints import Choice, Grammar, JSONSchema, Regex
from omlx_core.errors import InvalidConstraintError, InvalidToolError
from omlx_core.model.tool_calls import GENERIC_FORMAT, ToolCallFormat, parse_calls, template_format, write_calls

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 4, "pattern": "^[a-z ]*$"},
                "unit": {"$ref": "#/$defs/unit"},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
                "exact": {"type": "boolean"},
                "hours": {"type": "array", "items": {"$ref": "#/$defs/hour"}, "maxItems": 2},
            },
            "required": ["unit", "days"],
            "$defs": {"unit": {"type": "string", "enum": ["C", "F"]}, "hour": {"enum": [6, 18]}},
        },
    },
}
PING = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, PING]

# Name of mlx-lm's parser, what the template tells of its syntax, and markers that are single tokens.
FAMILIES = [
    ("json_tools", None, ["<tool_call>", "</tool_call>"]),
    ("json_tools", None, []),
    ("mistral", None, ["[TOOL_CALLS]"]),
    ("mistral", "[TOOL_CALLS] [", []),
    ("mistral", "[TOOL_CALLS]{{ name }}[ARGS]", ["[TOOL_CALLS]", "[ARGS]"]),
    ("qwen3_coder", None, ["<tool_call>", "</tool_call>"]),
    ("glm47", None, ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]),
    ("glm47", "\n<arg_key>", ["<tool_call>", "</tool_call>"]),
    ("minimax_m2", None, ["<minimax:tool_call>", "</minimax:tool_call>"]),
    ("minicpm5", None, []),
    ("pythonic", None, ["<|tool_call_start|>", "<|tool_call_end|>"]),
]


def compile_calls(tokenizer, tools=TOOLS, tool_choice="required", call_format=None, **options):
    return ConstraintCompiler(tokenizer).compile(
        tools=tools, tool_choice=tool_choice, call_format=call_format or template_format(tokenizer), **options
    )


def calls_in(text, call_format, tools=TOOLS):
    """What the markers around bodies, and mlx-lm's parser, make of an answer that is nothing but calls."""
    head, *bodies = text.split(call_format.start)
    assert not head
    ends = [body.rpartition(call_format.end) if call_format.end else (body, "", "") for body in bodies]
    assert not any(rest.strip() for _, _, rest in ends)
    return [call for body, _, _ in ends for call in parse_calls(body, call_format, tools)]


def ends_of(tokenizer):
    """Tokens that end an answer, a list of calls or an array."""
    return [*tokenizer.eos_token_ids, *tokenizer.encode("]")]


def is_valid(call):
    if call.name == "ping":
        return call.arguments == {}
    arguments = {**call.arguments}
    return (
        arguments.pop("unit") in ("C", "F")
        and arguments.pop("days") in range(100)
        and len(arguments.pop("city", "")) <= 4
        and arguments.pop("exact", True) in (True, False)
        and {*arguments.pop("hours", [])} <= {6, 18}
        and not arguments
    )


@pytest.mark.parametrize(("parser", "template", "markers"), FAMILIES)
def test_forced_calls_are_read_back_by_the_models_parser(model, parser, template, markers):
    tokenizer = marked_tokenizer(*markers, parser=parser, chat_template=template)
    choices = ["get_weather", "ping", "required"]
    processors = [compile_calls(tokenizer, tool_choice=choice).make_processor() for choice in choices]
    sequences = answers(model, tokenizer.eos_token_ids, processors, max_tokens=500, favoured=ends_of(tokenizer))
    for choice, token_ids in zip(choices, sequences, strict=True):
        assert token_ids[-1] == tokenizer.eos_token_id
        calls = calls_in(tokenizer.decode(token_ids[:-1]), template_format(tokenizer))
        assert all(is_valid(call) for call in calls), calls
        names = [call.name for call in calls]
        assert names == [choice] or (choice == "required" and {*names} <= {"get_weather", "ping"})


@pytest.mark.parametrize("constraint", [None, Choice(("none",))])
def test_only_one_call_is_allowed_where_calls_are_not_to_be_parallel(constraint):
    tokenizer = marked_tokenizer()
    call = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    for parallel in (True, False):
        compiled = compile_calls(
            tokenizer,
            tool_choice="auto" if constraint else "required",
            call_format=GENERIC_FORMAT,
            constraint=constraint,
            parallel_tool_calls=parallel,
        )
        last_allowed = allowed_along(compiled.make_processor(), tokenizer.encode(call, add_special_tokens=False))[-1]
        assert (len(last_allowed) > 1) == parallel
        assert tokenizer.eos_token_id in last_allowed


@pytest.mark.parametrize(
    ("parser", "template", "text"),
    [
        (
            "json_tools",
            None,
            '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "ping_all", "arguments": {"at": 6}}\n</tool_call>',
        ),
        (
            "mistral",
            None,
            '[TOOL_CALLS][{"name": "ping", "arguments": {}}, {"name": "ping_all", "arguments": {"at": 6}}]',
        ),
        (
            "mistral",
            "[TOOL_CALLS] [",
            '[TOOL_CALLS] [{"name": "ping", "arguments": {}}, {"name": "ping_all", "arguments": {"at": 6}}]',
        ),
        ("mistral", "{{ name }}[ARGS]", '[TOOL_CALLS]ping[ARGS]{}[TOOL_CALLS]ping_all[ARGS]{"at": 6}'),
        (
            "qwen3_coder",
            None,
            "<tool_call>\n<function=ping>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=ping_all>\n<parameter=at>\n6\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "glm47",
            None,
            "<tool_call>ping</tool_call><tool_call>ping_all<arg_key>at</arg_key><arg_value>6</arg_value></tool_call>",
        ),
        (
            "glm47",
            "\n<arg_key>",
            "<tool_call>ping\n</tool_call>\n"
            "<tool_call>ping_all\n<arg_key>at</arg_key>\n<arg_value>6</arg_value>\n</tool_call>",
        ),
        (
            "minimax_m2",
            None,
            '<minimax:tool_call>\n<invoke name="ping">\n</invoke>\n'
            '<invoke name="ping_all">\n<parameter name="at">6</parameter>\n</invoke>\n</minimax:tool_call>',
        ),
        (
            "minicpm5",
            None,
            '<function name="ping"></function><function name="ping_all"><param name="at">6</param></function>',
        ),
        ("pythonic", None, "<|tool_call_start|>[ping(), ping_all(at=6)]<|tool_call_end|>"),
    ],
)
def test_forced_calls_have_the_text_that_their_templates_render(parser, template, text):
    tokenizer = marked_tokenizer(parser=parser, chat_template=template)
    parameters = {"properties": {"at": {"enum": [6, 18]}}, "required": ["at"]}
    tools = [PING, {"type": "function", "function": {"name": "ping_all", "parameters": parameters}}]
    compiled = compile_calls(tokenizer, tools)
    assert is_whole_answer(compiled, tokenizer, text)
    assert not is_whole_answer(compiled, tokenizer, text.replace("6", "7"))


@pytest.mark.parametrize("markers", [(), ("<tool_call>", "</tool_call>")])
def test_generic_calls_have_the_text_that_they_are_rendered_with(model, markers):
    tokenizer = marked_tokenizer(*markers)
    compiled = compile_calls(tokenizer, call_format=GENERIC_FORMAT)
    processors = [compiled.make_processor() for _ in range(6)]
    for token_ids in answers(model, tokenizer.eos_token_ids, processors, favoured=ends_of(tokenizer)):
        text = tokenizer.decode(token_ids[:-1])
        calls = calls_in(text, GENERIC_FORMAT)
        assert text == write_calls([{"name": call.name, "arguments": call.arguments} for call in calls])


def test_markers_that_are_tokens_are_generated_as_such():
    tokenizer = marked_tokenizer("<tool_call>", "</tool_call>", parser="json_tools")
    processor = compile_calls(tokenizer, tool_choice="ping").make_processor()
    start, end = tokenizer.encode("<tool_call></tool_call>")
    along = allowed_along(processor, tokenizer.encode('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'))
    assert along[0] == {start}
    assert along[-2:] == [{end}, {tokenizer.eos_token_id}]


def test_an_added_token_that_is_plain_text_may_stand_within_an_argument():
    parameters = {"properties": {"x": {"type": "string"}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    tokenizer = marked_tokenizer("<tool_call>", "</tool_call>", "\n", parser="qwen3_coder")
    call = "<tool_call>\n<function=f>\n<parameter=x>\none\ntwo\n</parameter>\n</function>\n</tool_call>"
    assert is_whole_answer(compile_calls(tokenizer, [tool], "f"), tokenizer, call)


def test_one_call_may_follow_another_only_if_any_tool_may_be_called():
    tokenizer = marked_tokenizer("<tool_call>", "</tool_call>", parser="json_tools")
    call = tokenizer.encode('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>')
    end, [newline] = tokenizer.eos_token_id, tokenizer.encode("\n")
    assert allowed_along(compile_calls(tokenizer, tool_choice="ping").make_processor(), call)[-1] == {end}
    assert allowed_along(compile_calls(tokenizer).make_processor(), call)[-1] == {end, newline}


def test_optional_arguments_are_separated_only_where_they_are_there():
    properties = {name: {"const": name in "bd"} for name in "abcd"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties, "required": ["b"]}}}
    tokenizer = marked_tokenizer("<|tool_call_start|>", "<|tool_call_end|>", parser="pythonic")
    compiled = compile_calls(tokenizer, tools=[tool], tool_choice="f")

    def is_accepted(arguments):
        return is_whole_answer(compiled, tokenizer, f"<|tool_call_start|>[f({arguments})]<|tool_call_end|>")

    assert all(map(is_accepted, ["b=true", "a=false, b=true", "b=true, d=true", "a=false, b=true, c=false, d=true"]))
    assert not any(
        map(is_accepted, ["", "a=false", ", b=true", "b=true, ", "b=true, a=false", "b=true, b=true", "b=false"])
    )


@pytest.mark.parametrize("parameters", [{}, {"type": "object"}, {"properties": {"x": {"const": 1}}}])
def test_undeclared_arguments_are_ruled_out(parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    tokenizer = marked_tokenizer()
    processor = compile_calls(tokenizer, [tool], "f", GENERIC_FORMAT).make_processor()
    after_brace = allowed_along(processor, tokenizer.encode('<tool_call>{"name": "f", "arguments": {'))[-1]
    assert after_brace == {*tokenizer.encode('"}' if "properties" in parameters else "}")}


@pytest.mark.parametrize(
    "parameters",
    [
        {"additionalProperties": {"const": 1}},
        {"patternProperties": {"^any": {"const": 1}}},
        {"allOf": [{"properties": {"anything": {"const": 1}}}]},
        {"$ref": "#/$defs/f", "$defs": {"f": {"properties": {"anything": {"const": 1}}}}},
    ],
)
def test_arguments_that_are_declared_elsewhere_are_allowed(parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    tokenizer = marked_tokenizer()
    compiled = compile_calls(tokenizer, [tool], "f", GENERIC_FORMAT)
    call = '<tool_call>{"name": "f", "arguments": {"anything": 1}}</tool_call>'
    assert is_whole_answer(compiled, tokenizer, call)
    assert not is_whole_answer(compiled, tokenizer, call.replace("1", "2"))


def test_names_are_written_as_json_has_them():
    tool = {"type": "function", "function": {"name": 'say "hé"\n', "parameters": {}}}
    tokenizer = marked_tokenizer()
    compiled = compile_calls(tokenizer, [tool], "required", GENERIC_FORMAT)
    assert is_whole_answer(compiled, tokenizer, write_calls([{"name": 'say "hé"\n', "arguments": {}}]))


@pytest.mark.parametrize("end_is_token", [False, True])
def test_a_bare_string_goes_to_the_next_end(end_is_token):
    parameters = {"properties": {"x": {"type": "string", "minLength": 2, "maxLength": 9}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    tokenizer = marked_tokenizer(*["<arg_value>", "</arg_value>"][: 2 * end_is_token], parser="glm47")
    compiled = compile_calls(tokenizer, [tool], "f")

    def is_accepted(value):
        call = f"<tool_call>f<arg_key>x</arg_key><arg_value>{value}</arg_value></tool_call>"
        return is_whole_answer(compiled, tokenizer, call)

    assert all(map(is_accepted, ["ab", 'é\n"<b>', "123456789"]))
    assert not any(map(is_accepted, ["a", "1234567890", "ab</arg_value>"]))


@pytest.mark.parametrize(
    ("schema", "bare", "refused"),
    [
        ({"type": ["string", "null"]}, "ab", None),
        ({"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}, "ab", None),
        ({"title": "anything"}, "ab", None),
        (True, "ab", None),
        ({"const": "ab"}, "ab", "abc"),
        ({"enum": ["ab", 1]}, "1", "2"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "1", "ab"),
        ({"enum": [1, 2]}, "2", "3"),
        ({"anyOf": [{"enum": [1, 2]}, {"type": "null"}]}, "2", "3"),
        ({"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}}, '{"a": "b"}', '{"a": 1}'),
    ],
)
def test_what_may_be_a_string_is_bare_and_the_rest_is_json(schema, bare, refused):
    parameters = {"properties": {"x": schema}, "required": ["x"], "$defs": {"t": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    tokenizer = marked_tokenizer(parser="qwen3_coder")
    compiled = compile_calls(tokenizer, [tool], "f")

    def is_accepted(value):
        call = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
        return is_whole_answer(compiled, tokenizer, call)

    assert is_accepted(bare)
    assert refused is None or not is_accepted(refused)


# A call or something else


@pytest.mark.parametrize(
    ("constraint", "answer"),
    [
        (JSONSchema({"type": "object", "properties": {"x": {"type": "integer"}}}), '{"x": 1}'),
        (Regex(".*"), "<tool_cal"),
        (Grammar('start: "a"+\n%ignore " "'), "a aa"),
        (Choice(("yes", "<tool")), "<tool"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("markers", [(), ("<tool_call>", "</tool_call>")])
@pytest.mark.parametrize("thinking_end", [(), (1,)])
def test_with_a_free_choice_an_answer_is_calls_or_what_the_constraint_asks_for(
    constraint, answer, markers, thinking_end
):
    tokenizer = marked_tokenizer(*markers, parser="json_tools")
    compiled = ConstraintCompiler(tokenizer).compile(
        constraint,
        tools=TOOLS,
        call_format=template_format(tokenizer),
        thinking_end=thinking_end,
    )
    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    for text in (answer, call, f"{call}\n{call}"):
        assert is_whole_answer(compiled, tokenizer, text), text
    assert not is_whole_answer(compiled, tokenizer, call.replace("ping", "pong"))


def test_a_random_model_calls_or_follows_the_schema(model):
    tokenizer = marked_tokenizer("<tool_call>", "</tool_call>", parser="json_tools")
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
    compiled = ConstraintCompiler(tokenizer).compile(
        JSONSchema(schema), tools=[PING], call_format=template_format(tokenizer)
    )
    kinds = set()
    for token_ids in answers(model, tokenizer.eos_token_ids, [compiled.make_processor() for _ in range(12)]):
        text = tokenizer.decode(token_ids[:-1])
        is_call = text.startswith("<tool_call>")
        assert calls_in(text, template_format(tokenizer)) if is_call else {*json.loads(text)} <= {1, 2}
        kinds.add(is_call)
    assert kinds == {True, False}


def test_calls_in_an_unknown_syntax_are_left_to_the_model_between_their_markers():
    tokenizer = marked_tokenizer("<|tool_call>", "<tool_call|>", parser="gemma4")
    compiled = ConstraintCompiler(tokenizer).compile(
        Choice(("yes",)), tools=TOOLS, call_format=template_format(tokenizer)
    )
    start, end = tokenizer.encode("<|tool_call><tool_call|>")
    assert allowed_along(compiled.make_processor(), tokenizer.encode("yes"))[-1] == {tokenizer.eos_token_id}
    along = allowed_along(compiled.make_processor(), tokenizer.encode("<|tool_call>call:ping{}<tool_call|>"))
    assert along[0] == {start, *tokenizer.encode("y")}
    assert end in along[1]
    assert start not in along[1]
    assert along[-1] == {tokenizer.eos_token_id}


def test_without_a_constraint_a_free_choice_is_free():
    tokenizer = marked_tokenizer(parser="json_tools")
    assert compile_calls(tokenizer, tool_choice="auto") is None


def test_tools_that_may_not_be_called_dont_count():
    tokenizer = marked_tokenizer(parser="json_tools")
    assert compile_calls(tokenizer, tool_choice="none") is None
    compiled = ConstraintCompiler(tokenizer).compile(
        Choice(("yes",)), tools=TOOLS, tool_choice="none", call_format=template_format(tokenizer)
    )
    assert allowed_along(compiled.make_processor(), []) == [{*tokenizer.encode("y")}]


def test_no_tool_may_be_called_even_if_one_is_called_none():
    tokenizer = marked_tokenizer(parser="json_tools")
    tool = {"type": "function", "function": {"name": "none", "parameters": {}}}
    compiled = ConstraintCompiler(tokenizer).compile(
        Choice(("yes",)), tools=[tool], tool_choice="none", call_format=template_format(tokenizer)
    )
    assert allowed_along(compiled.make_processor(), []) == [{*tokenizer.encode("y")}]


# Refused


@pytest.mark.parametrize("tool_choice", ["required", "f"])
def test_a_syntax_that_cant_be_forced_is_refused_with_the_remedy(tool_choice):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(InvalidToolError, match='tool_format="generic"'):
        compile_calls(marked_tokenizer(parser="gemma4"), [tool], tool_choice)
    tokenizer = marked_tokenizer(parser="gemma4")
    assert compile_calls(tokenizer, [tool], tool_choice, GENERIC_FORMAT) is not None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ({"name": "f", "parameters": {"properties": {"x": {"type": "strin"}}}}, "'f' can't be enforced: Invalid type"),
        ({"name": "f", "strict": True, "parameters": {"properties": {"x": {"not": {}}}}}, "Unimplemented keys"),
        ({"name": "f", "parameters": {"type": "array"}}, "JSON schema of"),
        ({"name": "f", "parameters": [1]}, "JSON schema of"),
        ({"name": "f", "parameters": {"properties": ["x"]}}, "names and their schemas"),
    ],
)
def test_parameters_that_cant_be_followed_are_refused_with_the_tools_name(function, reason):
    tools = [PING, {"type": "function", "function": function}]
    with pytest.raises(InvalidToolError, match=reason) as caught:
        compile_calls(marked_tokenizer(), tools, "required", GENERIC_FORMAT)
    assert "'f'" in str(caught.value)


def test_keywords_that_cant_be_enforced_are_ignored_in_tools_that_arent_strict():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"not": {}}}}}}
    assert compile_calls(marked_tokenizer(), [tool], "f", GENERIC_FORMAT) is not None


@pytest.mark.parametrize(
    ("parser", "name", "argument"),
    [
        ("qwen3_coder", "a b", "x"),
        ("qwen3_coder", "f", "x>"),
        ("mistral", "a.b", "x"),
        ("pythonic", "get-it", "x"),
        ("pythonic", "f", "x-y"),
    ],
)
def test_names_that_a_models_parser_wouldnt_read_back_are_refused(parser, name, argument):
    parameters = {"properties": {argument: {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
    with pytest.raises(InvalidToolError, match='tool_format="generic"'):
        compile_calls(marked_tokenizer(parser=parser, chat_template="[ARGS]"), [tool], name)


def test_a_choice_of_no_tool_is_refused():
    with pytest.raises(InvalidToolError, match="'pong'"):
        compile_calls(marked_tokenizer(parser="json_tools"), tool_choice="pong")
    with pytest.raises(InvalidToolError, match="'required'"):
        compile_calls(marked_tokenizer(parser="json_tools"), tools=[])
    with pytest.raises(InvalidToolError, match="tool_format"):
        ConstraintCompiler(marked_tokenizer()).compile(tools=TOOLS, tool_choice="required")


def test_a_bad_constraint_is_blamed_on_the_constraint_and_not_on_the_tools():
    with pytest.raises(InvalidConstraintError, match="unclosed group"):
        ConstraintCompiler(marked_tokenizer()).compile(Regex("("), tools=TOOLS, call_format=GENERIC_FORMAT)


def test_only_known_families_have_a_syntax():
    unknown = ToolCallFormat("<call>", "</call>", None, parser=lambda body, tools: body)
    assert call_syntax_of(unknown, None) is None
    assert call_syntax_of(GENERIC_FORMAT, None) is not None
    assert call_syntax_of(template_format(marked_tokenizer(parser="mistral")), None) is not None
