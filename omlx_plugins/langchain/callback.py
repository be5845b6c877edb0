"""What the prefix cache did for everything that a chain or an agent asked."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from omlx_plugins.langchain.metadata import PROVIDER


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Sums over requests.

    Attributes:
        num_requests: how many there were.
        prompt_tokens: tokens of their prompts.
        cached_tokens_hot: of these, how many were reused from RAM.
        cached_tokens_cold: of these, how many were read from the SSD tier.
        completion_tokens: tokens generated.
        ttft_s: seconds from the requests to their first tokens.
        max_ttft_s: the longest of these times.
    """

    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens_hot: int = 0
    cached_tokens_cold: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0
    max_ttft_s: float = 0.0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return self.cached_tokens_hot + self.cached_tokens_cold

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def mean_ttft_s(self) -> float:
        """Seconds to the first token of a request; 0 of none."""
        return self.ttft_s / self.num_requests if self.num_requests else 0.0


class OMLXCacheCallback(BaseCallbackHandler):
    """Adds up what the requests of this project's models cost, from whatever chain, agent or graph. Thread-safe.

    ::

        cache = OMLXCacheCallback()
        agent.invoke(…, config={"callbacks": [cache]})
        print(cache.summary())

    Answers of other models, and those that come from LangChain's own cache, are passed over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._use = CacheUse()

    @property
    def use(self) -> CacheUse:
        """The sums at this moment."""
        with self._lock:
            return self._use

    def reset(self) -> CacheUse:
        """Begin again from nothing; returns the sums up to here."""
        with self._lock:
            use, self._use = self._use, CacheUse()
        return use

    def summary(self) -> str:
        """The sums in one line for people."""
        use = self.use
        share = use.cached_tokens / use.prompt_tokens if use.prompt_tokens else 0.0
        return (
            f"{use.num_requests:,} request{'' if use.num_requests == 1 else 's'}: {use.prompt_tokens:,} prompt tokens, "
            f"{share:.0%} reused ({use.cached_tokens_hot:,} from RAM, {use.cached_tokens_cold:,} from SSD), "
            f"{use.computed_tokens:,} computed; {use.completion_tokens:,} generated; "
            f"first token after {use.mean_ttft_s:.2f} s on average, {use.max_ttft_s:.2f} s at most"
        )

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        """Take a request's result."""
        uses = list(_uses(response))
        with self._lock:
            for use in uses:
                self._use = _sum(self._use, use)


def _uses(response: LLMResult) -> Iterator[CacheUse]:
    for generations in response.generations:
        for generation in generations:
            if isinstance(generation, ChatGeneration):
                message = generation.message
                usage = message.usage_metadata if isinstance(message, AIMessage) else None
                metadata: Mapping[str, Any] = message.response_metadata
            else:
                metadata = generation.generation_info or {}
                usage = metadata.get("usage_metadata")
            reuse = metadata.get(PROVIDER)
            # LangChain's cache writes into an answer that it cost nothing.
            if not isinstance(reuse, Mapping) or usage is None or "total_cost" in usage:
                continue
            yield CacheUse(
                num_requests=1,
                prompt_tokens=usage["input_tokens"],
                cached_tokens_hot=reuse["cached_tokens_hot"],
                cached_tokens_cold=reuse["cached_tokens_cold"],
                completion_tokens=usage["output_tokens"],
                ttft_s=reuse["ttft_s"],
                max_ttft_s=reuse["ttft_s"],
            )


def _sum(total: CacheUse, use: CacheUse) -> CacheUse:
    sums = {name: value + getattr(use, name) for name, value in dataclasses.asdict(total).items()}
    return CacheUse(**{**sums, "max_ttft_s": max(total.max_ttft_s, use.max_ttft_s)})
