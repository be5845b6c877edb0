"""Calls as models write them: mlx-lm's parsers and the generic format, and what becomes of what can't be read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chats import chat_tokenizer, tool

from omlx_core.engine.results import InvalidToolCall, ToolCall
from omlx_core.model.tool_calls import GENERIC_FORMAT, describe_tools, parse_calls, template_format, write_calls

TOOLS = [tool("add", a="integer", b="integer"), tool("weather", city="string")]
PARSERS = [
    "function_gemma",
    "gemma4",
    "glm47",
    "json_tools",
    "kimi_k2",
    "kimi_k3",
    "laguna",
    "longcat",
    "minicpm5",
    "minimax_m2",
    "mistral",
    "muse_spark",
    "pythonic",
    "qwen3_coder",
]
ADD = ("add", {"a": 1, "b": 2})
PARIS = ("weather", {"city": "Paris"})


@pytest.fixture(scope="session")
def formats():
    """The format of each of mlx-lm's parsers."""
    tokenizers = {parser: chat_tokenizer(parser=parser) for parser in PARSERS}
    return {parser: template_format(tokenizer) for parser, tokenizer in tokenizers.items()}


def read(body, call_format, tools=TOOLS):
    """Names and arguments of calls that must all be valid."""
    calls = parse_calls(body, call_format, tools)
    assert all(isinstance(call, ToolCall) for call in calls), calls
    return [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(
    ("parser", "body", "expected"),
    [
        ("json_tools", '\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n', [ADD]),
        ("mistral", '[{"name": "add", "arguments": {"a": 1, "b": 2}}]', [ADD]),
        ("mistral", 'add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', [ADD, PARIS]),
        ("pythonic", "[add(a=1, b=2)]", [ADD]),
        ("pythonic", '[add(a=1, b=2), weather(city="Paris")]', [ADD, PARIS]),
        (
            "qwen3_coder",
            "\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n",
            [ADD],
        ),
        ("glm47", "weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n", [PARIS]),
        (
            "laguna",
            "add<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>2</arg_value>",
            [ADD],
        ),
        (
            "longcat",
            "add<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>1</longcat_arg_value><longcat_arg_key>b"
            "</longcat_arg_key><longcat_arg_value>2</longcat_arg_value>",
            [ADD],
        ),
        (
            "kimi_k2",
            '<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1, "b": 2}<|tool_call_end|>'
            '<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>',
            [ADD, PARIS],
        ),
        (
            "kimi_k3",
            '<|open|>call tool="weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>Paris'
            "<|close|>argument<|sep|><|close|>call<|sep|>",
            [PARIS],
        ),
        ("gemma4", 'call:weather{city:<|"|>Paris<|"|>}', [PARIS]),
        ("function_gemma", "call:weather{city:<escape>Paris<escape>}", [PARIS]),
        ("minicpm5", '"add"><param name="a">1</param><param name="b">2</param>', [ADD]),
        (
            "minimax_m2",
            '\n<invoke name="add">\n<parameter name="a">1</parameter>\n<parameter name="b">2</parameter>\n</invoke>\n'
            '<invoke name="weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n',
            [ADD, PARIS],
        ),
        (
            "muse_spark",
            '<atem:invoke name="weather"><atem:parameter name="city">Paris</atem:parameter></atem:invoke>',
            [PARIS],
        ),
    ],
)
def test_calls_are_read_as_each_family_writes_them(formats, parser, body, expected):
    assert read(body, formats[parser]) == expected


@pytest.mark.parametrize("parser", PARSERS)
def test_format_of_a_family_has_its_markers(formats, parser):
    assert formats[parser].start
    assert formats[parser].style == ("json" if parser == "json_tools" else None)
    assert formats[parser].id_length == (9 if parser == "mistral" else None)


def test_model_without_a_parser_has_no_format_of_its_own():
    assert template_format(chat_tokenizer(parser=None)) is None


@pytest.mark.parametrize("parser", [*PARSERS, "generic"])
@given(body=st.text(st.sampled_from(list('ad{}[]()<>|:=",\\/ \n01eé')), max_size=40))
def test_whatever_a_model_writes_nothing_is_raised_and_nothing_is_lost(formats, parser, body):
    calls = parse_calls(body, formats.get(parser, GENERIC_FORMAT), TOOLS)
    assert calls
    for call in calls:
        if isinstance(call, InvalidToolCall):
            assert call.text == body
            assert call.error
        else:
            assert call.name in ("add", "weather")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "can't be read"),
        ('{"name": "add", "arg', "can't be read"),
        ("[" * 100_000, "can't be read"),
        ("[]", "calls nothing"),
        ('"add"', "doesn't name a tool"),
        ('{"arguments": {}}', "doesn't name a tool"),
        ('{"name": ["add"], "arguments": {}}', "doesn't name a tool"),
        ('{"name": "sub", "arguments": {}}', "no tool 'sub'.*'add', 'weather'"),
        ('{"name": "add", "arguments": [1, 2]}', "arguments are not an object"),
        ('{"name": "add", "arguments": "{"}', "arguments are not JSON"),
        ('{"name": "add", "parameters": {"a": 1}}', "arguments are not an object"),
    ],
)
def test_what_is_no_call_keeps_its_text_and_says_why(body, error):
    [call] = parse_calls(body, GENERIC_FORMAT, TOOLS)
    assert isinstance(call, InvalidToolCall)
    assert call.text == body
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(call.error)


@pytest.mark.parametrize(
    "body", ['{"name": "now"}', '{"name": "now", "arguments": null}', '{"name": "now", "arguments": "{}"}']
)
def test_call_without_arguments_has_none(body):
    assert read(body, GENERIC_FORMAT, [tool("now")]) == [("now", {})]


def test_valid_call_beside_an_invalid_one_is_kept(formats):
    body = 'add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]sub[ARGS]{}'
    valid, invalid = parse_calls(body, formats["mistral"], TOOLS)
    assert (valid.name, valid.arguments) == ADD
    assert (invalid.text, type(invalid)) == (body, InvalidToolCall)


def test_ids_are_unique():
    calls = [
        parse_calls(body, GENERIC_FORMAT, TOOLS)[0]
        for body in ('{"name": "add", "arguments": {}}', "{")
        for _ in range(50)
    ]
    assert len({call.id for call in calls}) == 100
    assert all(call.id.startswith("call_") and len(call.id) == 17 for call in calls)


def test_id_that_is_part_of_a_family_s_syntax_is_kept(formats):
    body = 'functions.add:3<|tool_call_argument_begin|>{"a": 1, "b": 2}'
    assert [call.id for call in parse_calls(body, formats["kimi_k2"], TOOLS)] == ["functions.add:3"]
    [call] = parse_calls('{"name": "add", "arguments": {}, "id": "1"}', formats["json_tools"], TOOLS)
    assert call.id != "1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=3))
def test_generic_calls_read_back_as_they_were_and_are_written_the_same_again(arguments):
    written = write_calls([{"name": "add", "arguments": values} for values in arguments])
    bodies = [part.removeprefix("<tool_call>").removesuffix("</tool_call>") for part in written.split("\n")]
    calls = [call for body in bodies for call in parse_calls(body, GENERIC_FORMAT, TOOLS)]
    assert [call.arguments for call in calls] == arguments
    assert write_calls([{"name": call.name, "arguments": call.arguments} for call in calls]) == written


def test_generic_call_has_the_spacing_of_json_dumps():
    written = write_calls([{"name": "add", "arguments": {"a": [1, 2], "b": {"c": "é"}}}])
    assert written == '<tool_call>{"name": "add", "arguments": {"a": [1, 2], "b": {"c": "é"}}}</tool_call>'


def test_tools_are_described_as_json_one_to_a_line():
    lines = describe_tools(TOOLS).partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in lines] == TOOLS
