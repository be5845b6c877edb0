"""What an answer says beside its text: usage, how it came about, and log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata

from omlx_core import GenerationResult, Usage
from omlx_plugins.base import reuse_metadata, token_texts

if TYPE_CHECKING:
    from omlx_core import Engine

PROVIDER = "omlx"


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Token counts; ``cache_read`` are the prompt's tokens that were reused from either tier."""
    metadata = UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )
    if usage.reasoning_tokens:
        metadata["output_token_details"] = OutputTokenDetails(reasoning=usage.reasoning_tokens)
    return metadata


def response_metadata(engine: Engine, model: str, result: GenerationResult) -> dict[str, Any]:
    """The model, why the answer ended, and under ``"omlx"`` what the cache did for it.

    Raises:
        InvalidPromptError: log-probabilities of an engine without a tokenizer.
    """
    metadata: dict[str, Any] = {
        "model_name": model,
        "model_provider": PROVIDER,
        "finish_reason": result.finish_reason,
        PROVIDER: reuse_metadata(result),
    }
    if result.logprobs is not None:
        metadata["logprobs"] = {"content": _logprobs(engine, result, result.logprobs)}
    return metadata


def _logprobs(engine: Engine, result: GenerationResult, logprobs: list[float]) -> list[dict[str, Any]]:
    """OpenAI's shape, with an entry for each generated token, an end-of-sequence token included."""
    places = result.top_logprobs or [[] for _ in logprobs]
    likely_ids = [likely.token_id for place in places for likely in place]
    texts = token_texts(engine, [*result.token_ids, *likely_ids])
    likely_texts = iter(texts[len(result.token_ids) :])
    return [
        {
            **_token(text, logprob),
            "top_logprobs": [_token(next(likely_texts), likely.logprob) for likely in place],
        }
        for text, logprob, place in zip(texts[: len(logprobs)], logprobs, places, strict=True)
    ]


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has bytes that its text doesn't show.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
