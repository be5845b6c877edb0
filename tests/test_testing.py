"""The scripted engine has the real one's methods, so that tests of users don't drift from it."""

import inspect
import subprocess
import sys

import pytest

from omlx_core import Engine
from omlx_core.engine.results import ToolCall
from omlx_core.errors import EngineClosedError, EngineError, InvalidPromptError, UnknownParameterError
from omlx_core.testing import FakeAnswer, FakeEngine


def public(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


def test_it_has_every_public_method_and_property_of_the_engine():
    assert public(Engine) - {"from_pretrained"} <= public(FakeEngine())


@pytest.mark.parametrize(
    "name",
    [
        *("generate", "agenerate", "stream", "astream", "sample", "asample", "prefill", "aprefill"),
        *("count_tokens", "pins", "unpin", "close", "encode"),
        *("count_cached_tokens", "find_cached_order", "find_starts"),
    ],
)
def test_its_methods_take_the_same_arguments(name):
    real, fake = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (Engine, FakeEngine))
    assert real == fake


def test_answers_come_in_the_scripts_order_and_the_last_is_repeated():
    engine = FakeEngine(["one", FakeAnswer(["t", "wo"], finish_reason="length")])
    assert [engine.generate("x").text for _ in range(3)] == ["one", "two", "two"]
    assert engine.generate([1, 2]).finish_reason == "length"
    assert [call.prompt for call in engine.calls] == ["x", "x", "x", [1, 2]]


def test_pieces_reasoning_and_calls_are_streamed_apart():
    call = ToolCall("call_1", "add", {"a": 1})
    engine = FakeEngine([FakeAnswer(["a", "b"], reasoning="hm", tool_calls=[call])])
    chunks = list(engine.stream("x", logprobs=True))
    assert [chunk.reasoning for chunk in chunks] == ["hm", "", "", "", ""]
    assert [chunk.text for chunk in chunks] == ["", "a", "b", "", ""]
    assert chunks[3].tool_calls == chunks[4].result.tool_calls == [call]
    assert chunks[4].result.finish_reason == "tool_calls"
    assert len(chunks[4].result.logprobs) == len(chunks[4].result.token_ids) == 4


def test_documents_that_are_said_to_be_cached_are_found_up_to_the_first_that_is_not_asked_for():
    engine = FakeEngine(cached_documents=["b", "a", "x", "c"])
    chat = [{"role": "user", "content": "a b c"}]
    assert engine.find_cached_order(chat, ["a", "b", "c"]) == [1, 0]
    assert engine.find_starts(chat, ["a", "b", "c"]) == [2, 4, 6]
    assert engine.count_cached_tokens(chat).cached_tokens == 640
    with pytest.raises(InvalidPromptError):
        engine.find_cached_order(chat, ["absent"])


async def test_asynchronous_forms_give_the_same():
    engine = FakeEngine(["hi"])
    assert (await engine.agenerate("x")).text == "hi"
    assert "".join([chunk.text async for chunk in engine.astream("x")]) == "hi"
    assert [result.text for result in await engine.asample("x", 2)] == ["hi", "hi"]


def test_error_of_the_script_is_raised_after_its_first_piece():
    engine = FakeEngine([FakeAnswer(["a", "b"], error=EngineError("no"))])
    stream = engine.stream("x")
    assert next(stream).text == "a"
    with pytest.raises(EngineError):
        next(stream)
    assert engine.cancelled.is_set()


def test_stream_that_is_closed_early_counts_as_cancelled():
    engine = FakeEngine()
    stream = engine.stream("x")
    next(stream)
    assert not engine.cancelled.is_set()
    stream.close()
    assert engine.cancelled.is_set()


def test_unknown_options_and_closed_engines_are_refused_as_by_the_engine():
    with FakeEngine() as engine, pytest.raises(UnknownParameterError):
        engine.stream("x", temprature=1)
    with pytest.raises(EngineClosedError):
        engine.generate("x")


def test_chats_are_counted_if_there_is_a_template():
    chat = [{"role": "user", "content": "hi"}]
    assert FakeEngine().count_tokens(chat) == 5
    with pytest.raises(InvalidPromptError):
        FakeEngine(has_chat_template=False).count_tokens(chat)


def test_it_imports_no_mlx():
    code = "import sys; import omlx_core.testing; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
