"""The text and the token ids of recent sequences, so that a conversation keeps the ids that it was generated with.

Tokenizing a conversation anew often gives other ids than the model generated: there are many ways to spell a text, and
a tokenizer knows but one. The keys and values in the cache belong to the ids that were generated, so a text that begins
like a sequence known here is given that sequence's ids.

Sequences are a tree of segments. Where one goes on from the end of another, the other's segments are kept once, and
where two go on differently from the same place, the tree branches. A segment that others go on from stays as long as
they do.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

MAX_TOKENS = 1_000_000
"""Some 10 to 30 MB of ids and text."""

MAX_SEGMENTS = 2048


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a sequence, up to where a later text may leave it.

    Attributes:
        text: what its tokens read, special tokens written out.
        token_ids: its tokens.
    """

    text: str
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where text and tokens of a sequence can be cut alike.

    Attributes:
        num_chars: characters before it.
        num_tokens: tokens before it.
    """

    num_chars: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class KnownBeginning:
    """What a text was found to begin with.

    Attributes:
        token_ids: its tokens up to the last cut.
        cuts: the ends of its segments, in their order; none if nothing is known.
    """

    token_ids: list[int]
    cuts: list[Cut]


class _Node:
    """A segment in the tree; the root of a tree has no text."""

    __slots__ = ("children", "parent", "scope", "text", "token_ids")

    def __init__(self, text: str, token_ids: array[int], parent: _Node | None, scope: Hashable) -> None:
        self.text = text
        self.token_ids = token_ids
        self.parent = parent
        self.scope = scope
        self.children: dict[_Node, None] = {}  # least recently used first


class TokenHistory:
    """Remembers sequences up to a limit; what was least recently added or found is forgotten first. Thread-safe.

    Args:
        max_tokens: most tokens to keep. A longer sequence is not remembered.
        max_segments: most segments to keep.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS, max_segments: int = MAX_SEGMENTS) -> None:
        self._max_tokens = max_tokens
        self._max_segments = max_segments
        self._lock = threading.Lock()
        self._roots: dict[Hashable, _Node] = {}
        # Least recently used first. A segment is always touched before the one it goes on from, so that nothing goes
        # on from the first one here.
        self._nodes: OrderedDict[_Node, None] = OrderedDict()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return self._num_tokens

    @property
    def num_segments(self) -> int:
        """Segments that are kept."""
        return len(self._nodes)

    def add(self, scope: Hashable, segments: Sequence[Segment]) -> None:
        """Remember a sequence.

        Args:
            scope: only searches in the same scope find it.
            segments: the whole sequence from its beginning. Those from the first one on that has no text are left out.
        """
        segments = list(itertools.takewhile(lambda segment: segment.text and segment.token_ids, segments))
        text = "".join(segment.text for segment in segments)
        token_ids = array("I", itertools.chain.from_iterable(segment.token_ids for segment in segments))
        if not segments or len(token_ids) > self._max_tokens:
            return
        with self._lock:
            node = self._roots.setdefault(scope, _Node("", array("I"), None, scope))
            at = Cut(0, 0)
            for cut in _cuts(segments):
                while (child := _same_child(node, text, token_ids, at, cut)) is not None:
                    node = child
                    at = Cut(at.num_chars + len(child.text), at.num_tokens + len(child.token_ids))
                if at != cut:
                    rest = token_ids[at.num_tokens : cut.num_tokens]
                    node = self._insert(node, text[at.num_chars : cut.num_chars], rest)
                    at = cut
            self._touch(node)
            while self._num_tokens > self._max_tokens or len(self._nodes) > self._max_segments:
                self._forget_oldest()

    def find(self, scope: Hashable, text: str) -> KnownBeginning:
        """The longest known sequence that a text begins with; of equally long ones the most recently used.

        Takes time in proportion to the text's length.
        """
        with self._lock:
            root = self._roots.get(scope)
            path = [] if root is None else _longest_path(root, text)
            if path:
                self._touch(path[-1])
        token_ids = array("I")
        for node in path:
            token_ids += node.token_ids
        return KnownBeginning(token_ids.tolist(), _cuts(path))

    def _insert(self, parent: _Node, text: str, token_ids: array[int]) -> _Node:
        node = _Node(text, token_ids, parent, parent.scope)
        parent.children[node] = None
        self._nodes[node] = None
        self._num_tokens += len(token_ids)
        return node

    def _touch(self, node: _Node) -> None:
        """Mark a segment, and those it goes on from, as the most recently used."""
        while node.parent is not None:
            self._nodes.move_to_end(node)
            siblings = node.parent.children
            siblings[node] = siblings.pop(node)
            node = node.parent

    def _forget_oldest(self) -> None:
        node, _ = self._nodes.popitem(last=False)
        self._num_tokens -= len(node.token_ids)
        parent = node.parent
        if parent is not None:
            del parent.children[node]
            if parent.parent is None and not parent.children:
                del self._roots[parent.scope]


def _cuts(segments: Sequence[Segment] | Sequence[_Node]) -> list[Cut]:
    """The ends of segments that follow one another."""
    chars = itertools.accumulate(len(segment.text) for segment in segments)
    tokens = itertools.accumulate(len(segment.token_ids) for segment in segments)
    return list(itertools.starmap(Cut, zip(chars, tokens, strict=True)))


def _same_child(node: _Node, text: str, token_ids: array[int], at: Cut, end: Cut) -> _Node | None:
    """The longest segment after `node` that a sequence has too, in text and tokens, between two of its places."""

    def is_same(child: _Node) -> bool:
        reached = Cut(at.num_chars + len(child.text), at.num_tokens + len(child.token_ids))
        is_within = reached.num_chars < end.num_chars and reached.num_tokens < end.num_tokens
        return (
            (is_within or reached == end)
            and text.startswith(child.text, at.num_chars)
            and token_ids[at.num_tokens : reached.num_tokens] == child.token_ids
        )

    return max(filter(is_same, node.children), key=lambda child: len(child.text), default=None)


def _longest_path(root: _Node, text: str) -> list[_Node]:
    """The segments below `root` that a text begins with, as many characters of them as there are."""
    last, longest = root, 0
    unexplored = [(root, 0)]
    while unexplored:
        node, num_chars = unexplored.pop()
        if num_chars > longest:
            last, longest = node, num_chars
        # The most recently used one is explored first, and so kept where others are as long.
        unexplored += [
            (child, num_chars + len(child.text)) for child in node.children if text.startswith(child.text, num_chars)
        ]
    path = []
    while last.parent is not None:
        path.append(last)
        last = last.parent
    return path[::-1]
