"""What a handler is: it cuts one layer's cache into what blocks hold, and puts it together again.

One handler serves every layer of its class, of every model in the process: it keeps nothing. It is called on the
engine's MLX thread, and takes the time of the requests there. Arrays that it returns may be lazy.

A handler outside this project is registered by `omlx_core.state.registry` or a plugin. Its cache class has, as
mlx-lm's own do, ``empty()``, and ``state``, a tree with all its arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from omlx_core.mlx_backend import mx

Arrays = Mapping[str, mx.array]

FetchRows = Callable[[int, int], list[Arrays]]
"""The captured rows of tokens ``[start, stop)``, as consecutive pieces."""


@runtime_checkable
class RowHandler(Protocol):
    """A family that keeps rows per token: attention of any kind.

    Rows are arrays of shape ``[1, heads, tokens, size]``, any number of them under names without dots. The rows of a
    token may depend on the tokens before it and on nothing after it.
    """

    def describe(self, leaf: Any) -> str:
        """What tells this leaf from others that would keep other rows; part of the namespace.

        Blocks on SSD outlive the handler: whatever changes the meaning of its rows must change this, too.
        """
        ...

    def num_tokens(self, leaf: Any) -> int:
        """Tokens that a leaf has seen."""
        ...

    def window(self, leaf: Any) -> int | None:
        """Tokens after which a row may be dropped; None if none ever is, and a restore needs them all."""
        ...

    def rows(self, leaf: Any, start: int, stop: int) -> dict[str, mx.array] | None:
        """Lazy copies of the rows of tokens ``[start, stop)``; None if some have left the window."""
        ...

    def needed(self, leaf: Any, num_tokens: int) -> list[tuple[int, int]]:
        """The tokens ``[start, stop)`` whose rows a restore at `num_tokens` needs, in order."""
        ...

    def restore(self, leaf: Any, fetch: FetchRows, num_tokens: int, capacity: int) -> Any:
        """A fresh leaf that has seen `num_tokens` tokens.

        Args:
            leaf: a leaf of the same layer, for its settings.
            fetch: gives the rows that `needed` names.
            num_tokens: tokens that it has seen.
            capacity: tokens to have room for without reallocation.
        """
        ...


@runtime_checkable
class AdoptingHandler(RowHandler, Protocol):
    """A `RowHandler` whose leaf holds the rows of all tokens and nothing else, one after the other.

    Blocks can then be copied straight from its arrays and to them. These are ``[1, heads, capacity, size]``.
    """

    def arrays(self, leaf: Any) -> Arrays:
        """The arrays of a leaf that isn't empty, as they are: not copied, and with room behind the rows."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """The rows to have memory for where there is to be room for `num_tokens`."""
        ...

    def adopt(self, leaf: Any, arrays: Arrays, num_tokens: int) -> Any:
        """A fresh leaf of arrays that hold the rows of `num_tokens` tokens, and zeros behind them.

        Args:
            leaf: a leaf of the same layer, for its settings.
            arrays: the arrays, which are the leaf's own from now on.
            num_tokens: tokens that it has seen.
        """
        ...


@runtime_checkable
class CheckpointHandler(Protocol):
    """A family that keeps one state, whatever its size, for all tokens so far: recurrent layers.

    It is kept at a few block boundaries only, and restored there; see ``docs/state.md``.
    """

    def describe(self, leaf: Any) -> str:
        """What tells this leaf from others that would keep another state; as in `RowHandler`."""
        ...

    def checkpoint(self, leaf: Any) -> dict[str, mx.array]:
        """Copies of the arrays that make up the state, of any type and shape, under names without dots."""
        ...

    def restore(self, leaf: Any, arrays: Arrays) -> Any:
        """A fresh leaf in the state that `checkpoint` returned.

        Args:
            leaf: a leaf of the same layer, for its settings.
            arrays: what `checkpoint` returned; nothing for a leaf that was empty.
        """
        ...


Handler = RowHandler | CheckpointHandler
