"""An agent with three tools, eight turns on one thread: each call of the model reads only what the last one hasn't.

    python examples/langchain/agent.py [--model MODEL]

The prompt of an agent is its tools and everything said so far, and it is sent anew with every call of the model.
"""

import argparse
import re
from pathlib import Path
from typing import Annotated, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import Field
from tqdm import tqdm

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX

DOCS = Path(__file__).parents[2] / "docs"
BLOCK_SIZE = 32  # these prompts are short; the default is 256
QUESTIONS = (
    "Count the words of the page state.",
    "List the headings of the page plugins.",
    "Find the pages that have the word eviction.",
    "Count the words of the page plugins.",
    "List the headings of the page settings.",
    "Find the pages that have the word tenant.",
    "Count the words of the page settings.",
    "List the headings of the page state.",
)

Page = Literal["plugins", "settings", "state"]
Word = Annotated[str, Field(max_length=12)]


def read(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


@tool
def count_words(page: Page) -> str:
    """Count the words of a page."""
    return f"The page {page} has {len(read(page).split()):,} words."


@tool
def list_headings(page: Page) -> str:
    """List the headings of a page."""
    return f"The headings are {', '.join(re.findall(r'^## (.*)', read(page), re.MULTILINE)[:3])}."


@tool
def find_pages(word: Word) -> str:
    """Find the pages that have a word."""
    found = [path.stem for path in sorted(DOCS.glob("*.md")) if word.lower() in read(path.stem).lower()]
    return f"The pages are {', '.join(found[:4]) or 'none'}."


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="a folder or a repository id; left out, a small model is fetched")
model = parser.parse_args().model or str(ensure_sample_model())
llm = ChatOMLX(model=model, kv_cache=CacheSettings(block_size=BLOCK_SIZE), max_tokens=60)


@wrap_model_call
def look_up_then_answer(request, handler):
    """A small model must be told to call a tool, and then to say what it found, and not in the markup of calls."""
    if isinstance(request.messages[-1], HumanMessage):
        return handler(request.override(tool_choice="any", model_settings={"parallel_tool_calls": False}))
    settings = {"max_tokens": 16, "logit_bias": {llm.get_token_ids("<")[0]: -100}}
    return handler(request.override(tool_choice="none", model_settings=settings))


agent = create_agent(
    llm,
    [count_words, list_headings, find_pages],
    system_prompt="Answer with one short sentence.",
    middleware=[look_up_then_answer],
    checkpointer=InMemorySaver(),
)
thread = {"configurable": {"thread_id": "reader"}}
for question in tqdm(QUESTIONS, desc="turns", disable=None):
    messages = agent.invoke({"messages": [("user", question)]}, config=thread)["messages"]

print(f"{'turn':>4} {'prompt':>7} {'new':>5} {'prefilled':>9} {'at most':>7}  says")
turn = known = 0
for message in messages:
    if isinstance(message, HumanMessage):
        turn += 1
    if isinstance(message, AIMessage):
        usage = message.usage_metadata
        new = usage["input_tokens"] - known
        prefilled = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
        says = ", ".join(f"{call['name']}{tuple(call['args'].values())}" for call in message.tool_calls) or message.text
        print(f"{turn:>4} {usage['input_tokens']:>7,} {new:>5} {prefilled:>9} {new + BLOCK_SIZE:>7}  {says}")
        known = usage["total_tokens"]
