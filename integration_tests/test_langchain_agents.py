"""LangGraph's agents and graphs on the real model: what they send again and again is read once."""

import operator
from typing import Annotated, TypedDict

import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel, Field

from omlx_core import CacheSettings
from omlx_plugins.langchain import ChatOMLX, OMLXCacheCallback, register_provider

BLOCK_SIZE = 16

pytestmark = pytest.mark.usefixtures("shared_engines")


@pytest.fixture
def llm(sample_model):
    return ChatOMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=8)


@tool
def get_weather(city: Annotated[str, Field(max_length=10)]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


class Report(BaseModel):
    """A report of the weather."""

    city: str = Field(max_length=10)
    is_sunny: bool


def test_second_turn_of_a_checkpointed_thread_reads_only_what_is_new(llm, document):
    agent = create_agent(llm, [get_weather], system_prompt=document[:600], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "a"}}
    first = agent.invoke({"messages": [("user", "What is a block?")]}, config=config)["messages"][-1]
    second = agent.invoke({"messages": [("user", "And a chain?")]}, config=config)["messages"][-1]
    assert first.usage_metadata["input_token_details"]["cache_read"] == 0
    known = first.usage_metadata["total_tokens"] - 1  # the last token was generated, not read
    assert second.usage_metadata["input_token_details"]["cache_read"] >= known // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE


async def test_parallel_branches_share_their_prefix(llm, document):
    class State(TypedDict):
        answers: Annotated[list[str], operator.add]

    def ask(question):
        async def node(state):
            answer = await llm.ainvoke([("system", document[:600]), ("user", question)])
            return {"answers": [answer.text]}

        return node

    graph = StateGraph(State)
    for name in ("block", "chain", "tier"):
        graph.add_node(name, ask(f"What is a {name}?"))
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    use = OMLXCacheCallback()
    [warmed] = await llm.awarm([("system", document[:600])], pin=True)
    state = await graph.compile().ainvoke({"answers": []}, config={"callbacks": [use]})
    assert len(state["answers"]) == use.use.num_requests == 3
    assert use.use.cached_tokens_hot >= 3 * ((warmed.prompt_tokens - 8) // BLOCK_SIZE * BLOCK_SIZE)
    assert llm.unpin() == 1


def test_agent_with_a_response_format_calls_a_tool_or_answers_with_the_schema(llm):
    agent = create_agent(llm.model_copy(update={"max_tokens": 60}), [get_weather], response_format=Report)
    update = next(agent.stream({"messages": [("user", "How is the weather in Rome?")]}, stream_mode="updates"))
    [message] = update["model"]["messages"]
    if message.tool_calls:
        assert {call["name"] for call in message.tool_calls} == {"get_weather"}
        assert all(len(call["args"]["city"]) <= 10 for call in message.tool_calls)
    else:
        assert isinstance(update["model"]["structured_response"], Report)


def test_forced_call_of_a_named_provider_runs_its_tool(sample_model):
    register_provider()
    llm = init_chat_model(f"omlx:{sample_model}", max_tokens=60)
    [call] = llm.bind_tools([get_weather], tool_choice=True).invoke("How is the weather in Rome?").tool_calls
    assert get_weather.invoke(call).content == f"It is sunny in {call['args']['city']}."
