"""Chats as text: what the template does with tools, what the generic format does instead, and what is refused."""

import copy
import logging

import pytest
from tiny_chats import MARKERS, QWEN_TEMPLATE, THINKING_TEMPLATE, call, chat_tokenizer, tool
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from omlx_core.errors import InvalidPromptError, InvalidToolError
from omlx_core.model.chat import ChatRenderer
from omlx_core.model.tool_calls import GENERIC_FORMAT

ADD = tool("add", a="integer", b="integer")
USER = {"role": "user", "content": "What is 1 + 2?"}
CALLING = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [call(a=1, b=2), call(call_id="call_2", a=3, b=4)],
}
RESULTS = [
    {"role": "tool", "content": "3", "tool_call_id": "call_1"},
    {"role": "tool", "content": "7", "tool_call_id": "call_2"},
]
# Refuses the system role and wants turns to alternate, as Gemma 2 does.
STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "[{{ message.role }}]{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)
CUE_AFTER_USER = "add_generation_prompt and (messages[-1].role == 'user' or raise_exception('whose turn is it?'))"


@pytest.fixture
def qwen():
    return ChatRenderer(chat_tokenizer())


@pytest.fixture
def plain():
    """A model whose template knows no tools."""
    return ChatRenderer(tiny_tokenizer(), "tiny")


def test_template_that_knows_tools_is_given_them(qwen):
    chat = qwen.render([USER], tools=[ADD])
    assert chat.tool_format == "template"
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in chat.text
    assert (chat.call_format.start, chat.call_format.end, chat.call_format.style) == (
        "<tool_call>",
        "</tool_call>",
        "json",
    )
    assert chat.text.endswith("<|im_start|>assistant\n")


def test_chat_without_tools_has_no_tool_format(qwen):
    chat = qwen.render([USER])
    assert (chat.tool_format, chat.call_format, list(chat.tools)) == (None, None, [])
    assert chat.text == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"


def test_bare_function_is_the_same_as_a_tool(qwen):
    assert qwen.render([USER], tools=[ADD["function"]]) == qwen.render([USER], tools=[ADD])


def test_tool_without_parameters_gets_empty_ones(qwen):
    chat = qwen.render([USER], tools=[{"name": "now"}])
    assert chat.tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_template_arguments_reach_the_template(qwen):
    assert qwen.render([USER], template_args={"enable_thinking": False}).text.endswith("<think>\n\n</think>\n\n")


def test_template_is_given_arguments_of_calls_as_dictionaries(qwen):
    as_text = copy.deepcopy(CALLING)
    as_text["tool_calls"][0]["function"]["arguments"] = '{"a":1,"b":2}'
    chat = qwen.render([USER, CALLING, *RESULTS], tools=[ADD])
    assert qwen.render([USER, as_text, *RESULTS], tools=[ADD]) == chat
    assert (
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n<tool_call>'
        in chat.text
    )


def test_messages_of_the_caller_are_not_changed(plain):
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        CALLING,
        *RESULTS,
        {"role": "assistant", "content": "3"},
    ]
    before = copy.deepcopy(messages)
    plain.render(messages, tools=[ADD], continue_final_message=True)
    assert messages == before


def test_result_is_given_the_name_of_its_tool():
    template = "{% for m in messages %}{{ m.role }}={{ m.name }};{% endfor %}{{ tools[0].function.name if tools }}"
    renderer = ChatRenderer(chat_tokenizer(template))
    chat = renderer.render([USER, CALLING, RESULTS[0], {**RESULTS[1], "name": "sum"}], tools=[ADD])
    assert chat.text == "user=;assistant=;tool=add;tool=sum;add"


def test_ids_of_calls_are_cut_to_what_mistral_takes():
    template = (
        "{{ tools | tojson if tools }}[TOOL_CALLS]{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id }}{% endfor %}"
        "{{ '=' + m.tool_call_id if m.tool_call_id }}{% endfor %}"
    )
    renderer = ChatRenderer(chat_tokenizer(template, parser="mistral"))
    calling = {"role": "assistant", "tool_calls": [call(call_id="call_0123456789ab")]}
    result = {"role": "tool", "content": "3", "tool_call_id": "call_0123456789ab"}
    assert renderer.render([USER, calling, result], tools=[ADD]).text.endswith("[TOOL_CALLS]3456789ab=3456789ab")


# The generic format.


def test_template_that_ignores_tools_gets_them_in_the_system_turn(plain):
    chat = plain.render([{"role": "system", "content": "Be brief."}, USER], tools=[ADD])
    system, _, rest = chat.text.partition("<|im_end|>")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "add"' in system
    assert rest == "\n<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert (chat.tool_format, chat.call_format) == ("generic", GENERIC_FORMAT)


def test_system_turn_is_made_for_tools_if_there_is_none(plain):
    assert plain.render([USER], tools=[ADD]).text.startswith("<|im_start|>system\n# Tools\n")


def test_tools_come_before_the_question_where_the_template_refuses_a_system_turn():
    chat = ChatRenderer(chat_tokenizer(STRICT_TEMPLATE, parser=None)).render([USER], tools=[ADD])
    assert chat.text.startswith("[user]# Tools\n")
    assert chat.text.endswith("XML tags.\n\nWhat is 1 + 2?\n[model]")


def test_generic_calls_and_results_are_text(plain):
    text = plain.render([USER, CALLING, *RESULTS], tools=[ADD]).text
    assert text.endswith(
        "<|im_start|>assistant\nLet me see."
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>3</tool_response>\n<tool_response>7</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_generic_calls_keep_letters_as_they_are(plain):
    calling = {"role": "assistant", "tool_calls": [call("say", text='né "東京"\n')]}
    text = plain.render([USER, calling, {"role": "tool", "content": "ok"}]).text
    assert '<tool_call>{"name": "say", "arguments": {"text": "né \\"東京\\"\\n"}}</tool_call>' in text


def test_earlier_calls_are_rendered_though_no_tools_are_given_now(plain):
    chat = plain.render([USER, CALLING, *RESULTS])
    assert "<tool_call>" in chat.text
    assert "# Tools" not in chat.text
    assert chat.call_format is None


def test_generic_format_is_announced_once_for_a_model(plain, caplog):
    plain.render([USER])
    assert not caplog.records
    for _ in range(2):
        plain.render([USER], tools=[ADD])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "tiny" in caplog.text


def test_generic_format_that_was_asked_for_is_not_announced(plain, caplog):
    plain.render([USER], tools=[ADD], tool_format="generic")
    assert not caplog.records


def test_generic_format_can_be_forced(qwen):
    chat = qwen.render([USER, CALLING, *RESULTS], tools=[ADD], tool_format="generic")
    assert chat.call_format == GENERIC_FORMAT
    assert chat.text.count("<tools>\n{") == chat.text.count('"arguments": {"a": 1, "b": 2}') == 1
    assert "Let me see.<tool_call>{" in chat.text


def test_template_format_is_refused_where_the_template_knows_no_tools(plain):
    with pytest.raises(InvalidToolError, match=r"tool_format='template'.*knows no tools.*'generic'"):
        plain.render([USER], tools=[ADD], tool_format="template")


def test_template_whose_calls_nobody_reads_gives_way_to_the_generic_format():
    renderer = ChatRenderer(chat_tokenizer(parser=None))
    assert renderer.render([USER], tools=[ADD]).tool_format == "generic"
    with pytest.raises(InvalidToolError, match="no parser"):
        renderer.render([USER], tools=[ADD], tool_format="template")


def test_template_that_shows_tools_beside_a_system_message_only_knows_tools():
    template = "{% for m in messages %}{{ m.content }}{{ tools | tojson if m.role == 'system' and tools }}{% endfor %}"
    assert ChatRenderer(chat_tokenizer(template)).render([USER], tools=[ADD]).tool_format == "template"


def test_template_of_its_own_for_tools_is_used():
    tokenizer = chat_tokenizer({"default": CHAT_TEMPLATE, "tool_use": QWEN_TEMPLATE})
    assert ChatRenderer(tokenizer).render([USER], tools=[ADD]).tool_format == "template"


# Continuing a message, and thinking.


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN_TEMPLATE, STRICT_TEMPLATE])
@pytest.mark.parametrize("text", ["The answer is ", "", "line\n"])
def test_continued_message_ends_the_text(template, text):
    renderer = ChatRenderer(chat_tokenizer(template))
    continued = renderer.render([USER, {"role": "assistant", "content": text}], continue_final_message=True)
    begun = renderer.render([USER, {"role": "assistant", "content": "x"}], add_generation_prompt=False)
    assert continued.text == begun.text.rpartition("x")[0] + text


def test_continued_message_is_given_no_cue_for_another():
    renderer = ChatRenderer(chat_tokenizer(STRICT_TEMPLATE.replace("add_generation_prompt", CUE_AFTER_USER)))
    messages = [USER, {"role": "assistant", "content": "Three"}]
    assert renderer.render(messages, continue_final_message=True).text.endswith("[assistant]Three")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (USER, r"prompt\[1\].*role 'user'.*assistant"),
        (CALLING, r"prompt\[1\].*calls tools"),
    ],
)
def test_what_cannot_be_continued_is_named(qwen, last, message):
    with pytest.raises(InvalidPromptError, match=message):
        qwen.render([USER, last], continue_final_message=True)


def test_template_that_drops_the_continued_message_is_named():
    renderer = ChatRenderer(chat_tokenizer("{{ messages[0].content }}"))
    with pytest.raises(InvalidPromptError, match="leaves the last message out"):
        renderer.render([USER, {"role": "assistant", "content": "x"}], continue_final_message=True)


def test_thinking_that_the_template_opens_is_open():
    renderer = ChatRenderer(chat_tokenizer(THINKING_TEMPLATE))
    assert renderer.render([USER]).is_thinking_open


@pytest.mark.parametrize("content", ["What does <think> mean?", "<think>", "</think> and <think>\n"])
def test_marker_that_a_user_writes_opens_no_thinking(qwen, content):
    assert not qwen.render([{"role": "user", "content": content}]).is_thinking_open


def test_thinking_that_the_template_closes_is_not_open(qwen):
    assert not qwen.render([USER], template_args={"enable_thinking": False}).is_thinking_open


@pytest.mark.parametrize(
    ("content", "is_open"), [("<think>\nHm, one", True), ("<think>\nHm\n</think>\n\nThree", False), ("Three", False)]
)
def test_continued_thinking_is_open(qwen, content, is_open):
    chat = qwen.render([USER, {"role": "assistant", "content": content}], continue_final_message=True)
    assert chat.is_thinking_open is is_open


def test_model_without_thinking_has_none_open():
    renderer = ChatRenderer(chat_tokenizer(THINKING_TEMPLATE, markers=MARKERS[:4]))
    assert not renderer.render([USER]).is_thinking_open


# What all chats of the same system messages and tools begin with.


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("renderer", ["qwen", "plain"])
def test_opening_is_what_other_chats_begin_with_too(system, renderer, request):
    renderer = request.getfixturevalue(renderer)
    opening = renderer.render_opening(system, tools=[ADD])
    for other in ([USER], [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi"}]):
        text = renderer.render([*system, *other], tools=[ADD]).text
        assert text.startswith(opening[: opening.rindex("<|im_end|>")])


# Refusals.


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"prompt=\[\] is empty.*one or more messages"),
        ([USER, "Hi"], r"prompt\[1\]='Hi' is not a message"),
        ([{"content": "Hi"}], r"prompt\[0\].*no 'role'.*system, user, assistant, tool"),
        ([USER, {"role": "usr", "content": "Hi"}], r"prompt\[1\]\['role'\]='usr'.*system, user, assistant, tool"),
        ([{"role": 3, "content": "Hi"}], r"prompt\[0\]\['role'\]=3"),
        ([{"role": "user"}], r"prompt\[0\] has no 'content'"),
        ([USER, {"role": "assistant", "content": None}], r"prompt\[1\] has no 'content'"),
        ([{"role": "user", "content": 3}], r"prompt\[0\]\['content'\] is int.*text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {}}]}],
            r"prompt\[0\]\['content'\]\[1\] is of type 'image_url'.*text only",
        ),
        ([{"role": "user", "content": [3]}], r"\['content'\]\[0\] is of type 'int'"),
        ([{**USER, "tool_calls": [call()]}], r"prompt\[0\].*role 'user'.*only an assistant"),
        ([USER, {"role": "assistant", "tool_calls": "add"}], r"prompt\[1\]\['tool_calls'\]='add'.*list"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "add"}]}], r"prompt\[1\]\['tool_calls'\]\[0\].*function"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}],
            r"prompt\[1\]\['tool_calls'\]\[0\] has the arguments '{', which are not JSON",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]}],
            r"has the arguments \[1\]: give a dictionary",
        ),
        ([USER, {"role": "assistant", "tool_calls": [call(a=object())]}], "JSON has no room for"),
        ([USER, {"role": "assistant", "tool_calls": [call(call_id=7)]}], r"\['tool_calls'\]\[0\]\['id'\]=7"),
        ([{**RESULTS[0], "tool_call_id": 7}], r"prompt\[0\]\['tool_call_id'\]=7"),
    ],
)
def test_malformed_message_is_named(qwen, messages, message):
    with pytest.raises(InvalidPromptError, match=message):
        qwen.render(messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["add"], r"tools\[0\]='add' is no function.*\"type\": \"function\""),
        ([{"type": "retrieval", "function": {"name": "x"}}], r"tools\[0\].*no function"),
        ([ADD, {"type": "function", "function": {"description": "x"}}], r"tools\[1\].*has no name"),
        ([{"name": ""}], r"tools\[0\].*has no name"),
        ([ADD, ADD], r"tools\[1\] is the second of the name 'add'"),
        ([{"name": "x", "description": 3}], r"tools\[0\] has the description 3"),
        ([{"name": "x", "parameters": ["a"]}], r"tools\[0\] has the parameters \['a'\]"),
        ([{"name": "x", "parameters": {"default": object()}}], "JSON has no room for"),
    ],
)
def test_malformed_tool_is_named(qwen, tools, message):
    with pytest.raises(InvalidToolError, match=message):
        qwen.render([USER], tools=tools)


def test_role_that_the_template_names_is_taken(qwen):
    template = QWEN_TEMPLATE.replace("message.role == 'user' or", "message.role in ('user', 'critic') or")
    critic = {"role": "critic", "content": "Hm."}
    assert "critic\nHm." in ChatRenderer(chat_tokenizer(template)).render([USER, critic]).text
    with pytest.raises(InvalidPromptError, match="'critic'"):
        qwen.render([USER, critic])


def test_text_parts_are_joined(qwen):
    parts = [{"type": "text", "text": "What is "}, "1 + 2?"]
    assert qwen.render([{"role": "user", "content": parts}]) == qwen.render([USER])


def test_refusal_of_the_template_is_passed_on():
    renderer = ChatRenderer(chat_tokenizer(STRICT_TEMPLATE))
    with pytest.raises(InvalidPromptError, match=r"refuses.*System role not supported"):
        renderer.render([{"role": "system", "content": "Be brief."}, USER])
