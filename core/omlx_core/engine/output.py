"""From generated tokens to text, with stop texts that are never emitted in part."""

from __future__ import annotations

from typing import Any

import omlx_core.mlx_backend  # noqa: F401 - before mlx_lm

from mlx_lm.generate import TextStateMachine

from omlx_core.engine.params import GenerationParams


class OutputAssembler:
    """Collects one answer: its tokens, their log-probabilities and its text.

    Args:
        tokenizer: an mlx-lm `TokenizerWrapper`; None yields no text.
        params: the request's options.
    """

    def __init__(self, tokenizer: Any, params: GenerationParams) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.has_met_stop_text = False
        self._detokenizer = tokenizer.detokenizer if tokenizer is not None else None
        # A state of None ends mlx-lm's machine; it holds back whatever may yet become a stop text.
        transitions = {"normal": [(stop, None) for stop in params.stop]}
        self._machine = TextStateMachine(transitions if params.stop else None).make_state()

    def add(self, token_id: int, logprob: float | None, *, is_end_token: bool) -> str:
        """Take one token and return the text that it completes, which may be empty.

        Sets `has_met_stop_text` when the text up to here contains a stop text; nothing after it is emitted.
        """
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self._detokenizer is None or is_end_token:
            return ""
        self._detokenizer.add_token(token_id)
        return self._emit(self._detokenizer.last_segment)

    def finish(self) -> str:
        """Return the text that was held back, once no more tokens come."""
        if self._detokenizer is None or self.has_met_stop_text:
            return ""
        self._detokenizer.finalize()
        text = self._emit(self._detokenizer.last_segment)
        if not self.has_met_stop_text:
            self._machine, held_back, _ = TextStateMachine.flush(self._machine)
            self.text += held_back
            return text + str(held_back)
        return text

    def _emit(self, segment: str) -> str:
        self._machine, text, state = TextStateMachine.step(self._machine, segment)
        self.has_met_stop_text = state is None
        self.text += text
        return str(text)
