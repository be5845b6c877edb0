"""The options of a request: what is taken, what is refused, and with which words."""

import dataclasses

import pytest

from omlx_core.engine.constraints import Choice, JSONSchema
from omlx_core.engine.params import GenerationOptions, GenerationParams
from omlx_core.errors import InvalidParameterError, InvalidToolError, UnknownParameterError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def test_keyword_arguments_are_the_attributes():
    assert list(GenerationOptions.__annotations__) == [field.name for field in dataclasses.fields(GenerationParams)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0.*at least 1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5.*whole number"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"max_tokens": None}, "max_tokens=None: give a whole number of at least 1$"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0}, "top_p=0: .*more than 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2}, "min_p=2"),
        ({"xtc_probability": 1.5}, "xtc_probability=1.5: .*at least 0 and at most 1"),
        ({"xtc_threshold": 0.6}, "xtc_threshold=0.6: .*at most 0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: .*at least 0.01 and at most 100"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1: .*at least -2 and at most 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1: .*at least -2 and at most 2"),
        ({"penalty_context_tokens": 0}, "penalty_context_tokens=0: .*whole number of at least 1"),
        ({"penalty_context_tokens": 2**31}, "penalty_context_tokens=2147483648"),
        ({"logit_bias": [3]}, r"logit_bias=\[3\]: give a dict"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has the key -1"),
        ({"logit_bias": {True: 1.0}}, "logit_bias has the key True"),
        ({"logit_bias": {"٣": 1.0}}, "logit_bias has the key"),
        ({"logit_bias": {"9" * 5000: 1.0}}, "logit_bias has the key"),
        ({"logit_bias": {"the": 1.0}}, "logit_bias has the key 'the': give token ids"),
        ({"logit_bias": {3: 1.0, "3": 2.0}}, "token id 3 twice"),
        ({"logit_bias": {3: float("-inf")}}, r"logit_bias\[3\]=-inf: .*at least -100.0 and at most 100.0"),
        ({"logit_bias": {"3": "1"}}, r"logit_bias\['3'\]='1'"),
        ({"seed": -1}, "seed=-1: .*, or None"),
        ({"seed": "x"}, "seed='x'"),
        ({"stop": [""]}, "stop="),
        ({"stop": 5}, "stop=5: give one or more non-empty strings"),
        ({"logprobs": 3}, "logprobs=3"),
        ({"top_logprobs": 21}, "top_logprobs=21: .*at least 0 and at most 20"),
        ({"top_logprobs": True}, "top_logprobs=True"),
        ({"timeout_s": 0}, "timeout_s=0: .*more than 0 .*, or None"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"tool_format": "xml"}, "tool_format='xml': give 'template', 'generic' or None"),
        ({"constraint": {"type": "object"}}, "constraint=.*give a JSONSchema, Regex, Grammar or Choice"),
        ({"template_args": ["x"]}, "template_args="),
        ({"template_args": {1: "x"}}, "template_args="),
        ({"template_args": {"tools": []}}, "template_args has 'tools', .*leave it out"),
        ({"continue_final_message": "yes"}, "continue_final_message='yes'"),
        ({"cache_salt": 5}, "cache_salt=5"),
        ({"store": None}, "store=None"),
        ({"on_prefill": 5}, "on_prefill=5"),
        ({"progress": 1}, "progress=1"),
        ({"divergence_text": None}, "divergence_text=None"),
    ],
)
def test_bad_parameter_is_named(options, message):
    with pytest.raises(InvalidParameterError, match=message):
        GenerationParams.from_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "weather"}, "tools='weather': give a list"),
        ({"tools": WEATHER}, "give a list"),
        ({"tools": [len]}, r"tools\[0\]=.*is no function"),
        ({"tools": [WEATHER, {"nome": "clock"}]}, r"tools\[1\]=.*has no name: give \{"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "has no name"),
        ({"tools": [WEATHER, WEATHER]}, r"tools\[1\] is the second of the name 'weather'"),
        ({"tools": [WEATHER], "tool_choice": None}, "tool_choice=None: give 'auto', 'none', 'required' or"),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "wether"}, "'wether' is not one of .*'weather', 'clock'"),
        ({"tool_choice": "weather"}, "'weather' is not one of .*none at all"),
        ({"tool_choice": "required"}, "tool_choice='required' without tools"),
    ],
)
def test_tool_that_cannot_be_used_is_named(options, message):
    with pytest.raises(InvalidToolError, match=message):
        GenerationParams.from_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xtc_probability": 0.5}, "xtc_probability=0.5 with temperature=0.*give a temperature"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "continue_final_message": True},
            "continue_final_message=True with tool_choice='required'",
        ),
        (
            {"tools": [WEATHER], "tool_choice": "weather", "constraint": JSONSchema({"type": "object"})},
            "constraint=.* with tool_choice='weather'",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(InvalidParameterError, match=message):
        GenerationParams.from_options(options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "xtc_threshold": 0.2, "seed": 1},
        {"penalty_context_tokens": 64},
        {"tools": [WEATHER], "tool_choice": "none", "continue_final_message": True},
        {"tools": [WEATHER], "constraint": JSONSchema({"type": "object"})},
        {"tool_choice": "none", "tool_format": "generic"},
    ],
)
def test_options_without_effect_are_accepted(options):
    params = GenerationParams.from_options(options)
    assert {name: getattr(params, name) for name in options if name != "tools"} == {
        name: value for name, value in options.items() if name != "tools"
    }


def test_unknown_parameter_is_named_with_the_one_that_was_meant():
    with pytest.raises(UnknownParameterError, match=r"'temprature': did you mean 'temperature'"):
        GenerationParams.from_options({"temprature": 0.5})


def test_a_single_stop_text_needs_no_list():
    assert GenerationParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_none_stands_for_an_empty_list_or_mapping():
    options = {"stop": None, "tools": None, "logit_bias": None, "template_args": None}
    assert GenerationParams.from_options(options) == GenerationParams()


def test_logit_bias_takes_the_string_keys_of_json():
    params = GenerationParams.from_options({"logit_bias": {"7": -100, 8: 2.5}})
    assert params.logit_bias == {7: -100.0, 8: 2.5}


def test_top_logprobs_imply_logprobs():
    assert GenerationParams(top_logprobs=1).logprobs
    assert not GenerationParams(top_logprobs=0).logprobs


def test_mappings_and_lists_are_copies_that_cannot_be_changed():
    bias, template_args, tools = {1: 2.0}, {"enable_thinking": False}, [WEATHER]
    params = GenerationParams(logit_bias=bias, template_args=template_args, tools=tools)
    bias[1] = 3.0
    template_args.clear()
    tools.clear()
    assert params.logit_bias == {1: 2.0}
    assert params.template_args == {"enable_thinking": False}
    assert params.tool_names == ["weather"]
    for mapping in (params.logit_bias, params.template_args):
        with pytest.raises(TypeError):
            mapping[1] = 0


def test_a_replaced_attribute_leaves_the_others_and_is_checked():
    params = GenerationParams(logit_bias={1: 2.0}, template_args={"a": 1}, tools=[WEATHER], stop=("end",))
    shorter = dataclasses.replace(params, max_tokens=3)
    assert (shorter.max_tokens, dataclasses.replace(shorter, max_tokens=params.max_tokens)) == (3, params)
    with pytest.raises(InvalidParameterError, match="max_tokens=0"):
        dataclasses.replace(params, max_tokens=0)


def test_params_that_are_equal_hash_alike_whoever_watches_the_prefill():
    options = {
        "logit_bias": {1: 2.0},
        "template_args": {"a": [1]},
        "tools": [WEATHER],
        "constraint": Choice(["a", "b"]),
    }
    params = GenerationParams(**options)
    watched = GenerationParams(**options, on_prefill=lambda computed, total: None)
    assert params == watched
    assert hash(params) == hash(watched)
    assert "on_prefill" not in repr(watched)
    assert params != dataclasses.replace(params, logit_bias={1: 2.5})


@pytest.mark.parametrize(
    ("choice", "is_forced"), [("auto", False), ("none", False), ("required", True), ("clock", True)]
)
def test_required_and_named_tools_force_a_call(choice, is_forced):
    assert GenerationParams(tools=[WEATHER, CLOCK], tool_choice=choice).forces_tool_call is is_forced


def test_requests_of_different_salt_have_different_keys():
    keys = [GenerationParams(cache_salt=salt).extra_keys for salt in (None, "a", "b")]
    assert keys == [(), ("salt:a",), ("salt:b",)]
