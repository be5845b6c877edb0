"""A progress bar of a prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class PrefillBar:
    """Draws on stderr how much of a prompt is computed; an `on_prefill` callback.

    Args:
        then: called with the same, if the caller wants to know too.
    """

    def __init__(self, then: Callable[[int, int], None] | None = None) -> None:
        self._then = then
        self._bar: Any = None

    def __call__(self, num_computed: int, num_tokens: int) -> None:
        """Move on; the bar ends with the prompt."""
        if self._bar is None:
            self._bar = tqdm(desc="Reading the prompt", total=num_tokens, unit=" tokens")
        self._bar.update(num_computed - self._bar.n)
        if num_computed >= num_tokens:
            self._bar.close()
        if self._then is not None:
            self._then(num_computed, num_tokens)
