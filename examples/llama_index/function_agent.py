"""An agent with tools: the tools, the instructions and all earlier steps are not read again.

python examples/llama_index/function_agent.py [--model MODEL]
"""

import asyncio

from common import make_llm, parse_model
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.memory import ChatMemoryBuffer


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


async def main() -> None:
    llm, table = make_llm(parse_model(__doc__), max_tokens=40)
    agent = FunctionAgent(
        tools=[add, multiply],
        llm=llm,
        system_prompt="You are careful with numbers, and let the tools do the sums.",
        initial_tool_choice="add",  # guaranteed, whatever the model; leave it out for one that calls of its own accord
    )
    memory = ChatMemoryBuffer.from_defaults(token_limit=4000)
    for question in ("What is 3 + 4?", "What is 7 + 5?"):
        run = agent.run(question, memory=memory, max_iterations=4, early_stopping_method="generate")
        async for event in run.stream_events():
            if isinstance(event, ToolCallResult):
                print(f"{event.tool_name}({event.tool_kwargs}) = {event.tool_output}")
        print(f"{question} {await run}")
    table.print()


asyncio.run(main())
