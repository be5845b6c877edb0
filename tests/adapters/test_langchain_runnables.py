"""The model within what people build of LangChain and LangGraph."""

from __future__ import annotations

import operator
from typing import Annotated, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnableParallel
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langchain_forms import FORMS, all_of
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from pydantic import BaseModel

from omlx_core.engine.results import ToolCall
from omlx_core.errors import EngineBusyError, EngineError
from omlx_core.testing import FakeAnswer, FakeEngine
from omlx_plugins.langchain import ChatOMLX, OMLXCacheCallback

CALL = FakeAnswer(tool_calls=[ToolCall("call_1", "add", {"a": 1, "b": 2})])


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


class Sum(BaseModel):
    """A sum."""

    total: int


@pytest.fixture
def engine():
    return FakeEngine(["Hello"])


@pytest.fixture
def llm(engine):
    return ChatOMLX(engine=engine)


# LCEL


@pytest.mark.parametrize("form", FORMS)
async def test_parallel_branches(llm, engine, form):
    prompt = ChatPromptTemplate([("user", "{topic}")])
    both = RunnableParallel(one=prompt | llm | StrOutputParser(), two=prompt | llm.bind(max_tokens=3))
    first, *rest = await all_of(both, form, {"topic": "t"})
    whole = sum(rest, first)
    assert (whole["one"], whole["two"].content) == ("Hello", "Hello")
    assert len(engine.calls) == 2


async def test_batches(llm):
    assert [answer.content for answer in llm.batch(["a", "b"], config={"max_concurrency": 1})] == ["Hello"] * 2
    assert [answer.content for answer in await llm.abatch(["a", "b", "c"])] == ["Hello"] * 3
    assert sorted(index for index, _ in llm.batch_as_completed(["a", "b"])) == [0, 1]


@pytest.mark.parametrize("form", FORMS)
async def test_fallbacks_and_retries(form):
    failing = FakeEngine([FakeAnswer(error=EngineError("no"))])
    llm = ChatOMLX(engine=failing).with_fallbacks([ChatOMLX(engine=FakeEngine(["instead"]))])
    first, *rest = await all_of(llm, form, "Hi")
    assert sum(rest, first).content == "instead"
    if form in ("invoke", "ainvoke"):
        busy = FakeEngine([FakeAnswer(error=EngineBusyError("busy")), "at last"])
        retrying = ChatOMLX(engine=busy).with_retry(
            retry_if_exception_type=(EngineBusyError,), wait_exponential_jitter=False, stop_after_attempt=2
        )
        assert (await all_of(retrying, form, "Hi"))[0].content == "at last"


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")  # in use still
def test_a_history_grows_with_each_turn(llm, engine):
    histories: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate([("system", "s"), MessagesPlaceholder("history"), ("human", "{input}")])
    chain = RunnableWithMessageHistory(
        prompt | llm,
        lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="input",
        history_messages_key="history",
    )
    for question in ("one", "two"):
        chain.invoke({"input": question}, config={"configurable": {"session_id": "a"}})
    assert [message["content"] for message in engine.calls[-1].prompt] == ["s", "one", "Hello", "two"]


def test_messages_are_trimmed_by_the_models_own_count(llm):
    messages = [SystemMessage("s"), HumanMessage("a" * 50), AIMessage("b" * 50), HumanMessage("c")]
    trimmed = trim_messages(
        messages, max_tokens=70, token_counter=llm, strategy="last", include_system=True, start_on="human"
    )
    assert [message.content for message in trimmed] == ["s", "c"]


async def test_events_of_a_chain(llm):
    chain = ChatPromptTemplate([("user", "{x}")]) | llm
    events = [event async for event in chain.astream_events({"x": "y"}, version="v2")]
    streamed = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(chunk.content for chunk in streamed) == "Hello"
    [end] = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert end.usage_metadata["input_tokens"] == 700
    assert end.response_metadata["omlx"]["cached_tokens_hot"] == 512


async def test_typed_events(engine):
    engine.answers = [FakeAnswer(["So: "], reasoning="hm", tool_calls=[ToolCall("call_1", "add", {"a": 1, "b": 2})])]
    llm = ChatOMLX(engine=engine).bind_tools([add])
    whole = llm.stream_events("Hi", version="v3").output
    awaited = await (await llm.astream_events("Hi", version="v3")).output
    for message in (whole, awaited):
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text", "tool_call"]
        assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}


def test_traces_have_the_options_and_the_schema():
    class Starts(BaseCallbackHandler):
        def on_chat_model_start(self, serialized, messages, *, metadata, options, invocation_params, **_):
            self.seen = serialized, metadata, options, invocation_params

    starts = Starts()
    llm = ChatOMLX(engine=FakeEngine(['{"total": 3}']), temperature=0.5)
    llm.with_structured_output(Sum).invoke("Hi", config={"callbacks": [starts]})
    serialized, metadata, options, invocation_params = starts.seen
    assert serialized["id"] == ["omlx_plugins", "langchain", "chat_model", "ChatOMLX"]
    assert (metadata["ls_provider"], metadata["ls_temperature"]) == ("omlx", 0.5)
    assert options["ls_structured_output_format"]["kwargs"]["method"] == "json_schema"
    assert invocation_params["_type"] == "omlx"


# LangGraph


async def test_an_agent_calls_its_tools_and_answers(engine):
    engine.answers = [CALL, "It is 3."]
    use = OMLXCacheCallback()
    agent = create_agent(ChatOMLX(engine=engine), [add], system_prompt="Be brief.")
    state = agent.invoke({"messages": [("user", "1 + 2?")]}, config={"callbacks": [use]})
    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert state["messages"][-1].content == "It is 3."
    assert engine.calls[1].prompt[-1] == {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"}
    assert use.use.num_requests == 2
    streamed = [
        chunk.content
        async for chunk, _ in agent.astream({"messages": [("user", "?")]}, stream_mode="messages")
        if chunk.content
    ]
    assert "It is 3." in "".join(streamed)


def test_an_agent_with_a_response_format_is_bound_to_a_call_or_the_schema(engine):
    engine.answers = [CALL, '{"total": 3}']
    agent = create_agent(ChatOMLX(engine=engine), [add], response_format=Sum)
    state = agent.invoke({"messages": [("user", "1 + 2?")]})
    assert state["structured_response"] == Sum(total=3)
    for call in engine.calls:
        assert [tool["function"]["name"] for tool in call.options["tools"]] == ["add"]
        assert '"total"' in call.options["constraint"].schema
        assert call.options.get("tool_choice", "auto") == "auto"


def test_a_checkpointed_thread_goes_on_where_it_was(llm, engine):
    agent = create_agent(llm, [], checkpointer=InMemorySaver())
    for thread, text in (("a", "one"), ("b", "other"), ("a", "two")):
        agent.invoke({"messages": [("user", text)]}, config={"configurable": {"thread_id": thread}})
    assert [message["content"] for message in engine.calls[-1].prompt] == ["one", "Hello", "two"]


async def test_parallel_branches_of_a_graph_are_all_counted(llm):
    class State(TypedDict):
        answers: Annotated[list[str], operator.add]

    graph = StateGraph(State)
    names = [f"branch {number}" for number in range(8)]
    for name in names:
        graph.add_node(name, lambda state: {"answers": [llm.invoke("Hi").content]})
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    use = OMLXCacheCallback()
    compiled = graph.compile()
    assert compiled.invoke({"answers": []}, config={"callbacks": [use]})["answers"] == ["Hello"] * 8
    assert (await compiled.ainvoke({"answers": []}, config={"callbacks": [use]}))["answers"] == ["Hello"] * 8
    assert use.use.num_requests == 16
