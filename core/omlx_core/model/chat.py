"""Chats into text: the model's template, or a generic way to show tools where the template knows none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omlx_core.engine.params import ToolFormat
from omlx_core.errors import InvalidPromptError, InvalidToolError
from omlx_core.model.chat_messages import check_messages, check_tools, with_user_turn
from omlx_core.model.tool_calls import (
    GENERIC_FORMAT,
    Tool,
    ToolCallFormat,
    describe_tools,
    template_format,
    write_calls,
    write_result,
)

logger = logging.getLogger(__name__)

# Unlike anything that a template or a user writes, and nothing that a template would trim.
_END_OF_CONTINUED = "OMLX-CONTINUES-HERE"
_PROBE_TEXT = "omlx probe text"
_PROBE_NAME = "omlx_probe_tool"
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": _PROBE_NAME,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "Probe."}}},
    },
}
# Nine characters: Mistral's templates take no other ids.
_PROBE_CALL = {"type": "function", "id": "probe0001", "function": {"name": _PROBE_NAME, "arguments": {"x": "y"}}}


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as text, and what is to be known for reading the answer.

    Attributes:
        text: what the model gets, special tokens written out.
        tool_format: how tools, calls and results are written; None if there are none.
        tools: the tools that the answer may call, in OpenAI's form.
        call_format: how such a call is written; None without tools.
        is_thinking_open: the text ends within the model's thinking, so that the answer goes on with it.
    """

    text: str
    tool_format: ToolFormat | None = None
    tools: Sequence[Tool] = ()
    call_format: ToolCallFormat | None = None
    is_thinking_open: bool = False


class ChatRenderer:
    """Renders chats for one model. Thread-safe.

    Args:
        tokenizer: the model's mlx-lm `TokenizerWrapper`, with a chat template.
        name: the model's name, for the log.
    """

    def __init__(self, tokenizer: Any, name: str = "the model") -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._lock = threading.Lock()
        self._has_said_generic = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_format: ToolFormat | None = None,
        template_args: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> RenderedChat:
        """Render a chat, by default up to where the answer begins.

        Args:
            messages: OpenAI's form; see `check_messages`.
            tools: OpenAI's form, or the function in it alone.
            tool_format: ``"template"`` or ``"generic"``; None takes the template's if it shows tools to the model and
                mlx-lm reads its calls, and otherwise the generic one.
            template_args: further arguments of the template.
            continue_final_message: end within the last message, an assistant's, instead of after it.
            add_generation_prompt: end with the cue for an answer, where no message is continued.

        Raises:
            InvalidPromptError: messages that are malformed, or that the template refuses.
            InvalidToolError: tools that are malformed, or ``tool_format="template"`` where the template has none.
        """
        if not messages:
            raise InvalidPromptError(f"prompt={messages!r} is empty: give one or more messages")
        checked = check_messages(messages, self._is_known_role)
        checked_tools = check_tools(tools)
        chosen = self._choose_format(checked, checked_tools, tool_format)
        continued = _continued_text(checked) if continue_final_message else None
        if chosen == "generic":
            checked = self._in_generic_format(checked, checked_tools)
        elif self._template_calls is not None and self._template_calls.id_length is not None:
            checked = [_with_short_ids(message, self._template_calls.id_length) for message in checked]
        if continued is not None:
            checked[-1]["content"] += _END_OF_CONTINUED
        text = self._apply(
            checked,
            checked_tools if chosen == "template" else [],
            template_args,
            add_generation_prompt=add_generation_prompt and continued is None,
        )
        if continued is not None:
            text, mark, _ = text.rpartition(_END_OF_CONTINUED)
            if not mark:
                raise InvalidPromptError(
                    "continue_final_message=True, but the model's chat template leaves the last message out: give it "
                    "text, or ask for an answer to it"
                )
        return RenderedChat(
            text,
            tool_format=chosen,
            tools=checked_tools,
            call_format=self._call_format(chosen) if checked_tools else None,
            is_thinking_open=self._is_thinking_open(text, continued),
        )

    def render_opening(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """What chats that open with some messages begin with, and then more.

        Args:
            messages: what they open with.
            **options: as `render`.

        Raises:
            InvalidPromptError, InvalidToolError: as `render`.
        """
        options = {**options, "continue_final_message": False, "add_generation_prompt": False}
        return self.render(with_user_turn(messages), **options).text

    def _apply(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(template_args or {}),
            )
        except Exception as exc:  # a template is the model's own program
            raise InvalidPromptError(
                f"the model's chat template refuses the messages or template_args={dict(template_args or {})!r}: "
                f"{type(exc).__name__}: {exc}"
            ) from exc
        return text

    # Tools.

    def _choose_format(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], asked: ToolFormat | None
    ) -> ToolFormat | None:
        if not tools and not any("tool_calls" in message or message["role"] == "tool" for message in messages):
            return None
        if asked == "template" and tools and self._template_calls is None:
            reason = (
                "mlx-lm has no parser for the calls that this model's chat template asks for"
                if self._knows_tools
                else "this model's chat template knows no tools"
            )
            raise InvalidToolError(f"tool_format='template', but {reason}: use 'generic', or leave it out")
        if asked is not None:
            return asked
        if self._template_calls is not None:
            return "template"
        self._say_generic()
        return "generic"

    def _say_generic(self) -> None:
        with self._lock:
            is_first, self._has_said_generic = not self._has_said_generic, True
        if is_first:
            logger.warning(
                "the chat template of %s knows no tools that mlx-lm can read calls of: they are shown to it and read "
                "in a generic format, which it may not have been trained on",
                self._name,
            )

    def _call_format(self, chosen: ToolFormat | None) -> ToolCallFormat | None:
        return GENERIC_FORMAT if chosen == "generic" else self._template_calls

    def _in_generic_format(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """Calls as text, results as users' turns, and the tools in the system turn."""
        converted: list[dict[str, Any]] = []
        is_after_result = False
        for message in messages:
            is_result = message["role"] == "tool"
            if is_result and is_after_result:
                converted[-1]["content"] += "\n" + write_result(message["content"])
            elif is_result:
                converted.append({"role": "user", "content": write_result(message["content"])})
            else:
                calls = write_calls([call["function"] for call in message.pop("tool_calls", ())])
                converted.append({**message, "content": message["content"] + calls})
            is_after_result = is_result
        if not tools:
            return converted
        description = describe_tools(tools)
        first = converted[0]
        if first["role"] == "system" or not self._accepts_system:
            texts = [first["content"], description]
            # Without a system turn, they come before what the user says.
            first["content"] = "\n\n".join(filter(None, texts if first["role"] == "system" else reversed(texts)))
        else:
            converted.insert(0, {"role": "system", "content": description})
        return converted

    @cached_property
    def _template_calls(self) -> ToolCallFormat | None:
        """How the template's calls are written; None if it has none, or none that can be read."""
        return template_format(self._tokenizer, self._gap_before_calls()) if self._knows_tools else None

    @cached_property
    def _knows_tools(self) -> bool:
        user = {"role": "user", "content": _PROBE_TEXT}
        return any(
            _PROBE_NAME in self._probe(messages, [_PROBE_TOOL])
            for messages in ([user], [{"role": "system", "content": _PROBE_TEXT}, user])
        )

    @cached_property
    def _accepts_system(self) -> bool:
        messages = [{"role": role, "content": _PROBE_TEXT} for role in ("system", "user")]
        return self._probe(messages, []).count(_PROBE_TEXT) == len(messages)

    def _gap_before_calls(self) -> str:
        """The white space that the template writes between an answer's text and its calls."""
        if not self._tokenizer.has_tool_calling:
            return ""
        answer = {"role": "assistant", "content": _PROBE_TEXT, "tool_calls": [_PROBE_CALL]}
        text = self._probe([{"role": "user", "content": "?"}, answer], [_PROBE_TOOL])
        gap, start, _ = text.rpartition(_PROBE_TEXT)[2].partition(self._tokenizer.tool_call_start)
        return gap if start and gap.isspace() else ""

    def _probe(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> str:
        """A rendered chat; empty if the template refuses it."""
        try:
            return self._apply(messages, tools, None, add_generation_prompt=False)
        except InvalidPromptError:
            return ""

    # What else is to be known of a template.

    def _is_known_role(self, role: str) -> bool:
        """Whether the template's source has a role of its own by that name; where there is no source, it may."""
        source = self._tokenizer.chat_template
        if isinstance(source, Mapping):
            source = "".join(source.values())
        return not source or f"'{role}'" in source or f'"{role}"' in source

    def _is_thinking_open(self, text: str, continued: str | None) -> bool:
        if not self._tokenizer.has_thinking:
            return False
        _, start, inside = text.rpartition(self._tokenizer.think_start)
        if not start or self._tokenizer.think_end in inside:
            return False
        # A marker that a user wrote somewhere opens nothing.
        return not inside.strip() or (continued is not None and start in continued)


def _continued_text(messages: Sequence[Mapping[str, Any]]) -> str:
    last = messages[-1]
    where = f"continue_final_message=True, but the last message, prompt[{len(messages) - 1}]"
    if last["role"] != "assistant":
        raise InvalidPromptError(f"{where}, has the role {last['role']!r}: end with an assistant's message")
    if "tool_calls" in last:
        raise InvalidPromptError(f"{where}, calls tools: end with one that has text only")
    content: str = last["content"]
    return content


def _with_short_ids(message: dict[str, Any], length: int) -> dict[str, Any]:
    """The message with no more than the end of each id."""
    shortened = dict(message)
    if "tool_call_id" in message:
        shortened["tool_call_id"] = message["tool_call_id"][-length:]
    if "tool_calls" in message:
        shortened["tool_calls"] = [
            {**call, "id": call["id"][-length:]} if "id" in call else call for call in message["tool_calls"]
        ]
    return shortened
