"""The state of a whole model after a prompt, cut into the parts of blocks and put together again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from omlx_core.mlx_backend import has_device_memory, mx

from omlx_core.cache.parts import CHECKPOINT, WINDOW, Part, PartKey, PrefixContent
from omlx_core.cache.payload import BlockBuffers, BlockLayout, BlockPayload, LoadedBlock, Place
from omlx_core.errors import CacheInvariantError
from omlx_core.state.arrays import to_payloads, with_arrays
from omlx_core.state.handlers import find_handler, leaves_of, rebuild
from omlx_core.state.packed_blocks import PackedBlocks, PackedCopies, PackedTensor, join_packed
from omlx_core.state.protocols import AdoptingHandler, Arrays, CheckpointHandler, Handler, RowHandler
from omlx_core.state.registry import class_name
from omlx_core.state.row_arrays import RowArrays
from omlx_core.state.row_copies import RowCopies

PromptCache = list[Any]
"""One mlx-lm cache object per layer, as its `make_prompt_cache` gives it."""


class UnsupportedLayerError(Exception):
    """A layer's cache class has no handler: the model runs uncached. Never leaves the engine."""


class PromptStateCodec:
    """Turns what a prompt cache holds into block payloads, and block payloads into a prompt cache.

    Args:
        template: a prompt cache of the model, fresh or used; only its classes and settings matter.
        block_size: tokens per block.
        find: gives a layer's handler, or None.
        is_latent: the model has latent attention, whose cache class doesn't tell.
        are_written: blocks go to the SSD tier too.

    Raises:
        UnsupportedLayerError: naming the classes that can't be cached.
    """

    def __init__(
        self,
        template: PromptCache,
        block_size: int,
        *,
        find: Callable[[Any], Handler | None] = find_handler,
        is_latent: bool = False,
        are_written: bool = False,
    ) -> None:
        self._template = template
        self._block_size = block_size
        self._is_latent = is_latent
        self._on_device = has_device_memory()
        self._are_written = are_written
        self._rows: dict[str, RowHandler] = {}
        self._windows: dict[str, RowHandler] = {}
        self._checkpoints: dict[str, CheckpointHandler] = {}
        self._leaves = leaves_of(template)
        self.layout: list[str] = []
        unknown = set()
        for path, leaf in self._leaves.items():
            handler = find(leaf)
            if handler is None:
                unknown.add(class_name(type(leaf)))
                continue
            self.layout.append(f"{path}: {handler.describe(leaf)}")
            if isinstance(handler, CheckpointHandler):
                self._checkpoints[path] = handler
            elif handler.window(leaf) is None:
                self._rows[path] = handler
            else:
                self._windows[path] = handler
        # All of them or none: a block has one layout for the rows of all layers.
        adopting = {path: handler for path, handler in self._rows.items() if isinstance(handler, AdoptingHandler)}
        self._adopting = adopting if len(adopting) == len(self._rows) else {}
        if unknown or not self._leaves:
            raise UnsupportedLayerError(", ".join(sorted(unknown)) or "no layers")

    @property
    def has_windows(self) -> bool:
        """Whether some leaves drop rows as they grow, so that these must be recorded in time."""
        return bool(self._windows)

    @property
    def has_checkpoints(self) -> bool:
        """Whether some leaves can only be restored where their state was captured."""
        return bool(self._checkpoints)

    @property
    def rounds_single_tokens_otherwise(self) -> bool:
        """Whether a step of one token rounds otherwise than one of several: windows and latent attention have a
        path of their own for it, and scans another length."""
        return self._is_latent or self.has_windows or self.has_checkpoints

    @property
    def max_exact_answer_tokens(self) -> int | None:
        """How long a sequence may grow token by token and be in the state, bit for bit, of one that was read; None
        is no limit.

        The order of a full window's ring is not that of its tokens, and sums depend on it. Latent attention computes
        a single token another way from the first.
        """
        if self._is_latent:
            return 0
        return self.smallest_window if self._windows else None

    @property
    def smallest_window(self) -> int:
        """Tokens after which a single-token step drops the first row not yet recorded."""
        return min(handler.window(self._leaves[path]) or 1 for path, handler in self._windows.items())

    def needs(self, num_blocks: int) -> Iterable[PartKey]:
        """The parts, besides the rows of all blocks, that a restore of that many blocks needs."""
        num_tokens = num_blocks * self._block_size
        positions = {
            position
            for path, handler in self._windows.items()
            for start, stop in handler.needed(self._leaves[path], num_tokens)
            for position in range(start // self._block_size, -(-stop // self._block_size))
        }
        keys = [PartKey(position, WINDOW) for position in sorted(positions, reverse=True)]
        return [PartKey(num_blocks - 1, CHECKPOINT), *keys] if self._checkpoints else keys

    def rows_of(self, prompt_cache: PromptCache, num_tokens: int) -> RowSource:
        """What copies the rows of the full-attention leaves, block by block; to be let go of before the next step.

        Args:
            prompt_cache: the leaves.
            num_tokens: up to where blocks will be copied.

        Raises:
            CacheInvariantError: a leaf has not seen all these tokens.
        """
        leaves = leaves_of(prompt_cache)
        _check_length(self._rows, leaves, at_least=num_tokens)
        if not self._adopting:
            return _LazyRows(self, self._rows, leaves)
        held = {path: handler for path, handler in self._adopting.items() if not leaves[path].empty()}
        arrays = {
            f"{path}.{name}": array
            for path, handler in held.items()
            for name, array in handler.arrays(leaves[path]).items()
        }
        if self._on_device:
            return PackedCopies(arrays, num_tokens, are_written=self._are_written)
        return RowCopies(arrays)

    def capture_checkpoint(self, prompt_cache: PromptCache) -> BlockPayload:
        """Keep the state of the recurrent leaves, as it is now."""
        leaves = leaves_of(prompt_cache)
        arrays = {
            f"{path}.{name}": array
            for path, handler in self._checkpoints.items()
            for name, array in handler.checkpoint(leaves[path]).items()
        }
        return self.to_payload(arrays)

    def to_payload(self, arrays: Arrays) -> BlockPayload:
        """A block's part of lazy arrays that own their buffers."""
        [payload] = to_payloads([arrays], on_device=self._on_device, are_written=self._are_written)
        return payload

    def allocate(self, unread: Mapping[Place, BlockLayout], *, capacity: int) -> BlockBuffers | None:
        """Memory for blocks to be read to; None if that doesn't suit the model or its blocks.

        Args:
            unread: what the tensors of each block are that is to be read.
            capacity: tokens to have room for.
        """
        if self._on_device:
            fitting = {place: layout for place, layout in unread.items() if PackedBlocks.fits(layout)}
            return PackedBlocks(fitting) if fitting else None
        rows = next((layout for place, layout in unread.items() if isinstance(place, int)), {})
        return self._row_arrays(rows, capacity)

    def _row_arrays(self, layout: BlockLayout, capacity: int) -> RowArrays | None:
        if not self._adopting or not layout or not RowArrays.fits(layout, self._block_size):
            return None
        return RowArrays(layout, self._block_size, self._room(capacity))

    def _room(self, capacity: int) -> int:
        return max(each.capacity(capacity) for each in self._adopting.values())

    def restore(self, content: PrefixContent, *, num_tokens: int, capacity: int) -> tuple[PromptCache, PrefixContent]:
        """Build a prompt cache, whose arrays may be under way; what runs on it never changes the blocks.

        Args:
            content: the rows of all blocks and the parts that `needs` names.
            num_tokens: tokens that the blocks hold together.
            capacity: tokens to have room for without reallocation; what rows were read to has the room that it has.

        Returns:
            The prompt cache, and the content to be kept in RAM.

        Raises:
            CacheInvariantError: some leaf would not hold `num_tokens` tokens.
        """
        if len(content.rows) * self._block_size != num_tokens:
            raise CacheInvariantError(
                f"{len(content.rows)} blocks of {self._block_size} tokens, where their table has {num_tokens} tokens"
            )
        payloads = [_payload(key, part, content.buffers) for key, part in content.parts.items()]
        parts = dict(zip(content.parts, with_arrays(payloads, on_device=self._on_device), strict=True))
        blocks: dict[Part, dict[int, BlockPayload]] = {WINDOW: {}, CHECKPOINT: {}}
        for key, payload in parts.items():
            blocks[key.part][key.position] = payload
        leaves, rows = self._restore_rows(content, num_tokens, capacity)
        leaves.update(self._join(self._windows, blocks[WINDOW], num_tokens, capacity))
        _check_length({**self._rows, **self._windows}, leaves, exactly=num_tokens)
        if self._checkpoints:
            states = _split(blocks[CHECKPOINT][num_tokens // self._block_size - 1])
            for path, recurrent in self._checkpoints.items():
                leaves[path] = recurrent.restore(self._leaves[path], states.get(path, {}))
        prompt_cache = rebuild(self._template, leaves)
        mx.async_eval([leaf.state for leaf in leaves.values()])
        return prompt_cache, PrefixContent(rows, parts, content.buffers)

    def _restore_rows(
        self, content: PrefixContent, num_tokens: int, capacity: int
    ) -> tuple[dict[str, Any], Sequence[LoadedBlock]]:
        """The full-attention leaves, and the rows to be kept in RAM."""
        capacity = max(capacity, num_tokens + 1)
        arrays = content.buffers if content.in_place else None
        if arrays is None and content.rows and not self._on_device:
            arrays = self._row_arrays(_payload(0, content.rows[0]).layout, capacity)
        if isinstance(arrays, RowArrays):
            payloads = {position: rows for position, rows in enumerate(content.rows) if isinstance(rows, BlockPayload)}
            arrays.fill(payloads, num_tokens)
            return self._adopt(arrays.take(), num_tokens), content.rows
        blocks = [_payload(position, rows, arrays) for position, rows in enumerate(content.rows)]
        joined = join_packed(blocks, self._room(capacity)) if self._adopting and blocks else None
        if joined is not None:
            return self._adopt(joined, num_tokens), blocks
        blocks = with_arrays(blocks, on_device=self._on_device)
        return self._join(self._rows, dict(enumerate(blocks)), num_tokens, capacity), blocks

    def _adopt(self, arrays: Arrays, num_tokens: int) -> dict[str, Any]:
        """Leaves of arrays that are theirs from now on."""
        by_path = _by_path(arrays)
        return {
            # A layer that never fills its cache (nemotron-nas has such) left nothing, and gets nothing.
            path: handler.adopt(leaf, by_path[path], num_tokens) if path in by_path else copy.copy(leaf)
            for path, handler in self._adopting.items()
            for leaf in (self._leaves[path],)
        }

    def _join(
        self, handlers: Mapping[str, RowHandler], blocks: Mapping[int, BlockPayload], num_tokens: int, capacity: int
    ) -> dict[str, Any]:
        split = {position: _split(payload) for position, payload in blocks.items()}
        leaves = {}
        for path, handler in handlers.items():
            if not any(path in block for block in split.values()):
                leaves[path] = copy.copy(self._leaves[path])
                continue
            fetch = _Fetch(path, split, self._block_size)
            leaves[path] = handler.restore(self._leaves[path], fetch, num_tokens, capacity)
        return leaves

    def window_rows(self, prompt_cache: PromptCache, start: int, stop: int) -> dict[str, mx.array] | None:
        """Lazy copies of the windowed leaves' rows of tokens ``[start, stop)``; None if some are gone."""
        return self.lazy_rows(self._windows, leaves_of(prompt_cache), start, stop)

    @staticmethod
    def lazy_rows(
        handlers: Mapping[str, RowHandler], leaves: Mapping[str, Any], start: int, stop: int
    ) -> dict[str, mx.array] | None:
        """The rows of some leaves, named ``<path>.<member>``; None if some are gone."""
        arrays = {}
        for path, handler in handlers.items():
            rows = {} if leaves[path].empty() else handler.rows(leaves[path], start, stop)
            if rows is None:
                return None
            arrays.update({f"{path}.{name}": array for name, array in rows.items()})
        return arrays


class RowSource(Protocol):
    """Copies rows block by block."""

    def copy(self, start: int, stop: int) -> BlockPayload:
        """The rows of tokens ``[start, stop)``; empty if no leaf has any."""
        ...


class _LazyRows:
    """Rows of any handlers, copied as each of them does it."""

    def __init__(self, codec: PromptStateCodec, handlers: Mapping[str, RowHandler], leaves: Mapping[str, Any]) -> None:
        self._codec = codec
        self._handlers = handlers
        self._leaves = leaves

    def copy(self, start: int, stop: int) -> BlockPayload:
        return self._codec.to_payload(self._codec.lazy_rows(self._handlers, self._leaves, start, stop) or {})


class _Fetch:
    """Finds the rows of one leaf in the blocks that hold them."""

    def __init__(self, path: str, blocks: Mapping[int, Mapping[str, Arrays]], block_size: int) -> None:
        self._path = path
        self._blocks = blocks
        self._block_size = block_size

    def __call__(self, start: int, stop: int) -> list[Arrays]:
        size = self._block_size
        pieces = []
        for position in range(start // size, -(-stop // size)):
            if position not in self._blocks:
                raise CacheInvariantError(f"layer {self._path} lacks block {position} of tokens {start} to {stop}")
            arrays = self._blocks[position][self._path]
            low, high = max(start - position * size, 0), min(stop - position * size, size)
            if (low, high) != (0, size):
                arrays = {name: array[..., low:high, :] for name, array in arrays.items()}
            pieces.append(arrays)
        return pieces


def _split(payload: BlockPayload) -> dict[str, Arrays]:
    arrays = {name: tensor.array for name, tensor in payload.tensors.items()}
    return _by_path({name: each.get() if isinstance(each, PackedTensor) else each for name, each in arrays.items()})


def _by_path(arrays: Arrays) -> dict[str, Arrays]:
    leaves: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        path, _, member = name.rpartition(".")
        leaves.setdefault(path, {})[member] = array
    return dict(leaves)


def _payload(place: Place, content: LoadedBlock, buffers: BlockBuffers | None = None) -> BlockPayload:
    """A block by itself."""
    if isinstance(content, BlockPayload):
        return content
    if isinstance(buffers, PackedBlocks):
        return buffers.take(place)
    raise CacheInvariantError(f"the content of block {place} is in memory that nothing is known of")


def _check_length(
    handlers: Mapping[str, RowHandler], leaves: Mapping[str, Any], *, at_least: int = 0, exactly: int | None = None
) -> None:
    for path, handler in handlers.items():
        if leaves[path].empty():
            continue
        held = handler.num_tokens(leaves[path])
        if held < at_least or (exactly is not None and held != exactly):
            wanted = at_least if exactly is None else exactly
            raise CacheInvariantError(f"layer {path} holds {held} tokens where its blocks say {wanted}")
