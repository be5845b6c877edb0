"""Keeps the rows of sliding windows until their block is full, since the window itself soon drops them."""

from __future__ import annotations

from omlx_core.mlx_backend import mx

from omlx_core.cache.payload import BlockPayload
from omlx_core.state.prompt_state import PromptCache, PromptStateCodec


class WindowRecorder:
    """Records one sequence as it grows.

    Args:
        codec: knows the windowed leaves.
        block_size: tokens per block.
        num_tokens: where recording starts: a block boundary.
    """

    def __init__(self, codec: PromptStateCodec, block_size: int, num_tokens: int) -> None:
        self._codec = codec
        self._block_size = block_size
        self.num_tokens = num_tokens
        self._pieces: dict[int, list[dict[str, mx.array]]] = {}
        self._is_broken = False

    def fork(self) -> WindowRecorder:
        """A recorder that goes on from here by itself."""
        forked = WindowRecorder(self._codec, self._block_size, self.num_tokens)
        forked._pieces = {position: list(pieces) for position, pieces in self._pieces.items()}
        forked._is_broken = self._is_broken
        return forked

    def record(self, prompt_cache: PromptCache, num_tokens: int) -> None:
        """Keep the rows from where the last call ended up to `num_tokens`, which `prompt_cache` must hold.

        A row that the window has dropped already ends the recording: what follows is not cached.
        """
        while self.num_tokens < num_tokens and not self._is_broken:
            position = self.num_tokens // self._block_size
            stop = min(num_tokens, (position + 1) * self._block_size)
            rows = self._codec.window_rows(prompt_cache, self.num_tokens, stop)
            if rows is None:
                self._is_broken = True
                return
            mx.async_eval(rows)  # copied before the window moves on, while others compute
            self._pieces.setdefault(position, []).append(rows)
            self.num_tokens = stop

    def take(self, position: int) -> BlockPayload | None:
        """The rows of a full block; None if they were not recorded, or were taken before."""
        pieces = self._pieces.pop(position, None)
        if pieces is None or self.num_tokens < (position + 1) * self._block_size:
            return None
        names = pieces[0]
        rows = (
            names
            if len(pieces) == 1
            else {name: mx.concatenate([piece[name] for piece in pieces], axis=2) for name in names}
        )
        return self._codec.to_payload(rows)
