"""What a request may ask for."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from omlx_core.errors import InvalidParameterError, UnknownParameterError

ChatMessage = Mapping[str, Any]
"""A chat message as the model's template takes it: ``{"role": …, "content": …}``."""

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or chat messages for the model's template."""


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `Engine.generate` and its kin; `GenerationParams` documents them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: str | Sequence[str]
    logprobs: bool
    cache_salt: str | None
    store: bool


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Validated options of one request.

    Attributes:
        max_tokens: most tokens to generate; lowered to what the context has left.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: most likely tokens to choose from; 0 is off.
        min_p: least probability relative to the likeliest token, in [0, 1]; 0 is off.
        seed: makes sampling repeatable, alone or in any batch; None draws one.
        stop: texts that end the answer; none of them is ever part of it.
        logprobs: return the log-probability of each generated token.
        cache_salt: requests of different salt never share a cached prefix.
        store: keep what this request computes in the cache; what is there already is reused either way.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    cache_salt: str | None = None
    store: bool = True

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> GenerationParams:
        """Validate keyword arguments.

        Raises:
            UnknownParameterError: a name that isn't an attribute of this class.
            InvalidParameterError: a value of the wrong type or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UnknownParameterError(f"unknown parameter {name!r}: {hint}there are {', '.join(known)}")
        values = dict(options)
        stop = values.get("stop")
        if "stop" in values:
            values["stop"] = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**values)

    def __post_init__(self) -> None:
        _check_number("max_tokens", self.max_tokens, int, low=1)
        _check_number("temperature", self.temperature, float, low=0, high=100)
        _check_number("top_p", self.top_p, float, low=0, high=1, low_is_excluded=True)
        _check_number("top_k", self.top_k, int, low=0)
        _check_number("min_p", self.min_p, float, low=0, high=1)
        if self.seed is not None:
            _check_number("seed", self.seed, int, low=0, high=2**64 - 1)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidParameterError(f"stop={self.stop!r}: give one or more non-empty strings")
        for name in ("logprobs", "store"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameterError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise InvalidParameterError(f"cache_salt={self.cache_salt!r}: give a string or None")

    @property
    def extra_keys(self) -> tuple[str, ...]:
        """What, beside the tokens, two requests must agree on to share a block."""
        return () if self.cache_salt is None else (f"salt:{self.cache_salt}",)


def _check_number(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    *,
    low: float,
    high: float | None = None,
    low_is_excluded: bool = False,
) -> None:
    accepted = int if kind is int else (int, float)
    number = isinstance(value, accepted) and not isinstance(value, bool)
    if number and (value > low if low_is_excluded else value >= low) and (high is None or value <= high):
        return
    lower = f"more than {low}" if low_is_excluded else f"at least {low}"
    upper = "" if high is None else f" and at most {high}"
    raise InvalidParameterError(
        f"{name}={value!r}: give {'a whole number' if kind is int else 'a number'} of {lower}{upper}"
    )
