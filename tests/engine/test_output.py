"""What comes out of generated tokens: text, reasoning and calls apart, whole, and the same however they are cut."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_chats import THINKING_TEMPLATE, chat_tokenizer, misspell, parser_options, tool
from tiny_tokenizer import CHAT_TEMPLATE

from omlx_core.engine.answer_splitter import AnswerSplitter, OutputDelta
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import InvalidToolCall
from omlx_core.model.chat import ChatRenderer, RenderedChat
from omlx_core.model.tool_calls import template_format

TOOLS = [tool("add", a="integer", b="integer"), tool("weather", city="string")]
USER = [{"role": "user", "content": "?"}]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatRenderer(tokenizer).render(USER, tools=TOOLS)


@pytest.fixture(scope="module")
def thinking_chat():
    return ChatRenderer(chat_tokenizer(THINKING_TEMPLATE)).render(USER, tools=TOOLS)


def assemble(tokenizer, chat, text, *, ends_itself=True, ids=None, **options):
    """Feed an answer to an assembler until a stop text comes; returns it and what it gave, piece by piece."""
    output = OutputAssembler(tokenizer, GenerationParams.from_options(options), chat)
    deltas = []
    for token_id in tokenizer.encode(text, add_special_tokens=False) if ids is None else ids:
        deltas.append(output.add(token_id, None, is_end_token=False))
        if output.is_whole:
            break
    if ends_itself and not output.is_whole:
        deltas.append(output.add(tokenizer.eos_token_id, None, is_end_token=True))
    deltas.append(output.finish("stop" if ends_itself or output.is_whole else "length"))
    return output, deltas


def joined(deltas):
    """The sum of some deltas, but for the ids of their calls, which are drawn."""
    return (
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [(call.name, call.arguments) for delta in deltas for call in delta.tool_calls],
        [(call.text, call.error) for delta in deltas for call in delta.invalid_tool_calls],
    )


def calls_of(output):
    return [(call.name, call.arguments) for call in output.tool_calls]


def test_text_reasoning_and_parallel_calls_come_apart(tokenizer, chat):
    output, deltas = assemble(tokenizer, chat, f"<think>\nHm.\n</think>\n\nLet me see.\n{ADD}\n{PARIS}")
    assert (output.text, output.reasoning) == ("Let me see.", "Hm.")
    assert calls_of(output) == [("add", {"a": 1, "b": 2}), ("weather", {"city": "Paris"})]
    assert (output.invalid_tool_calls, output.finish_reason) == ([], "tool_calls")
    assert joined(deltas) == (output.text, output.reasoning, calls_of(output), [])


def test_call_comes_with_its_last_token(tokenizer, chat):
    _, deltas = assemble(tokenizer, chat, f"{ADD}{PARIS}")
    ends = [
        i for i, token_id in enumerate(tokenizer.encode(ADD + PARIS)) if tokenizer.decode([token_id]) == "</tool_call>"
    ]
    assert [i for i, delta in enumerate(deltas) if delta.tool_calls] == ends


def test_text_comes_as_soon_as_it_cannot_be_a_marker(chat):
    # A tokenizer that spells the markers out letter by letter.
    spelling = chat_tokenizer(markers=["<|im_end|>"])
    output, deltas = assemble(spelling, chat, "a<tool_box>b")
    assert [delta.text for delta in deltas] == ["a", *[""] * 6, "<tool_b", "o", "x", ">", "b", "", ""]
    assert output.finish_reason == "stop"


def test_answer_goes_on_with_the_thinking_that_the_prompt_has_opened(tokenizer, thinking_chat):
    output, _ = assemble(tokenizer, thinking_chat, "Hm.\nWell.\n</think>\n\nThree")
    assert (output.reasoning, output.text) == ("Hm.\nWell.", "Three")


def test_thinking_that_never_ends_is_reasoning(tokenizer, thinking_chat):
    output, _ = assemble(tokenizer, thinking_chat, "Hm. </th", ends_itself=False)
    assert (output.reasoning, output.text, output.finish_reason) == ("Hm. </th", "", "length")


def test_model_goes_on_thinking_after_a_call_within_its_thoughts(tokenizer, thinking_chat):
    output, _ = assemble(tokenizer, thinking_chat, f"First\n{ADD} then</think>Done")
    assert (output.reasoning, output.text, calls_of(output)) == ("First then", "Done", [("add", {"a": 1, "b": 2})])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (f"Look:\n\n{ADD}", "Look:\n"),  # the template writes one line break itself
        (f"Look: {ADD}", "Look: "),
        (f"{ADD}\n \n{PARIS}\n\n", ""),
        (f"{ADD}\n That was one.\n", "\n That was one.\n"),
        ("<think></think>\n\n  Indented\n", "  Indented\n"),
        ("Just a line\n", "Just a line\n"),
    ],
)
def test_white_space_of_the_markup_is_no_text(tokenizer, chat, answer, text):
    output, _ = assemble(tokenizer, chat, answer)
    assert output.text == text


def test_generic_format_leaves_text_before_a_call_as_it_is():
    tokenizer = chat_tokenizer(CHAT_TEMPLATE, parser=None)
    chat = ChatRenderer(tokenizer).render(USER, tools=TOOLS)
    output, _ = assemble(tokenizer, chat, 'Look:\n<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert (output.text, calls_of(output)) == ("Look:\n", [("add", {})])


def test_call_of_an_unknown_tool_is_invalid_and_ends_as_usual(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, '<tool_call>{"name": "sub", "arguments": {}}</tool_call>')
    [invalid] = output.invalid_tool_calls
    assert invalid.text == '{"name": "sub", "arguments": {}}'
    assert "'sub'" in invalid.error
    assert (output.tool_calls, output.finish_reason) == ([], "stop")


def test_valid_calls_beside_an_invalid_one_are_to_be_made(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, f"<tool_call>oops</tool_call>\n{ADD}")
    assert [call.text for call in output.invalid_tool_calls] == ["oops"]
    assert (len(output.tool_calls), output.finish_reason) == (1, "tool_calls")


def test_call_that_is_cut_off_is_invalid_wherever_that_is(tokenizer, chat):
    ids = tokenizer.encode(f"Yes {ADD}", add_special_tokens=False)
    start = next(i for i, token_id in enumerate(ids) if tokenizer.decode([token_id]) == "<tool_call>")
    for end in range(start + 1, len(ids)):
        output, _ = assemble(tokenizer, chat, "", ids=ids[:end], ends_itself=False)
        [invalid] = output.invalid_tool_calls
        assert invalid.text == tokenizer.decode(ids[start + 1 : end])
        assert "cut off" in invalid.error
        assert (output.text, output.tool_calls, output.finish_reason) == ("Yes ", [], "length")


def test_call_that_is_cut_off_is_invalid_even_if_it_could_be_read():
    tokenizer = chat_tokenizer(parser="glm47")
    chat = ChatRenderer(tokenizer).render(USER, tools=TOOLS)
    cut = "<tool_call>weather<arg_key>city</arg_key><arg_value>Par"
    output, _ = assemble(tokenizer, chat, cut, ends_itself=False)
    assert (output.tool_calls, len(output.invalid_tool_calls)) == ([], 1)


def test_call_whose_end_the_model_leaves_out_is_one(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, ADD.removesuffix("</tool_call>"))
    assert (calls_of(output), output.finish_reason) == ([("add", {"a": 1, "b": 2})], "tool_calls")


def test_marker_that_is_cut_off_is_text():
    spelling = chat_tokenizer(markers=["<|im_end|>"])
    chat = ChatRenderer(spelling).render(USER, tools=TOOLS)
    output, _ = assemble(spelling, chat, "a\n<tool_ca", ends_itself=False)
    assert (output.text, output.invalid_tool_calls) == ("a\n<tool_ca", [])


def test_answer_that_may_call_once_ends_with_its_first_call(tokenizer, chat):
    output, deltas = assemble(tokenizer, chat, f"Well.{ADD}\n{PARIS}", parallel_tool_calls=False)
    assert [call.name for call in output.tool_calls] == ["add"]
    assert joined(deltas)[0] == "Well."
    assert output.finish_reason == "tool_calls"
    assert tokenizer.decode(output.token_ids).endswith("</tool_call>")
    assert not assemble(tokenizer, chat, "No call.", parallel_tool_calls=False)[0].tool_calls


def test_tokens_of_reasoning_are_counted_with_their_markers(tokenizer, chat, thinking_chat):
    def count(chat, answer):
        return assemble(tokenizer, chat, answer)[0].reasoning_tokens

    thought = tokenizer.encode("<think>hm hm</think>", add_special_tokens=False)
    assert count(chat, "<think>hm hm</think>Yes") == len(thought)
    assert count(thinking_chat, "hm hm</think>Yes") == len(thought) - 1
    assert count(chat, "Yes") == 0


def test_format_without_an_end_reaches_to_the_end_of_the_answer():
    tokenizer = chat_tokenizer("{{ tools | tojson if tools }}[TOOL_CALLS]", parser="mistral", markers=["<|im_end|>"])
    chat = ChatRenderer(tokenizer).render(USER, tools=TOOLS)
    answer = 'Well.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]weather[ARGS]{"city": "Rome"}'
    output, _ = assemble(tokenizer, chat, answer)
    assert (output.text, calls_of(output)) == ("Well.", [("add", {"a": 1}), ("weather", {"city": "Rome"})])
    output, _ = assemble(tokenizer, chat, answer, ends_itself=False)
    assert (output.tool_calls, len(output.invalid_tool_calls)) == ([], 1)
    output, deltas = assemble(tokenizer, chat, answer, parallel_tool_calls=False)
    assert calls_of(output) == [("add", {"a": 1})]
    assert [call.name for delta in deltas for call in delta.tool_calls] == ["add"]


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_calls_are_text_where_none_are_wanted(tokenizer, tools):
    chat = ChatRenderer(tokenizer).render(USER, tools=tools)
    output, _ = assemble(tokenizer, chat, f"<think>Hm</think>So {ADD}", tool_choice="none")
    assert (output.reasoning, output.text, output.finish_reason) == ("Hm", f"So {ADD}", "stop")
    assert not output.tool_calls
    assert not output.invalid_tool_calls


def test_answer_to_no_chat_is_its_text(tokenizer):
    answer = f"<think>\nHm\n</think>\n\nSo {ADD}"
    output, deltas = assemble(tokenizer, None, answer)
    assert (output.text, output.reasoning, output.tool_calls) == (answer, "", [])
    assert joined(deltas) == (answer, "", [], [])


def test_answer_without_a_tokenizer_has_no_text():
    output = OutputAssembler(None, GenerationParams())
    assert output.add(5, -0.5, is_end_token=False) == OutputDelta()
    assert output.finish("length") == OutputDelta()
    assert (output.token_ids, output.logprobs, output.text, output.finish_reason) == ([5], [-0.5], "", "length")


# Stop texts.


@pytest.mark.parametrize(
    ("stop", "text", "reasoning"),
    [
        ("well", "One two", "Hm"),
        ("e two", "On", "Hm"),
        ("</think>", "", "Hm\n"),
        ("m\n<", "", "H"),
        ("On", "", "Hm"),
    ],
)
def test_stop_text_ends_the_answer_wherever_it_is_and_is_never_seen(stop, text, reasoning):
    spelling = chat_tokenizer(markers=["<|im_end|>", "<think>", "</think>"])
    chat = ChatRenderer(spelling).render(USER)
    answer = "<think>\nHm\n</think>\n\nOne twowell then"
    for ids in (spelling.encode(answer), misspell(spelling, answer)):
        output, deltas = assemble(spelling, chat, "", ids=ids, stop=stop)
        assert (output.text, output.reasoning, output.finish_reason) == (text, reasoning, "stop")
        assert joined(deltas)[:2] == (text, reasoning)


def test_stop_text_within_a_call_leaves_an_invalid_one(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, f"So {ADD} then", stop='"b"')
    [invalid] = output.invalid_tool_calls
    assert invalid.text == '\n{"name": "add", "arguments": {"a": 1, '
    assert (output.tool_calls, output.finish_reason) == ([], "stop")


def test_stop_text_at_the_end_of_a_call_leaves_an_invalid_one(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, ADD, stop="\n</tool_call>")
    [invalid] = output.invalid_tool_calls
    assert "cut off" in invalid.error
    assert (output.tool_calls, output.finish_reason) == ([], "stop")


@pytest.mark.parametrize(("options", "finish_reason"), [({"ends_itself": False}, "length"), ({"stop": "then"}, "stop")])
def test_answer_that_does_not_end_itself_after_a_call_keeps_it_and_says_so(tokenizer, chat, options, finish_reason):
    output, _ = assemble(tokenizer, chat, f"{ADD} and then", **options)
    assert (len(output.tool_calls), output.finish_reason) == (1, finish_reason)


def test_what_might_have_been_a_stop_text_comes_in_the_end(tokenizer, chat):
    output, deltas = assemble(tokenizer, chat, "One tw", stop="two")
    assert output.text == "One tw"
    assert deltas[-1].text == "tw"


# Families whose answers have a form of their own.


def test_answer_that_begins_with_a_header_is_taken_apart():
    tokenizer = chat_tokenizer(parser="muse_spark", markers=["<|eot|>", "<|eom|>", "<|message|>", "<|start|>"])
    wrapped = TokenizerWrapper(
        tokenizer._tokenizer,
        lambda _: tokenizer._detokenizer,
        response_format=RESPONSE_FORMAT,
        **parser_options("muse_spark"),
    )
    chat = RenderedChat("", "template", TOOLS, template_format(wrapped))
    answer = (
        "to=self<|message|>Hm<|eom|><|start|>assistant to=weather<|message|><atem:function_calls>"
        '<atem:invoke name="weather"><atem:parameter name="city">Paris</atem:parameter></atem:invoke>'
    )
    output, _ = assemble(wrapped, chat, f"{answer}</atem:function_calls>")
    assert (output.reasoning, output.text, calls_of(output)) == ("Hm", "", [("weather", {"city": "Paris"})])
    output, _ = assemble(wrapped, chat, answer, tool_choice="none")
    assert (output.reasoning, output.tool_calls) == ("Hm", [])
    assert "Paris" in output.text
    text = "A call begins with <atem:function_calls>."
    output, _ = assemble(wrapped, chat, f"to=user<|message|>{text}<|eom|>")
    assert (output.text, output.invalid_tool_calls) == (text, [])


def test_structural_markers_are_no_text():
    markers = ["<|end_of_msg|>", "<|open|>", "<|close|>", "<|sep|>"]
    tokenizer = chat_tokenizer("{{ tools | tojson if tools }}", parser="kimi_k3", markers=markers)
    chat = ChatRenderer(tokenizer).render(USER, tools=TOOLS)
    answer = "<|open|>think<|sep|>Hm<|close|>think<|sep|><|open|>response<|sep|>Hello<|close|>response<|sep|>"
    output, _ = assemble(tokenizer, chat, answer)
    assert (output.reasoning, output.text) == ("Hm", "Hello")


# However an answer is cut.

MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", ADD, PARIS, "[TOOL_CALLS]", "add[ARGS]{}", "<t"]
PIECES = st.sampled_from([*MARKUP, *" a<é🎉\n", "\n\n", "{}", "the name", "stop", "st"])


@given(
    st.lists(PIECES, max_size=8).map("".join),
    st.sets(st.integers(0, 200)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["json_tools", "mistral", "glm47"]),
)
def test_deltas_add_up_to_the_same_however_the_text_is_cut(answer, cuts, is_thinking_open, is_cut_off, parser):
    tokenizer = _tokenizers[parser]
    call_format = dataclasses.replace(template_format(tokenizer), gap="\n")
    chat = RenderedChat("", "template", TOOLS, call_format, is_thinking_open)

    def split(pieces):
        splitter = AnswerSplitter(tokenizer, chat, reads_calls=True)
        return joined([*map(splitter.add, pieces), splitter.finish("", is_cut_off=is_cut_off)])

    places = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    pieces = [answer[start:end] for start, end in itertools.pairwise(places)]
    assert split(pieces) == split([answer])


@given(
    st.lists(PIECES, max_size=8).map("".join), st.integers(), st.sampled_from([(), ("stop",), ("p", "e<"), ("</th",)])
)
def test_answer_is_the_same_however_it_is_spelled_in_tokens(answer, seed, stop):
    tokenizer = _tokenizers["json_tools"]
    chat = RenderedChat("", "template", TOOLS, template_format(tokenizer, gap="\n"))
    whole, whole_deltas = assemble(tokenizer, chat, answer, stop=stop)
    cut, cut_deltas = assemble(tokenizer, chat, "", ids=misspell(tokenizer, answer, seed), stop=stop)
    assert joined(cut_deltas) == joined(whole_deltas)
    assert joined(whole_deltas)[:2] == (whole.text, whole.reasoning)
    assert cut.finish_reason == whole.finish_reason
    assert not any(text in whole.text + whole.reasoning for text in stop)


@pytest.mark.parametrize("parser", ["json_tools", "mistral", "glm47", "pythonic", "minicpm5", "kimi_k2"])
def test_no_part_of_a_marker_is_emitted_before_it_is_known_not_to_be_one(parser):
    tokenizer = chat_tokenizer(parser=parser)
    call_format = dataclasses.replace(template_format(tokenizer), gap="\n")
    for marker, is_thinking_open in [("\n" + call_format.start, False), ("<think>", False), ("\n</think>", True)]:
        chat = RenderedChat("", "template", TOOLS, call_format, is_thinking_open)
        for length in range(1, len(marker)):
            splitter = AnswerSplitter(tokenizer, chat, reads_calls=True)
            emitted = joined([*map(splitter.add, "x" + marker[:length])])
            assert emitted == (("", "x", [], []) if is_thinking_open else ("x", "", [], []))


def test_nothing_of_a_call_is_lost(tokenizer, chat):
    output, _ = assemble(tokenizer, chat, "<tool_call>\nnot json\n</tool_call>rest")
    assert isinstance(output.invalid_tool_calls[0], InvalidToolCall)
    assert (output.invalid_tool_calls[0].text, output.text) == ("\nnot json\n", "rest")


_tokenizers = {parser: chat_tokenizer(parser=parser) for parser in ("json_tools", "mistral", "glm47")}
