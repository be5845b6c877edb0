"""What the adapters have in common: the model's fields, its engine, and the options of a request."""

from __future__ import annotations

import difflib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from omlx_core import CacheSettings, GenerationParams, GenerationResult
from omlx_core.engine import shared
from omlx_core.engine.params import DocumentReuseMode, GenerationOptions, ToolFormat
from omlx_core.engine.results import Divergence
from omlx_core.errors import InvalidPromptError, UnknownParameterError
from omlx_plugins.plugins import forward_cache_events, register_state_handlers

if TYPE_CHECKING:
    from omlx_core import Engine
else:
    Engine = Any  # pydantic reads the annotation, and the class itself would import MLX

PathText = Annotated[str, BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path)]
"""A string field that takes paths too."""


class BaseOMLX(BaseModel):
    """A local model, as fields of a framework's class.

    Making one is cheap. The model is loaded by the first request, into an engine which everything in the process
    that names the same model and cache shares.

    Attributes:
        model: a folder or a repository id.
        adapter_path: a folder with LoRA weights.
        kv_cache: how prefixes are cached; None reads the ``OMLX_*`` environment variables.
        engine: an engine to use instead of a shared one; whoever made it closes it.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: most likely tokens to choose from; 0 is off.
        min_p: least probability relative to the likeliest token, in [0, 1]; 0 is off.
        xtc_probability: how often the likeliest tokens are left out, in [0, 1]; 0 is off.
        xtc_threshold: the probability, in [0, 0.5], from which on XTC takes a token for a likely one.
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones; 1 is off.
        presence_penalty: subtracted from the logit of each recent token, in [-2, 2]; 0 is off.
        frequency_penalty: the same, for each time that the token is there; 0 is off.
        penalty_context_tokens: how many of the last tokens, the prompt's included, are recent for the penalties.
        logit_bias: token id to what is added to its logit, in [-100, 100].
        seed: makes sampling repeatable.
        stop: texts that end the answer, themselves not part of it.
        logprobs: return the log-probability of each generated token.
        top_logprobs: return this many of the likeliest tokens, at most 20, in each place too.
        timeout_s: seconds after which a request fails; None is no limit.
        tool_format: how tools are shown to the model and their calls read: ``"template"``, ``"generic"``, or None to
            find out.
        template_args: further arguments of the model's chat template, such as ``{"enable_thinking": False}``.
        cache_salt: requests of different salt never share a cached prefix.
        store: keep what a request computes in the cache; what is there already is reused either way.
        document_reuse: ``"approximate"`` uses the keys and values that each document has by itself, wherever it stands;
            a call names them as ``documents``, texts in the prompt's order. Experimental, and not exact.
        document_recompute_tokens: how many tokens of each document are computed in their place all the same.

    Raises:
        UnknownParameterError: a keyword that isn't a field.
        InvalidParameterError: an option out of its range.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: PathText
    adapter_path: PathText | None = None
    kv_cache: CacheSettings | None = None
    engine: Engine | None = Field(default=None, exclude=True, repr=False)
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_context_tokens: int = 20
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    logprobs: bool = False
    top_logprobs: int = 0
    timeout_s: float | None = None
    tool_format: ToolFormat | None = None
    template_args: dict[str, Any] | None = None
    cache_salt: str | None = None
    store: bool = True
    document_reuse: DocumentReuseMode = "exact"
    document_recompute_tokens: int = 16

    _ignored_keywords: ClassVar[frozenset[str]] = frozenset()
    """Keywords that a framework's users pass to any model and that mean nothing for a local one."""

    # The type checker keeps the signature that it derives from the fields.
    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **values: Any) -> None:
            known = type(self).model_fields
            aliases = {field.alias for field in known.values()}
            for name in list(values):
                if name in type(self)._ignored_keywords:
                    del values[name]
                elif name not in known and name not in aliases:
                    close = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {close[0]!r}? " if close else ""
                    raise UnknownParameterError(
                        f"unknown parameter {name!r}: {hint}there are {', '.join(BaseOMLX.model_fields)} and the "
                        "framework's own"
                    )
            GenerationParams.from_options({name: values[name] for name in _option_names() if name in values})
            if values.get("engine") is not None:
                values.setdefault("model", values["engine"].name)
            super().__init__(*args, **values)

    @contextmanager
    def lease_engine(self) -> Iterator[Engine]:
        """The engine behind this model, which stays loaded until the block ends; for requests.

        Loads the model on first use, which blocks.
        """
        register_state_handlers()
        shared_engine = shared.lease_shared_engine(self.model, self.adapter_path, self.kv_cache)
        with nullcontext(self.engine) if self.engine else shared_engine as engine:
            forward_cache_events(engine)
            yield engine

    @asynccontextmanager
    async def alease_engine(self) -> AsyncIterator[Engine]:
        """As `lease_engine`; a load runs on a thread and leaves the event loop free."""
        register_state_handlers()
        shared_engine = shared.alease_shared_engine(self.model, self.adapter_path, self.kv_cache)
        async with nullcontext(self.engine) if self.engine else shared_engine as engine:
            forward_cache_events(engine)
            yield engine

    def get_engine(self) -> Engine:
        """The engine behind this model, for a look at it; loads the model on first use, which blocks.

        Where `OMLX_MAX_MODEL_MEMORY` or `OMLX_MODEL_IDLE_TIMEOUT_S` is set, the model may be unloaded, and the engine
        then takes no requests any more.
        """
        with self.lease_engine() as engine:
            return engine

    async def aget_engine(self) -> Engine:
        """As `get_engine`; a load runs on a thread and leaves the event loop free."""
        async with self.alease_engine() as engine:
            return engine

    def generation_options(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """This model's options for one request, with a call's own keywords on top.

        Raises:
            UnknownParameterError: an override that isn't an option.
            InvalidParameterError: a value out of its range.
        """
        options = {name: getattr(self, name) for name in _option_names()} | dict(overrides or {})
        GenerationParams.from_options(options)  # a bad one is named before the model is loaded
        return options


def _option_names() -> list[str]:
    """The options of a request that are a model's fields too; others, such as its tools, are a call's own."""
    return [name for name in GenerationOptions.__annotations__ if name in BaseOMLX.model_fields]


def reuse_metadata(result: GenerationResult) -> dict[str, Any]:
    """What the cache did for a request, for an adapter's metadata.

    Returns:
        Tokens reused from each tier, seconds to the first token, tokens per second after it (None of fewer than two),
        and where the prompt left what the cache has (None if it didn't); the tokens that were put in place
        approximately, if there are some.
    """
    approximate = result.usage.approximate_tokens
    return {
        **({"approximate_tokens": approximate} if approximate else {}),
        "cached_tokens_hot": result.usage.cached_tokens_hot,
        "cached_tokens_cold": result.usage.cached_tokens_cold,
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
        "divergence": None if result.divergence is None else _divergence(result.divergence),
    }


def _divergence(divergence: Divergence) -> dict[str, Any]:
    texts = {"prompt_text": divergence.prompt_text, "cached_text": divergence.cached_text}
    return {"position": divergence.position, **{name: text for name, text in texts.items() if text is not None}}


def token_texts(engine: Engine, token_ids: list[int]) -> list[str]:
    """The text of each token; a token that is part of a character reads as U+FFFD.

    Raises:
        InvalidPromptError: the engine has no tokenizer.
    """
    tokenizer = require_tokenizer(engine)
    return [tokenizer.decode([token_id]) for token_id in token_ids]


def require_tokenizer(engine: Engine) -> Any:
    """The engine's tokenizer.

    Raises:
        InvalidPromptError: it was made without one.
    """
    if engine.tokenizer is None:
        raise InvalidPromptError(
            f"the engine {engine.name!r} has no tokenizer, so it takes token ids only: make it with "
            "Engine(model, tokenizer=…)"
        )
    return engine.tokenizer
