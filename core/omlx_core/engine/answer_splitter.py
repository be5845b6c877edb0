"""An answer taken apart while it grows: what the model says, what it thinks, and which tools it calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import TextStateMachine

from omlx_core.engine.results import InvalidToolCall, ToolCall
from omlx_core.model.chat import RenderedChat
from omlx_core.model.tool_calls import ToolCallFormat, invalid_call, parse_calls

# States of mlx-lm's machine. It may have more, whose text is markup.
_TEXT = "normal"
_REASONING = "reasoning"
_CALL = "tool"
# A model may call a tool while it thinks, or think about how it would: its thoughts go on after that.
_CALL_IN_REASONING = "tool in reasoning"
_CALLS = (_CALL, _CALL_IN_REASONING)


@dataclass(slots=True)
class OutputDelta:
    """What an answer has more than before.

    Attributes:
        text: new text.
        reasoning: new text of the model's reasoning.
        tool_calls: calls that are complete now.
        invalid_tool_calls: likewise, what isn't one.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    invalid_tool_calls: list[InvalidToolCall] = field(default_factory=list)


class AnswerSplitter:
    """Splits one answer. However its text is cut into pieces, what comes out is the same in all.

    No part of a marker comes out, nor white space that belongs to the markup: line breaks around reasoning, what the
    template writes before a call, and white space between and after calls.

    Args:
        tokenizer: the model's mlx-lm `TokenizerWrapper`.
        chat: what is answered.
        reads_calls: look for tool calls. Otherwise what looks like one is text.
    """

    def __init__(self, tokenizer: Any, chat: RenderedChat, *, reads_calls: bool) -> None:
        self._call_format = chat.call_format if reads_calls else None
        self._tools = chat.tools
        state = tokenizer.response_initial_state or (_REASONING if chat.is_thinking_open else _TEXT)
        self._state: str = state
        self._machine = TextStateMachine(_transitions(tokenizer, self._call_format)).make_state(state)
        self._skips_line_breaks = state == _REASONING
        self._is_after_call = False
        self._held_space = ""
        self._call_body = ""

    @property
    def is_in_reasoning(self) -> bool:
        """Whether the answer is within the model's reasoning now."""
        return self._state in (_REASONING, _CALL_IN_REASONING)

    def add(self, text: str) -> OutputDelta:
        """Take a piece of the answer."""
        delta = OutputDelta()
        self._machine, segments = TextStateMachine.split(self._machine, text)
        for state, segment in segments:
            if state != self._state:
                self._enter(state, delta)
            self._take(segment, delta)
        return delta

    def finish(self, text: str, *, is_cut_off: bool) -> OutputDelta:
        """Take the last piece of the answer.

        Args:
            text: the piece.
            is_cut_off: the model didn't end the answer, so that a call without an end is not what it was to be.
        """
        delta = self.add(text)
        self._machine, held_back, _ = TextStateMachine.flush(self._machine)
        self._take(held_back, delta)
        if self._state in _CALLS:
            self._end_call(delta, is_cut_off=is_cut_off)
        return delta

    def _enter(self, state: str, delta: OutputDelta) -> None:
        if self._state in _CALLS:
            self._end_call(delta, is_cut_off=False)
        self._skips_line_breaks = _REASONING in (state, self._state)
        self._state = state

    def _take(self, segment: str, delta: OutputDelta) -> None:
        if self._state in _CALLS:
            self._call_body += segment
            return
        if self._skips_line_breaks:
            segment = segment.lstrip("\n")
            self._skips_line_breaks = not segment
        if self._state == _REASONING:
            delta.reasoning += segment
        elif self._state == _TEXT:
            self._held_space += segment
            if not self._is_after_call or self._held_space.strip():
                delta.text += self._held_space
                self._held_space = ""
                self._is_after_call = False

    def _end_call(self, delta: OutputDelta, *, is_cut_off: bool) -> None:
        body, self._call_body = self._call_body, ""
        self._is_after_call = True
        self._held_space = ""
        if is_cut_off or self._call_format is None:
            delta.invalid_tool_calls.append(invalid_call(body, "the answer was cut off before the call was complete"))
            return
        for call in parse_calls(body, self._call_format, self._tools):
            if isinstance(call, ToolCall):
                delta.tool_calls.append(call)
            else:
                delta.invalid_tool_calls.append(call)


def _transitions(tokenizer: Any, call_format: ToolCallFormat | None) -> dict[str, list[tuple[str, str]]]:
    """From a state, by a marker, to the next; as mlx-lm's server has them, but for what is said above."""
    transitions: dict[str, list[tuple[str, str]]] = {_TEXT: [], _REASONING: []}
    if tokenizer.has_thinking:
        transitions[_TEXT].append((tokenizer.think_start, _REASONING))
        transitions[_REASONING] += [(gap + tokenizer.think_end, _TEXT) for gap in ("\n", "")]
    transitions[_TEXT] += [(marker, _TEXT) for marker in tokenizer.structural_markers]
    # Some families say themselves from where calls may start.
    is_own = call_format is not None and call_format.start == tokenizer.tool_call_start
    says_itself = False
    for state, edges in tokenizer.response_transitions.items():
        says_itself = says_itself or any(target == _CALL for _, target in edges)
        transitions.setdefault(state, []).extend(
            (marker, _TEXT if target == _CALL and not is_own else target) for marker, target in edges
        )
    if call_format is not None:
        starts = {call_format.gap + call_format.start, call_format.start}
        if not (says_itself and is_own):
            transitions[_TEXT] += [(start, _CALL) for start in starts]
        transitions[_REASONING] += [(start, _CALL_IN_REASONING) for start in starts]
        ends = [call_format.end] if call_format.end else []
        transitions[_CALL] = [(end, _TEXT) for end in ends]
        transitions[_CALL_IN_REASONING] = [(end, _REASONING) for end in ends]
    return transitions
