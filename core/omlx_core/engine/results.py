"""What a request gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "tool_calls"]
"""``"stop"``: the model ended its answer or a stop text came; ``"length"``: `max_tokens` or the context ran out;
``"tool_calls"``: it ended its answer, which calls tools."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, as the model wrote it.

    Attributes:
        id: names the call within a conversation.
        name: the tool's name.
        arguments: its arguments by name.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """What stood where a call of a tool should, and isn't one.

    Attributes:
        id: names the call within a conversation.
        text: what the model wrote between the markers.
        error: what is wrong with it.
    """

    id: str
    text: str
    error: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that might have been next.

    Attributes:
        token_id: the token.
        logprob: its natural log-probability.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a prompt left the sequence in the cache that it shares most with.

    Attributes:
        position: tokens that both begin with; the token at this index is the first to differ.
        prompt_ids: the prompt's next few tokens.
        cached_ids: those of the other sequence; empty where it ends.
        prompt_text: what `prompt_ids` read, if that was asked for.
        cached_text: what `cached_ids` read, if that was asked for.
    """

    position: int
    prompt_ids: tuple[int, ...]
    cached_ids: tuple[int, ...]
    prompt_text: str | None = None
    cached_text: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, the end-of-sequence token included.
        cached_tokens: prompt tokens whose KV was reused instead of computed: hot and cold together.
        cached_tokens_hot: of these, how many were in RAM.
        cached_tokens_cold: of these, how many were read from the SSD tier.
        approximate_tokens: further prompt tokens, of documents, whose KV was computed elsewhere and moved here, which
            only ``document_reuse="approximate"`` does.
        reasoning_tokens: generated tokens of the model's reasoning, its markers included; 0 for one that doesn't think.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens_hot: int = 0
    cached_tokens_cold: int = 0
    reasoning_tokens: int = 0
    approximate_tokens: int = 0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found in the cache, for just this prefix."""
        return self.cached_tokens_hot + self.cached_tokens_cold

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: the answer, without special tokens, reasoning, tool calls and the stop text. Empty if the engine has no
            tokenizer.
        token_ids: every generated token in order, an end-of-sequence token included.
        logprobs: natural log-probability of each token of `token_ids`, before temperature and truncation; None
            unless asked for.
        finish_reason: why it ended.
        usage: token counts.
        ttft_s: seconds from the call to the first generated token.
        reasoning: what a model that thinks wrote before its answer.
        tool_calls: the tools that a chat's answer calls.
        invalid_tool_calls: what should be such calls and isn't.
        top_logprobs: for each token of `token_ids` the likeliest in its place, likeliest first; None unless asked for.
        divergence: where the prompt left what the cache has; None if it didn't, or nothing is known that begins
            like it.
        duration_s: seconds from the call to the result.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    usage: Usage
    ttft_s: float
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    invalid_tool_calls: list[InvalidToolCall] = field(default_factory=list)
    top_logprobs: list[list[TokenLogprob]] | None = None
    divergence: Divergence | None = None
    duration_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens generated per second after the first; None of fewer than two."""
        decoding_s = self.duration_s - self.ttft_s
        return (len(self.token_ids) - 1) / decoding_s if len(self.token_ids) > 1 and decoding_s > 0 else None


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of an answer while it is generated.

    Attributes:
        text: new text since the last chunk; may be empty while a character or a stop text is incomplete.
        token_ids: the tokens generated since the last chunk.
        logprobs: their log-probabilities, if asked for.
        result: the whole answer, on the last chunk only.
        reasoning: new text of the model's reasoning.
        tool_calls: calls that are complete now.
        invalid_tool_calls: likewise, what isn't one.
        top_logprobs: the likeliest tokens in the place of each, if asked for.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None = None
    result: GenerationResult | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    invalid_tool_calls: list[InvalidToolCall] = field(default_factory=list)
    top_logprobs: list[list[TokenLogprob]] | None = None
