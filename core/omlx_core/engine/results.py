"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
"""``"stop"``: the model ended its answer or a stop text came; ``"length"``: `max_tokens` or the context ran out."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, the end-of-sequence token included.
        cached_tokens: prompt tokens whose KV was reused instead of computed: hot and cold together.
        cached_tokens_hot: of these, how many were in RAM.
        cached_tokens_cold: of these, how many were read from the SSD tier.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens_hot: int = 0
    cached_tokens_cold: int = 0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not prefilled."""
        return self.cached_tokens_hot + self.cached_tokens_cold

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: the answer, without special tokens and without the stop text. Empty if the engine has no tokenizer.
        token_ids: every generated token in order, an end-of-sequence token included.
        logprobs: natural log-probability of each token of `token_ids`, before temperature and truncation; None
            unless asked for.
        finish_reason: why it ended.
        usage: token counts.
        ttft_s: seconds from the call to the first generated token.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    usage: Usage
    ttft_s: float


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of an answer while it is generated.

    Attributes:
        text: new text since the last chunk; may be empty while a character or a stop text is incomplete.
        token_ids: the tokens generated since the last chunk.
        logprobs: their log-probabilities, if asked for.
        result: the whole answer, on the last chunk only.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None = None
    result: GenerationResult | None = None
