"""LlamaIndex's agents over a script of answers: what they send, call and hand over."""

from __future__ import annotations

import pytest
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.memory import ChatMemoryBuffer

from omlx_core.engine.results import ToolCall
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.llama_index import OMLX

# LlamaIndex's agents look at all their attributes, pydantic's old ones among them.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def call(call_id, name="add", **arguments):
    return ToolCall(call_id, name, arguments)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def llm(engine):
    return OMLX(engine=engine)


def contents(engine):
    return [[(message["role"], message["content"]) for message in prompt] for prompt, _ in engine.calls]


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_function_agent_sends_each_result_with_the_id_of_its_call(engine, llm, is_streaming):
    engine.answers = [
        FakeAnswer(["Let me see."], reasoning="hm", tool_calls=[call("c1", a=1, b=2), call("c2", a=3, b=4)]),
        "It is 3 and 7.",
    ]
    agent = FunctionAgent(tools=[add], llm=llm, system_prompt="Use tools.", streaming=is_streaming)
    assert str(await agent.run("Add.")) == "It is 3 and 7."
    assert engine.calls[0].options["parallel_tool_calls"] is True
    beginning = [("system", "Use tools."), ("user", "Add.")]
    first, second = contents(engine)
    assert first == beginning
    assert second[:3] == [*beginning, ("assistant", "Let me see.")]
    results = {message["tool_call_id"]: message["content"] for message in engine.calls[1].prompt[3:]}
    assert results == {"c1": "3", "c2": "7"}
    assert [c["id"] for c in engine.calls[1].prompt[2]["tool_calls"]] == ["c1", "c2"]
    assert engine.calls[1].prompt[2]["reasoning_content"] == "hm"


async def test_a_function_agent_streams_thinking_text_and_calls(engine, llm):
    engine.answers = [FakeAnswer(["Let me", " see."], reasoning="hm", tool_calls=[call("c1", a=1, b=2)]), "3"]
    handler = FunctionAgent(tools=[add], llm=llm).run("Add.")
    events = [event async for event in handler.stream_events() if isinstance(event, AgentStream)]
    assert [event.thinking_delta for event in events][:2] == ["hm", None]
    assert "".join(event.delta for event in events) == "Let me see.3"
    assert [len(event.tool_calls) for event in events] == [0, 0, 0, 1, 1, 0, 0]
    assert events[-1].raw["usage"]["prompt_tokens_details"] == {"cached_tokens": 640}
    await handler


async def test_a_first_choice_is_forced_in_the_first_turn_only(engine, llm):
    engine.answers = [FakeAnswer(tool_calls=[call("c1", a=1, b=2)]), "3"]
    await FunctionAgent(tools=[add], llm=llm, initial_tool_choice="add").run("Add.")
    assert [options["tool_choice"] for _, options in engine.calls] == ["add", "auto"]


async def test_a_failing_tool_is_told_to_the_model(engine, llm):
    engine.answers = [FakeAnswer(tool_calls=[call("c1", a=1)]), "I can't."]
    await FunctionAgent(tools=[add], llm=llm).run("Add.")
    *_, result = engine.calls[1].prompt
    assert result["tool_call_id"] == "c1"
    assert "missing 1 required positional argument" in result["content"]


async def test_an_agent_remembers_the_turns_before_with_their_calls(engine, llm):
    engine.answers = [FakeAnswer(tool_calls=[call("c1", a=1, b=2)]), "3", "You're welcome."]
    memory = ChatMemoryBuffer.from_defaults(token_limit=2000)
    agent = FunctionAgent(tools=[add], llm=llm)
    await agent.run("Add.", memory=memory)
    await agent.run("Thanks.", memory=memory)
    before, last = engine.calls[1].prompt, engine.calls[2].prompt
    assert last[: len(before)] == before  # whatever was read is found in the cache
    assert [message["role"] for message in last] == ["user", "assistant", "tool", "assistant", "user"]


@pytest.mark.filterwarnings("ignore:is_running called from within a step")  # LlamaIndex's own doing
@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_react_agent_acts_and_observes(engine, llm, is_streaming):
    engine.answers = [
        'Thought: I need to add.\nAction: add\nAction Input: {"a": 1, "b": 2}',
        "Thought: I can answer.\nAnswer: 3",
    ]
    agent = ReActAgent(tools=[add], llm=llm, streaming=is_streaming)
    assert str(await agent.run("Add.")) == "3"
    assert contents(engine)[1][-1] == ("user", "Observation: 3")


async def test_a_workflow_hands_over_from_agent_to_agent(engine, llm):
    engine.answers = [
        FakeAnswer(tool_calls=[call("c1", "handoff", to_agent="adder", reason="sums")]),
        FakeAnswer(tool_calls=[call("c2", a=1, b=2)]),
        "3",
    ]
    talker = FunctionAgent(name="talker", description="Talks.", llm=llm, can_handoff_to=["adder"])
    adder = FunctionAgent(name="adder", description="Adds.", llm=llm, tools=[add])
    output = await AgentWorkflow(agents=[talker, adder], root_agent="talker").run("Add.")
    assert str(output) == "3"
    assert output.current_agent_name == "adder"
    tools = [{tool["function"]["name"] for tool in options["tools"]} for _, options in engine.calls]
    assert tools == [{"handoff"}, {"add", "handoff"}, {"add", "handoff"}]


async def test_tools_alone_make_a_function_agent(engine, llm):
    engine.answers = [FakeAnswer(tool_calls=[call("c1", a=1, b=2)]), "3"]
    workflow = AgentWorkflow.from_tools_or_functions([add], llm=llm)
    assert all(isinstance(agent, FunctionAgent) for agent in workflow.agents.values())
    assert str(await workflow.run("Add.")) == "3"


async def test_an_agent_without_tools_just_answers(engine, llm):
    engine.answers = ["Hello."]
    assert str(await FunctionAgent(llm=llm).run("Hi")) == "Hello."
