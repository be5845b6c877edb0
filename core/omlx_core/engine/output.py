"""From generated tokens to an answer, with stop texts that are never emitted in part."""

from __future__ import annotations

from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import TextStateMachine

from omlx_core.engine.answer_splitter import AnswerSplitter, OutputDelta
from omlx_core.engine.params import GenerationParams
from omlx_core.engine.results import FinishReason, InvalidToolCall, TokenLogprob, ToolCall
from omlx_core.model.chat import RenderedChat


class OutputAssembler:
    """Collects one answer: its tokens, their log-probabilities, its text and what a chat's answer has beside it.

    Stop texts end an answer wherever the model writes them, be it in its reasoning or in a call.

    With ``tool_choice="none"`` the prompt is the same as without, so that its prefix is found in the cache, and calls
    are not looked for: what looks like one is text.

    Args:
        tokenizer: an mlx-lm `TokenizerWrapper`; None yields no text.
        params: the request's options.
        chat: what is answered; None if it isn't a chat, and the text is all that is generated.

    Attributes:
        reasoning_tokens: tokens of its reasoning, its markers included.
        has_met_stop_text: a stop text came, and no more tokens are to.
        finish_reason: why the answer ended; None before it has.
    """

    def __init__(self, tokenizer: Any, params: GenerationParams, chat: RenderedChat | None = None) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[TokenLogprob]] = []
        self.text = ""
        self.reasoning = ""
        self.reasoning_tokens = 0
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []
        self.has_met_stop_text = False
        self.finish_reason: FinishReason | None = None
        self._ends_with_first_call = not params.parallel_tool_calls
        self._detokenizer = tokenizer.detokenizer if tokenizer is not None else None
        # A state of None ends mlx-lm's machine; it holds back whatever may yet become a stop text.
        transitions = {"normal": [(stop, None) for stop in params.stop]}
        self._machine = TextStateMachine(transitions if params.stop else None).make_state()
        self._splitter = (
            None if chat is None else AnswerSplitter(tokenizer, chat, reads_calls=params.tool_choice != "none")
        )

    @property
    def is_whole(self) -> bool:
        """Whether no more tokens are to come: a stop text came, or the only call that there may be."""
        return self.has_met_stop_text or (self._ends_with_first_call and bool(self.tool_calls))

    def add(
        self,
        token_id: int,
        logprob: float | None,
        top_logprobs: list[TokenLogprob] | None = None,
        *,
        is_end_token: bool,
    ) -> OutputDelta:
        """Take one token and return what it completes, which may be nothing.

        Sets `has_met_stop_text` when the answer up to here contains a stop text; nothing after it is emitted.
        """
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if top_logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        if self._detokenizer is None or is_end_token:
            return OutputDelta()
        self._detokenizer.add_token(token_id)
        was_reasoning = self._is_in_reasoning
        delta = self._collect(self._split(self._before_stop(self._detokenizer.last_segment)))
        self.reasoning_tokens += was_reasoning or self._is_in_reasoning
        return delta

    def finish(self, finish_reason: FinishReason) -> OutputDelta:
        """Take the end, once no more tokens come, and return what was held back. Sets `finish_reason`.

        Args:
            finish_reason: why the tokens ended, ``"stop"`` or ``"length"``.
        """
        text = ""
        if self._detokenizer is not None and not self.has_met_stop_text:
            self._detokenizer.finalize()
            text = self._before_stop(self._detokenizer.last_segment)
            if not self.has_met_stop_text:
                self._machine, held_back, _ = TextStateMachine.flush(self._machine)
                text += held_back
        is_complete = finish_reason == "stop" and not self.has_met_stop_text
        splitter = self._splitter
        delta = OutputDelta(text) if splitter is None else splitter.finish(text, is_cut_off=not is_complete)
        self._collect(delta)
        if self.has_met_stop_text:
            finish_reason = "stop"
        self.finish_reason = "tool_calls" if is_complete and self.tool_calls else finish_reason
        return delta

    @property
    def _is_in_reasoning(self) -> bool:
        return self._splitter is not None and self._splitter.is_in_reasoning

    def _before_stop(self, segment: str) -> str:
        """As much of a piece of the answer as is known to be before a stop text."""
        self._machine, text, state = TextStateMachine.step(self._machine, segment)
        self.has_met_stop_text = state is None
        return str(text)

    def _split(self, text: str) -> OutputDelta:
        return OutputDelta(text) if self._splitter is None else self._splitter.add(text)

    def _collect(self, delta: OutputDelta) -> OutputDelta:
        if self._ends_with_first_call:  # one piece of text may hold the beginning of the next
            del delta.tool_calls[0 if self.tool_calls else 1 :]
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.tool_calls += delta.tool_calls
        self.invalid_tool_calls += delta.invalid_tool_calls
        return delta
