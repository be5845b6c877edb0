"""What a request may ask for."""

from __future__ import annotations

import dataclasses
import difflib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from omlx_core.engine.constraints import Constraint
from omlx_core.errors import InvalidParameterError, InvalidToolError, UnknownParameterError
from omlx_core.model.chat_messages import check_tools

ChatMessage = Mapping[str, Any]
"""A chat message as the model's template takes it: ``{"role": …, "content": …}``."""

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or chat messages for the model's template."""

ToolFormat = Literal["template", "generic"]
"""How tools are shown to the model, and their calls read: as its chat template does it, or as this project does."""

DocumentReuseMode = Literal["exact", "approximate"]
"""Whether a document's keys and values may be used behind another prefix than they were computed for."""

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0

_DECIMAL = re.compile(r"[0-9]{1,10}")

_SWITCHES = ("logprobs", "parallel_tool_calls", "continue_final_message", "store", "progress", "divergence_text")

# What the engine itself passes to the chat template.
_TAKEN_TEMPLATE_ARGS = frozenset(
    {"add_generation_prompt", "continue_final_message", "conversation", "messages", "tokenize", "tools"}
)


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `Engine.generate` and its kin; `GenerationParams` documents them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_context_tokens: int
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: bool
    top_logprobs: int
    timeout_s: float | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str
    parallel_tool_calls: bool
    tool_format: ToolFormat | None
    constraint: Constraint | None
    template_args: Mapping[str, Any] | None
    continue_final_message: bool
    cache_salt: str | None
    store: bool
    pin: bool | Sequence[ChatMessage]
    document_reuse: DocumentReuseMode
    documents: Sequence[str]
    document_recompute_tokens: int
    on_prefill: Callable[[int, int], None] | None
    progress: bool
    divergence_text: bool


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Validated options of one request. Sequences and mappings are copied, and None stands for an empty one.

    Attributes:
        max_tokens: most tokens to generate; lowered to what the context has left.
        temperature: 0 is greedy; then nothing is drawn, and `top_p`, `top_k`, `min_p` and `seed` have no effect.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: most likely tokens to choose from; 0 is off.
        min_p: least probability relative to the likeliest token, in [0, 1]; 0 is off.
        xtc_probability: how often, in [0, 1], all tokens above `xtc_threshold` but the least likely of them are left
            out; 0 is off.
        xtc_threshold: the probability, in [0, 0.5], from which on `xtc_probability` takes a token for a likely one.
        repetition_penalty: divides positive logits of recent tokens and multiplies negative ones; 1 is off.
        presence_penalty: subtracted from the logit of each recent token, in [-2, 2]; 0 is off.
        frequency_penalty: the same, for each time that the token is there; 0 is off.
        penalty_context_tokens: how many of the last tokens, the prompt's included, are recent for the penalties.
        logit_bias: token id to what is added to its logit, in [-100, 100]; decimal strings are taken as ids too.
        seed: makes sampling repeatable, alone or in any batch; None draws one.
        stop: texts that end the answer; none of them is ever part of it.
        logprobs: return the log-probability of each generated token.
        top_logprobs: return this many of the likeliest tokens, at most 20, in each place too; sets `logprobs`.
        timeout_s: seconds from the call after which the request fails; None is no limit.
        tools: the tools that the model may call, each ``{"type": "function", "function": {"name": …, …}}`` or the
            function in it alone.
        tool_choice: ``"auto"`` leaves it to the model, ``"none"`` forbids calls, ``"required"`` demands one or more,
            and a tool's name demands a call of that one.
        parallel_tool_calls: False ends an answer with its first call.
        tool_format: how tools are shown to the model and their calls read; None finds out.
        constraint: what the answer must follow: a schema, a pattern, a grammar or a choice.
        template_args: further arguments of the model's chat template, such as ``{"enable_thinking": False}``.
        continue_final_message: the answer goes on where the last message ends, instead of replying to it.
        cache_salt: requests of different salt never share a cached prefix.
        store: keep what this request computes in the cache; what is there already is reused either way.
        pin: keep the prompt's blocks in RAM until `Engine.unpin`, within the cache's ``pin_share``; or only those of
            the messages given here, which the prompt begins with: the last of them may have less text than there.
        document_reuse: ``"approximate"`` uses the keys and values that each of `documents` has by itself, wherever it
            stands. Experimental: the answer is another one than the prompt's own; ``docs/rag.md`` says how far from it.
            For models with rotary embeddings and full attention in all layers.
        documents: the texts of the prompt's documents, in its order; only `document_reuse` asks for them. White space
            around them doesn't count.
        document_recompute_tokens: how many tokens of each document are computed in their place all the same.
        on_prefill: called with the number of prompt tokens that are ready and of all of them while the prompt is
            computed, on the engine's thread: it must return at once.
        progress: show the prompt's progress on standard error.
        divergence_text: the report of where the prompt left the cache has text beside the token ids.

    Raises:
        InvalidParameterError: a value of the wrong type or out of range, or options that contradict each other.
        InvalidToolError: a tool without a name of its own, or a `tool_choice` that can't be met.
    """

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
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    timeout_s: float | None = None
    tools: Sequence[Mapping[str, Any]] = field(default=(), hash=False)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    tool_format: ToolFormat | None = None
    constraint: Constraint | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    continue_final_message: bool = False
    cache_salt: str | None = None
    store: bool = True
    pin: bool | Sequence[ChatMessage] = field(default=False, hash=False)
    document_reuse: DocumentReuseMode = "exact"
    documents: Sequence[str] = field(default=(), hash=False)
    document_recompute_tokens: int = 16
    on_prefill: Callable[[int, int], None] | None = field(default=None, compare=False, repr=False)
    progress: bool = False
    divergence_text: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GenerationParams:
        """Validate keyword arguments.

        Raises:
            UnknownParameterError: a name that isn't an attribute of this class.
            InvalidParameterError, InvalidToolError: as the class.
        """
        known = [attribute.name for attribute in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UnknownParameterError(f"unknown parameter {name!r}: {hint}there are {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise InvalidParameterError(f"cache_salt={self.cache_salt!r}: give a string or None")
        if not isinstance(self.pin, bool) and (
            isinstance(self.pin, str)
            or not isinstance(self.pin, Sequence)
            or not all(isinstance(message, Mapping) for message in self.pin)
        ):
            raise InvalidParameterError(
                f"pin={self.pin!r}: give True, False, or the messages at the prompt's beginning that are to be pinned"
            )
        if self.on_prefill is not None and not callable(self.on_prefill):
            raise InvalidParameterError(f"on_prefill={self.on_prefill!r}: give a function of two numbers, or None")
        if self.document_reuse not in ("exact", "approximate"):
            raise InvalidParameterError(f"document_reuse={self.document_reuse!r}: give 'exact' or 'approximate'")
        if isinstance(self.documents, str) or not all(isinstance(text, str) for text in self.documents or ()):
            raise InvalidParameterError(f"documents={self.documents!r}: give the texts of the prompt's documents")
        if self.tool_format not in (None, "template", "generic"):
            raise InvalidParameterError(f"tool_format={self.tool_format!r}: give 'template', 'generic' or None")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise InvalidParameterError(
                f"constraint={self.constraint!r}: give a JSONSchema, Regex, Grammar or Choice, or None"
            )
        self._set(
            stop=_stop_texts(self.stop),
            logit_bias=_logit_bias(self.logit_bias),
            logprobs=self.logprobs or self.top_logprobs > 0,
            tools=_tools(self.tools),
            template_args=_template_args(self.template_args),
            pin=self.pin if isinstance(self.pin, bool) else tuple(self.pin),
            documents=tuple(self.documents or ()),
        )
        self._check_tool_choice()
        self._check_combinations()

    @property
    def extra_keys(self) -> tuple[str, ...]:
        """What, beside the tokens, two requests must agree on to share a block."""
        return () if self.cache_salt is None else (f"salt:{self.cache_salt}",)

    @property
    def is_approximate(self) -> bool:
        """Whether documents may be put in place approximately."""
        return self.document_reuse == "approximate" and bool(self.documents)

    @property
    def tool_names(self) -> list[str]:
        """The names of `tools`, in their order."""
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def forces_tool_call(self) -> bool:
        """Whether the answer must call a tool."""
        return self.tool_choice not in ("auto", "none")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_tool_choice(self) -> None:
        choice = self.tool_choice
        if not isinstance(choice, str):
            raise InvalidToolError(f"tool_choice={choice!r}: give 'auto', 'none', 'required' or a tool's name")
        if choice == "required" and not self.tools:
            raise InvalidToolError("tool_choice='required' without tools: give tools, or leave the choice at 'auto'")
        if choice not in ("auto", "none", "required", *self.tool_names):
            known = ", ".join(map(repr, self.tool_names)) or "none at all"
            raise InvalidToolError(
                f"tool_choice={choice!r} is not one of the request's tools, which are {known}: "
                "give 'auto', 'none', 'required' or the name of one of them"
            )

    def _check_combinations(self) -> None:
        """Refuse what can't be meant; what merely has no effect is left alone, since defaults are often shared."""
        if self.xtc_probability > 0 and self.temperature == 0:
            raise InvalidParameterError(
                f"xtc_probability={self.xtc_probability!r} with temperature=0, which draws nothing: "
                "give a temperature of more than 0, or leave XTC out"
            )
        if self.is_approximate and self.pin:
            raise InvalidParameterError(
                "pin with document_reuse='approximate': nothing of such a prompt is kept that could be pinned: leave "
                "one of them out"
            )
        if self.forces_tool_call and self.continue_final_message:
            raise InvalidParameterError(
                f"continue_final_message=True with tool_choice={self.tool_choice!r}: a call can't go on where a "
                "message ends: leave one of them out"
            )
        if self.forces_tool_call and self.constraint is not None:
            raise InvalidParameterError(
                f"constraint={self.constraint!r} with tool_choice={self.tool_choice!r}: an answer is either a call or "
                "what the constraint asks for: leave one of them out"
            )


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a number may be, both ends included but for `excludes_low`."""

    kind: type[int] | type[float]
    low: float
    high: float | None = None
    excludes_low: bool = False
    accepts_none: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.accepts_none:
            return
        accepted = int if self.kind is int else (int, float)
        is_number = isinstance(value, accepted) and not isinstance(value, bool)
        if (
            is_number
            and (value > self.low if self.excludes_low else value >= self.low)
            and (self.high is None or value <= self.high)
        ):
            return
        kind = "a whole number" if self.kind is int else "a number"
        lower = f"more than {self.low}" if self.excludes_low else f"at least {self.low}"
        upper = "" if self.high is None else f" and at most {self.high}"
        alternative = ", or None" if self.accepts_none else ""
        raise InvalidParameterError(f"{name}={value!r}: give {kind} of {lower}{upper}{alternative}")


# Bias and repetition penalty are bounded so that no logit leaves the range of float16, where it would become NaN.
_LIMITS = {
    "max_tokens": _Limits(int, 1),
    "temperature": _Limits(float, 0, 100),
    "top_p": _Limits(float, 0, 1, excludes_low=True),
    "top_k": _Limits(int, 0),
    "min_p": _Limits(float, 0, 1),
    "xtc_probability": _Limits(float, 0, 1),
    "xtc_threshold": _Limits(float, 0, 0.5),
    "repetition_penalty": _Limits(float, 0.01, 100),
    "presence_penalty": _Limits(float, -2, 2),
    "frequency_penalty": _Limits(float, -2, 2),
    "penalty_context_tokens": _Limits(int, 1, 2**31 - 1),  # MLX's slices
    "document_recompute_tokens": _Limits(int, 0),
    "seed": _Limits(int, 0, 2**64 - 1, accepts_none=True),
    "top_logprobs": _Limits(int, 0, MAX_TOP_LOGPROBS),
    "timeout_s": _Limits(float, 0, threading.TIMEOUT_MAX, excludes_low=True, accepts_none=True),
}


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = () if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidParameterError(f"stop={stop!r}: give one or more non-empty strings")
    return tuple(texts)


def _logit_bias(bias: Any) -> Mapping[int, float]:
    if bias is not None and not isinstance(bias, Mapping):
        raise InvalidParameterError(f"logit_bias={bias!r}: give a dict of token ids to numbers")
    by_token_id: dict[int, float] = {}
    for key, value in (bias or {}).items():
        # JSON has no other keys than strings.
        token_id = int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else key
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise InvalidParameterError(f"logit_bias has the key {key!r}: give token ids, whole numbers of at least 0")
        if token_id in by_token_id:
            raise InvalidParameterError(f"logit_bias has the token id {token_id} twice: give it once")
        _Limits(float, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS).check(f"logit_bias[{key!r}]", value)
        by_token_id[token_id] = float(value)
    return MappingProxyType(by_token_id)


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InvalidToolError(f"tools={tools!r}: give a list of tools")
    return tuple(check_tools(tools))


def _template_args(args: Any) -> Mapping[str, Any]:
    if args is not None and not (isinstance(args, Mapping) and all(isinstance(name, str) for name in args)):
        raise InvalidParameterError(f"template_args={args!r}: give a dict of names to values")
    for name in sorted(_TAKEN_TEMPLATE_ARGS.intersection(args or {})):
        raise InvalidParameterError(
            f"template_args has {name!r}, which the engine gives to the template itself: leave it out"
        )
    return MappingProxyType(dict(args or {}))
