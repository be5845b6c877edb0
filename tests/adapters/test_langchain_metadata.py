"""What an answer says beside its text."""

from __future__ import annotations

import pytest
from langchain_forms import FORMS, all_of
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from omlx_core import Engine, Usage
from omlx_core.engine.results import Divergence
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX


@pytest.mark.parametrize("form", FORMS)
async def test_logprobs_have_openais_shape(form):
    llm = ChatOMLX(engine=FakeEngine([FakeAnswer(["Hé"])]), logprobs=True)
    first, *rest = await all_of(llm, form, "Hi")
    content = sum(rest, first).response_metadata["logprobs"]["content"]
    assert content == [
        {"token": "H", "logprob": -0.5, "bytes": [72], "top_logprobs": []},
        {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": []},
    ]


def test_the_likeliest_tokens_stand_beside_each():
    with Engine(tiny_llama(), tiny_tokenizer()) as engine:
        answer = ChatOMLX(engine=engine, max_tokens=3).invoke("Hi", top_logprobs=2)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == 3
    for place in content:
        likeliest, second = place["top_logprobs"]
        assert (likeliest["token"], likeliest["logprob"]) == (place["token"], pytest.approx(place["logprob"]))
        assert likeliest["logprob"] >= second["logprob"]
        assert set(second) == {"token", "logprob", "bytes"}


def test_logprobs_are_there_only_if_asked_for():
    assert "logprobs" not in ChatOMLX(engine=FakeEngine()).invoke("Hi").response_metadata


def test_where_a_prompt_left_the_cache_is_said_with_text_if_asked_for():
    engine = FakeEngine([FakeAnswer(["a"], divergence=Divergence(7, (1,), (2,)))])
    llm = ChatOMLX(engine=engine)
    assert llm.invoke("Hi").response_metadata["omlx"]["divergence"] == {"position": 7}
    engine.answers = [FakeAnswer(["a"], divergence=Divergence(7, (1,), (2,), "new", "old"))]
    divergence = llm.invoke("Hi", divergence_text=True).response_metadata["omlx"]["divergence"]
    assert divergence == {"position": 7, "prompt_text": "new", "cached_text": "old"}


def test_reasoning_is_counted_only_where_there_is_some():
    usage = Usage(10, 5, reasoning_tokens=3)
    engine = FakeEngine([FakeAnswer(["a"], usage=usage), "b"])
    llm = ChatOMLX(engine=engine)
    assert llm.invoke("Hi").usage_metadata["output_token_details"] == {"reasoning": 3}
    assert "output_token_details" not in llm.invoke("Hi").usage_metadata


def test_speed_is_unknown_of_a_single_token():
    assert ChatOMLX(engine=FakeEngine(["a"])).invoke("Hi").response_metadata["omlx"]["tokens_per_s"] is None
