"""What a request would find in the cache, asked ahead of it: how much of a prompt, and in which order of its documents.

Retrieval puts documents into a prompt in an order of its own each time, and a prefix can only be reused up to the first
difference. Of the orders that the cache has, the one that reaches furthest is found by walking the tree of its blocks,
as RAGCache's knowledge tree (Jin et al. 2024, arXiv:2404.12457) and ContextPilot's context index (Jiang et al. 2025,
arXiv:2511.03475) do. Nothing is held, and MLX isn't used: any thread may ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.prefix_lookup import FoundPrefix, PrefixLookup
from omlx_core.model.text_places import REPLACEMENT, Decode, TokenPlaces, locate
from omlx_core.state.prompt_state import PromptStateCodec

_MAX_CHILDREN = 128  # of the blocks that follow one, how many are looked into
_MAX_TEXTS = 4096  # blocks whose text is remembered
_MAX_READINGS = 16  # documents that begin alike, so that a block may be of any of them
_CONTEXT_TOKENS = 8  # a decoder trims what a text begins with, so a block is decoded with the tokens before it


def last_boundary(num_prompt_tokens: int, block_size: int, codec: PromptStateCodec) -> int:
    """The last block boundary of a prompt that leaves a token to the batch, and not one more to prefill if that would
    round otherwise than it did in the cold run: the answer would not be the same to the last bit."""
    end = num_prompt_tokens - 1
    boundary = end // block_size * block_size
    if end - boundary == 1 and codec.rounds_single_tokens_otherwise:
        return max(boundary - block_size, 0)
    return boundary


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way in which a chain of blocks reads as documents in some order.

    Attributes:
        order: the documents that have begun.
        rest: what is still to come of the last of them, or of the head.
    """

    order: tuple[int, ...]
    rest: str


@dataclass(frozen=True, slots=True)
class _Node:
    """A block of the tree that some order of the documents would have."""

    block_hash: BlockHash | None
    num_blocks: int
    context_ids: list[int]
    readings: tuple[_Reading, ...]
    parent: _Node | None = None


class _Pieces:
    """What a prompt's text goes on with: documents, and what stands before each.

    Args:
        documents: their texts.
        joins: what stands before the first, the second …; None is any white space.
    """

    def __init__(self, documents: Sequence[str], joins: Sequence[str] | None) -> None:
        self._documents = documents
        self._joins = joins

    def read(self, reading: _Reading, text: str) -> list[_Reading]:
        """How a reading goes on with a text: with one of the documents that are left, and as many more as it takes.

        Documents that begin alike leave several ways open. Only so many are followed: the rest is a miss.
        """
        finished: list[_Reading] = []
        pending = [(reading.order, reading.rest, text)]
        for _ in range(_MAX_READINGS * (len(self._documents) + 1)):
            if not pending or len(finished) == _MAX_READINGS:
                break
            order, rest, to_read = pending.pop()
            if len(to_read) <= len(rest):
                if rest.startswith(to_read):
                    finished.append(_Reading(order, rest[len(to_read) :]))
                continue
            if not to_read.startswith(rest):
                continue
            to_read = to_read[len(rest) :]
            if self._joins is None:
                to_read = to_read.lstrip()
                if not to_read:
                    finished.append(_Reading(order, ""))
                    continue
            pending += [
                ((*order, index), piece, to_read)
                for index, piece in self._next(order)
                if piece.startswith(to_read) or to_read.startswith(piece)
            ]
        return finished

    def _next(self, order: tuple[int, ...]) -> list[tuple[int, str]]:
        """The documents that are left, with what stands before them; last the one that is to be tried first."""
        # Of equal documents the first that is left stands for all.
        left = [index for index in range(len(self._documents)) if index not in order]
        first_of = {self._documents[index]: index for index in reversed(left)}
        join = self._joins[len(order)] if self._joins is not None and left else ""
        return [(index, join + self._documents[index]) for index in sorted(first_of.values(), reverse=True)]


class PromptLookup:
    """Looks for prompts in the cache of one engine. Thread-safe.

    Args:
        lookup: looks at both tiers.
        codec: what a restore needs; None finds nothing, since the model runs uncached.
        decode: makes text of token ids, special tokens included.
    """

    def __init__(self, lookup: PrefixLookup, codec: PromptStateCodec | None, decode: Decode) -> None:
        self._lookup = lookup
        self._codec = codec
        self._decode = decode
        self._texts: dict[BlockHash, str | None] = {}

    def find(self, token_ids: Sequence[int], extra_keys: tuple[str, ...]) -> FoundPrefix:
        """How much a request with this prompt would reuse now."""
        if self._codec is None:
            return FoundPrefix(0, 0)
        end = last_boundary(len(token_ids), self._lookup.block_size, self._codec)
        return self._lookup.find(token_ids, extra_keys, self._codec.needs, max_tokens=end)

    def find_order(
        self,
        text: str,
        token_ids: Sequence[int],
        documents: Sequence[str],
        extra_keys: tuple[str, ...],
        *,
        any_space: bool = False,
    ) -> list[int]:
        """The documents of the longest cached chain that begins like a prompt and goes on with its documents.

        Each block behind the prompt's head is looked at once at the most, and of those that follow one block only the
        latest 128 of each tier, so the time grows with the number of blocks and not with that of the orders.

        Args:
            text: the prompt.
            token_ids: its tokens.
            documents: the texts of its documents, in the order in which they are in it. What stands between two of
                them may depend on their places, not on which they are.
            extra_keys: what the blocks must have been stored under.
            any_space: any white space may stand before a document, instead of what does in this prompt.

        Returns:
            Their indices, as the cache has them; those that it doesn't have in this chain are left out. Of chains of
            equal length, the one whose indices are lower.

        Raises:
            InvalidPromptError: a document isn't in the prompt.
        """
        places = locate(text, documents)
        full = self._decode(token_ids)
        # What the tokenizer puts before a text; one that changes the text itself can't be followed.
        offset = len(full) - len(text)
        if self._codec is None or not places or not full.endswith(text):
            return []
        ends = [start + len(document) for start, document in zip(places, documents, strict=True)]
        joins = ["", *(text[end:start] for end, start in zip(ends, places[1:], strict=False))]
        pieces = _Pieces(documents, None if any_space else joins)
        root = self._find_head(full, offset + places[0], token_ids, extra_keys)
        if root is None:
            return []
        best: tuple[int, tuple[int, ...]] = (0, ())
        nodes = [root]
        while nodes:
            node = nodes.pop()
            order = node.readings[0].order
            if order and (-node.num_blocks, order) < best and self._can_restore(node):
                best = (-node.num_blocks, order)
            nodes += self._followers(node, pieces, extra_keys)
        return list(best[1])

    def find_starts(self, text: str, token_ids: Sequence[int], documents: Sequence[str]) -> list[int]:
        """The index of the token that each of a prompt's documents begins in; arguments as for `find_order`.

        Raises:
            InvalidPromptError: a document isn't in the prompt, or its tokenizer changes the text.
        """
        places = TokenPlaces(self._decode, text, token_ids)
        return [places.token_at(place) for place in locate(text, documents)]

    def _find_head(
        self, full: str, head_chars: int, token_ids: Sequence[int], extra_keys: tuple[str, ...]
    ) -> _Node | None:
        """The last block that lies before the documents, or the tree's root; None if it isn't cached."""
        size = self._lookup.block_size
        hashes = self._lookup.chain(token_ids, extra_keys)
        node = _Node(None, 0, [], ())
        num_chars = 0
        for index, block_hash in enumerate(hashes):
            block_ids = list(token_ids[index * size : (index + 1) * size])
            text = self._text_of(block_hash, node.context_ids, block_ids)
            if text is None or num_chars + len(text) > head_chars:
                break
            if not self._lookup.has_block(block_hash):
                return None
            num_chars += len(text)
            node = _Node(block_hash, index + 1, block_ids[-_CONTEXT_TOKENS:], (), node)
        readings = (_Reading((), full[num_chars:head_chars]),)
        return _Node(node.block_hash, node.num_blocks, node.context_ids, readings, node.parent)

    def _followers(self, node: _Node, pieces: _Pieces, extra_keys: tuple[str, ...]) -> Iterator[_Node]:
        for child in self._lookup.children(node.block_hash, extra_keys, _MAX_CHILDREN):
            block_ids = child.token_ids.tolist()
            text = self._text_of(child.block_hash, node.context_ids, block_ids)
            if text is None:
                continue
            read = (after for reading in node.readings for after in pieces.read(reading, text))
            readings = tuple(dict.fromkeys(read))[:_MAX_READINGS]
            if readings:
                context_ids = block_ids[-_CONTEXT_TOKENS:]
                yield _Node(child.block_hash, node.num_blocks + 1, context_ids, readings, node)

    def _text_of(self, block_hash: BlockHash, context_ids: list[int], block_ids: list[int]) -> str | None:
        """What a block adds to the text before it; None if that can't be told."""
        if block_hash in self._texts:
            return self._texts[block_hash]
        before = self._decode(context_ids).rstrip(REPLACEMENT) if context_ids else ""
        whole = self._decode(context_ids + block_ids).rstrip(REPLACEMENT)
        text = whole[len(before) :] if whole.startswith(before) else None
        if len(self._texts) >= _MAX_TEXTS:
            self._texts = {}
        self._texts[block_hash] = text
        return text

    def _can_restore(self, node: _Node) -> bool:
        codec = self._codec
        if codec is None:
            return False
        if not (codec.has_windows or codec.has_checkpoints):
            return True
        hashes: list[BlockHash] = []
        above: _Node | None = node
        while above is not None:
            if above.block_hash is not None:
                hashes.append(above.block_hash)
            above = above.parent
        return self._lookup.can_restore(hashes[::-1], codec.needs)
