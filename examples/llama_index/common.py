"""What the examples beside this file share: their argument, their model, and a table of what its requests cost."""

import argparse

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pydantic import Field

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.llama_index import OMLX


class CostTable(BaseEventHandler):
    """Takes down every answer that comes from a model of this project, whatever asks for it."""

    answers: list[dict] = Field(default_factory=list)

    def handle(self, event, **_):
        """LlamaIndex calls this with each of its events."""
        if isinstance(event, LLMChatEndEvent) and event.response and isinstance(event.response.raw, dict):
            self.answers.append(event.response.raw)

    def sums(self):
        """Prompt tokens, and those of them that were reused."""
        usages = [answer["usage"] for answer in self.answers]
        reused = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        return sum(usage["prompt_tokens"] for usage in usages), sum(reused)

    def print(self):
        """A line for each request."""
        print(f"\n{'request':>7} {'prompt tokens':>14} {'reused':>7} {'read':>6} {'first token':>12}")
        for number, answer in enumerate(self.answers, start=1):
            prompt, reused = answer["usage"]["prompt_tokens"], answer["omlx"]["cached_tokens_hot"]
            seconds = answer["omlx"]["ttft_s"]
            print(f"{number:>7} {prompt:>14} {reused:>7} {prompt - reused:>6} {seconds:>10.2f} s")


def parse_model(description):
    """The model that the command line names; the sample model otherwise."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a folder or a repository id; SmolLM2-135M-Instruct otherwise")
    return parser.parse_args().model or str(ensure_sample_model())


def make_llm(model, *, is_cached=True, **options):
    """An LLM and the table of what it is asked from now on."""
    cache = CacheSettings(block_size=32, no_cache=not is_cached)
    table = CostTable()
    get_dispatcher().event_handlers = [table]
    return OMLX(model=model, kv_cache=cache, **options), table
