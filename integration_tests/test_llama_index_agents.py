"""LlamaIndex's agents and workflows on the real model: what they send again and again is read once."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step

from omlx_core import CacheSettings
from omlx_core.engine.shared import close_shared_engines
from omlx_plugins.llama_index import OMLX

BLOCK_SIZE = 16

pytestmark = [
    # LlamaIndex's agents look at all their attributes, pydantic's old ones among them.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:is_running called from within a step"),
]


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    yield
    close_shared_engines()


@pytest.fixture
def llm(sample_model):
    return OMLX(model=sample_model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=40, stop=".")


def now() -> str:
    """The time of day."""
    return "noon"


async def test_a_function_agent_calls_and_reads_only_what_is_new(llm):
    agent = FunctionAgent(
        tools=[now],
        llm=llm,
        system_prompt="Be brief. " * 10,
        initial_tool_choice="now",
        early_stopping_method="generate",
    )
    run = agent.run("What time is it?", max_iterations=2)
    outputs = [event async for event in run.stream_events() if isinstance(event, AgentOutput)]
    assert [str(result.tool_output) for result in (await run).tool_calls] == ["noon"]
    calling, answering = (output.raw["usage"] for output in outputs[:2])
    assert outputs[0].raw["finish_reason"] == "tool_calls"
    assert outputs[1].response.content
    known = calling["total_tokens"] - 1  # the last token was generated, not read
    reused = answering["prompt_tokens_details"]["cached_tokens"]
    assert reused >= known // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE


async def test_a_react_agent_gets_along_without_calls(llm):
    agent = ReActAgent(tools=[now], llm=llm.model_copy(update={"max_tokens": 4}), early_stopping_method="generate")
    assert (await agent.run("What time is it?", max_iterations=2)).response.content


async def test_an_agent_workflow_runs_its_agents(llm):
    tool = FunctionTool.from_defaults(now, return_direct=True)
    clock = FunctionAgent(name="clock", description="Knows the time.", tools=[tool], llm=llm, initial_tool_choice="now")
    poet = FunctionAgent(name="poet", description="Writes poems.", llm=llm)
    workflow = AgentWorkflow(agents=[clock, poet], root_agent="clock")
    output = await workflow.run("What time is it?")
    assert (str(output), output.current_agent_name) == ("noon", "clock")


async def test_cancelling_an_agents_run_ends_its_request(llm):
    agent = FunctionAgent(tools=[now], llm=llm.model_copy(update={"max_tokens": 500, "stop": []}))
    engine = await llm.aget_engine()
    run = agent.run("Write a long story.")
    async for event in run.stream_events():
        if getattr(event, "delta", ""):
            break
    assert engine.num_active_requests == 1
    await run.cancel_run()
    while engine.num_active_requests:
        await asyncio.sleep(0)
    assert engine.cache.stats().hot.blocks_in_use == 0


class Question(Event):
    text: str


class Reply(Event):
    cached_tokens: int


class AskAll(Workflow):
    """Asks about one context in several steps at a time."""

    def __init__(self, llm, context):
        super().__init__(timeout=120)
        self._llm = llm
        self._context = ChatMessage(context, role="system")

    @step
    async def fan_out(self, ctx: Context, _: StartEvent) -> Question | None:
        for word in ("block", "chain", "tier"):
            ctx.send_event(Question(text=f"What is a {word}?"))

    @step(num_workers=3)
    async def ask(self, question: Question) -> Reply:
        response = await self._llm.achat([self._context, ChatMessage(question.text)], max_tokens=4)
        return Reply(cached_tokens=response.raw["usage"]["prompt_tokens_details"]["cached_tokens"])

    @step
    async def gather(self, ctx: Context, reply: Reply) -> StopEvent | None:
        replies = ctx.collect_events(reply, [Reply] * 3)
        return None if replies is None else StopEvent(result=[reply.cached_tokens for reply in replies])


async def test_the_workers_of_a_workflow_share_their_prefix(llm, document):
    context = document[:600]
    await llm.achat([ChatMessage(context, role="system"), ChatMessage("Hi")], max_tokens=1)
    shared = len(llm.get_token_ids(context)) // BLOCK_SIZE * BLOCK_SIZE
    assert min(await AskAll(llm, context).run()) >= shared
