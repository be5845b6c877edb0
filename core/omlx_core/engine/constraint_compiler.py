"""From constraints and tools to grammars that run on a model's tokenizer."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omlx_core.engine.constraint_processor import ConstraintProcessor
from omlx_core.engine.constraint_tools import (
    Piece,
    call_rules,
    call_syntax_of,
    json_rule,
    parameters_of,
    unknown_call_rules,
)
from omlx_core.engine.constraints import Choice, Constraint, Grammar, JSONSchema, Regex
from omlx_core.errors import InvalidConstraintError, InvalidRequestError, InvalidToolError, MissingDependencyError
from omlx_core.model.tool_calls import Tool, ToolCallFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_CACHED_GRAMMARS = 64

# Templates put up to two line breaks between thinking and what follows; models were trained on that.
_AFTER_THINKING = r"/\n{0,2}/"
_OWN_GRAMMAR = "own"


@dataclass(frozen=True, eq=False)
class CompiledConstraint:
    """A grammar that was checked and is ready to run, any number of times and on any thread.

    Attributes:
        matcher: the grammar at its start; only ever copied.
        vocab_size: token ids of its tokenizer.
        end_token_ids: tokens that end an answer.
        thinking_start: tokens with which the model may open thinking.
        thinking_end: tokens that end thinking.
        call_start: the token that starts a tool call, if calls are allowed and there is one.
    """

    matcher: LLMatcher
    vocab_size: int
    end_token_ids: tuple[int, ...]
    thinking_start: tuple[int, ...]
    thinking_end: tuple[int, ...]
    call_start: int | None

    def make_processor(self, *, starts_in_thinking: bool = False) -> ConstraintProcessor:
        """What makes one answer follow the grammar; takes some 20 microseconds.

        Args:
            starts_in_thinking: the prompt ends within thinking, so that the grammar is for what comes after it; without
                effect if nothing is known to end thinking.
        """
        return ConstraintProcessor(
            self.matcher.deep_copy(),
            self.vocab_size,
            self.end_token_ids,
            thinking_start=self.thinking_start,
            thinking_end=self.thinking_end,
            call_start=self.call_start,
            starts_in_thinking=starts_in_thinking and bool(self.thinking_end),
        )


class ConstraintCompiler:
    """Compiles constraints for one model. Thread-safe.

    llguidance's view of the tokenizer is made with the first constraint (a second for 50,000 tokens), and the last
    64 grammars are kept.

    Args:
        tokenizer: the model's mlx-lm `TokenizerWrapper`; None if it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()
        self._llguidance_tokenizer: LLTokenizer | None = None
        self._special_ids: dict[str, int] = {}
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._matchers_lock = threading.Lock()

    def compile(
        self,
        constraint: Constraint | None = None,
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        call_format: ToolCallFormat | None = None,
        thinking_start: Sequence[int] = (),
        thinking_end: Sequence[int] = (),
    ) -> CompiledConstraint | None:
        """Check and compile what an answer must be.

        A ``tool_choice`` of ``"required"`` makes it one or more calls of any tools, and a tool's name exactly one call
        of that tool. With ``"auto"``, a constraint and tools it is one or more calls, or what the constraint asks for.

        Args:
            constraint: what the answer's text must follow.
            tools: what may be called.
            tool_choice: ``"auto"``, ``"none"``, ``"required"`` or a tool's name.
            parallel_tool_calls: whether "one or more" may be more than one.
            call_format: how calls are written; None if the model is told of no tools.
            thinking_start: tokens with which the model may open thinking before its answer. Empty if it doesn't think,
                is not to, or the prompt has opened or closed its thinking.
            thinking_end: tokens that end its thinking.

        Returns:
            None if any answer will do.

        Raises:
            InvalidConstraintError: the constraint can't be followed, or not with this model's tokenizer.
            InvalidToolError: a tool's parameters can't be followed, or calls can't be forced in this model's syntax.
            MissingDependencyError: llguidance isn't installed.
        """
        forces_call = tool_choice not in ("auto", "none")
        if constraint is None and not forces_call:
            return None
        tokenizer = self._ll_tokenizer()
        if tool_choice == "none":
            tools = ()
        elif tool_choice not in ("auto", "required"):
            tools = [tool for tool in tools if tool["function"]["name"] == tool_choice]
        if forces_call:
            if not tools:
                raise InvalidToolError(f"tool_choice={tool_choice!r} is none of the request's tools: give such a tool")
            constraint = None
        is_single = not parallel_tool_calls or tool_choice not in ("auto", "required")
        calls = self._call_rules(tools, tool_choice, call_format, is_single=is_single) if tools else []
        text = self._grammar(constraint, calls, after_thinking=bool(thinking_end))
        matcher = self._matcher(text)
        if matcher is None:
            matcher = _new_matcher(tokenizer, text)
            if matcher.is_error():
                raise _explain(matcher.get_error(), constraint, tools, tokenizer)
            self._keep(text, matcher)
        return CompiledConstraint(
            matcher,
            tokenizer.vocab_size,
            end_token_ids=tuple(tokenizer.eos_tokens),
            thinking_start=tuple(thinking_start) if thinking_end else (),
            thinking_end=tuple(thinking_end),
            call_start=self._call_start(call_format) if tools and call_format is not None else None,
        )

    @staticmethod
    def _grammar(constraint: Constraint | None, calls: list[str], *, after_thinking: bool) -> str:
        """The grammar of calls, by their rules, or an answer, as llguidance takes it."""
        if isinstance(constraint, Grammar) and not calls and not after_thinking:
            return constraint.lark
        rules = list(calls)
        alternatives = ["calls"] if calls else []
        if constraint is not None:
            alternatives.append("answer")
            rules.append(_answer_rule(constraint))
        start = " | ".join(alternatives)
        lark = "\n".join([f"start: {_AFTER_THINKING} ({start})" if after_thinking else f"start: {start}", *rules, ""])
        if not isinstance(constraint, Grammar):
            return lark
        return json.dumps(
            {"grammars": [{"lark_grammar": lark}, {"name": _OWN_GRAMMAR, "lark_grammar": constraint.lark}]}
        )

    def _call_rules(
        self, tools: Sequence[Tool], tool_choice: str, call_format: ToolCallFormat | None, *, is_single: bool
    ) -> list[str]:
        if call_format is None:
            raise InvalidToolError(
                f"tool_choice={tool_choice!r}: how calls are written isn't known: give a tool_format"
            )
        syntax = call_syntax_of(call_format, self._tokenizer.chat_template)
        if syntax is not None:
            # The same few texts stand around every argument of every tool.
            split = functools.cache(self._split)
            return call_rules(tools, syntax, split, is_single=is_single)
        if tool_choice == "auto":
            return unknown_call_rules(call_format.start, call_format.end, self._split)
        raise InvalidToolError(
            f"tool_choice={tool_choice!r}: the calls that this model writes, {call_format.start}…{call_format.end}, "
            'can\'t be put in a grammar: use tool_format="generic"'
        )

    def _call_start(self, call_format: ToolCallFormat) -> int | None:
        match self._split(call_format.start):
            case [int() as token_id]:
                return token_id
        return None

    def _split(self, text: str) -> list[Piece]:
        """Take a text apart into plain text and special tokens."""
        ids = {special: token_id for special, token_id in self._special_ids.items() if special in text}
        if not ids:
            return [text] if text else []
        longest_first = sorted(map(re.escape, ids), key=len, reverse=True)
        parts: list[str] = re.split(f"({'|'.join(longest_first)})", text)
        return [ids.get(part, part) for part in parts if part]

    def _ll_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._llguidance_tokenizer is None:
                made = _make_ll_tokenizer(self._tokenizer)
                # llguidance takes some for special that Hugging Face doesn't: it alone can say.
                self._special_ids = {
                    token.content: token_id
                    for token_id, token in self._tokenizer.added_tokens_decoder.items()
                    if made.is_special_token(token_id)
                }
                self._llguidance_tokenizer = made
            return self._llguidance_tokenizer

    def _matcher(self, grammar: str) -> LLMatcher | None:
        with self._matchers_lock:
            matcher = self._matchers.get(grammar)
            if matcher is not None:
                self._matchers.move_to_end(grammar)
            return matcher

    def _keep(self, grammar: str, matcher: LLMatcher) -> None:
        with self._matchers_lock:
            self._matchers[grammar] = matcher
            if len(self._matchers) > _MAX_CACHED_GRAMMARS:
                self._matchers.popitem(last=False)


def _make_ll_tokenizer(tokenizer: Any) -> LLTokenizer:
    try:
        from llguidance import hf
    except ImportError as exc:
        raise MissingDependencyError(
            f"constraints and forced tool calls need the package 'llguidance', which can't be imported ({exc}): "
            "pip install 'omlx-plugins[structured]'"
        ) from exc
    if tokenizer is None:
        raise InvalidConstraintError("this engine has no tokenizer, and constraints are about text: give it one")
    # A configuration may name more than the tokenizer has.
    end_token_ids = sorted({*tokenizer.eos_token_ids}.intersection(tokenizer.get_vocab().values()))
    if not end_token_ids:
        raise InvalidConstraintError(
            f"this model's tokenizer has none of the end-of-sequence tokens {sorted(tokenizer.eos_token_ids)}, so that "
            "no answer could end: set its eos_token_ids"
        )
    try:
        return hf.from_tokenizer(tokenizer._tokenizer, eos_token=end_token_ids)
    except Exception as exc:  # whatever kind of tokenizer it is, and whatever that lacks
        raise InvalidConstraintError(
            f"constraints can't work with this model's tokenizer, a {type(tokenizer._tokenizer).__name__} ({exc}): "
            "they need one of Hugging Face's fast tokenizers, with byte-level or byte-fallback tokens"
        ) from exc


def _new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def _answer_rule(constraint: Constraint) -> str:
    match constraint:
        case JSONSchema():
            return json_rule("answer", json.loads(constraint.schema), strict=constraint.strict)
        case Regex():
            from llguidance import regex_to_lark

            return f"answer: /{regex_to_lark(constraint.pattern, '')}/"
        case Choice():
            return f"answer: {' | '.join(json.dumps(option, ensure_ascii=False) for option in constraint.options)}"
        case Grammar():
            return f"answer: @{_OWN_GRAMMAR}"
    raise InvalidConstraintError(f"constraint={constraint!r}: give a JSONSchema, Regex, Grammar or Choice")


def _explain(
    message: str, constraint: Constraint | None, tools: Sequence[Tool], tokenizer: LLTokenizer
) -> InvalidRequestError:
    """Say which part of a grammar is at fault, and what to do about it."""
    from llguidance import LLMatcher

    for tool in tools:
        function = tool["function"]
        reason = _schema_error(parameters_of(function), strict=function.get("strict") is True)
        if reason:
            return InvalidToolError(
                f"the parameters of the tool {function['name']!r} can't be enforced: {reason}: change them"
            )
    match constraint:
        case None:
            return InvalidToolError(
                f"calls of these tools can't be put in a grammar: {message}: use fewer or simpler ones"
            )
        case JSONSchema():
            schema = json.loads(constraint.schema)
            reason = _schema_error(schema, strict=constraint.strict)
            remedy = "change the schema"
            if constraint.strict and not _schema_error(schema, strict=False):
                remedy += ", or ignore what can't be enforced with JSONSchema(…, strict=False)"
        case Regex():
            grammar = LLMatcher.grammar_from_regex(constraint.pattern)
            reason, _, _ = LLMatcher.validate_grammar(grammar).partition("\n   1 |")  # the pattern once more
            remedy = "use the syntax of Rust's regex crate, which has no look-around and no back-references"
        case Grammar():
            reason = LLMatcher.validate_grammar(constraint.lark, tokenizer)
            remedy = "see docs/syntax.md of llguidance for what a grammar may be"
        case _:
            reason, remedy = "", "use a simpler one"
    return InvalidConstraintError(
        f"{_shortened(repr(constraint))} can't be followed: {(reason or message).strip()}: {remedy}"
    )


def _schema_error(schema: Mapping[str, Any], *, strict: bool) -> str:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults={"lenient": not strict})
    return LLMatcher.validate_grammar(grammar)


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
