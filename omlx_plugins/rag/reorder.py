"""Puts documents in the order that the prefix cache knows best. Lossless: the answer is that to the documents in that
order, to the last bit, whether or not any of them was cached.

A prefix is reused up to the first difference, and retrieval orders documents anew for each question. So those that the
cache has in a chain behind the prompt's head come first, in the order of that chain, and the others after them in an
order that depends on nothing but themselves. Equal sets of documents thus give equal prompts. The idea of a tree of
documents in the order of their use is RAGCache's (Jin et al. 2024, arXiv:2404.12457) and ContextPilot's (Jiang et al.
2025, arXiv:2511.03475).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omlx_core import Usage
from omlx_core.errors import InvalidParameterError

if TYPE_CHECKING:
    from omlx_core import Engine
    from omlx_core.engine.params import Prompt

Render = Callable[[str], "Prompt"]
"""Makes the prompt of a context; what comes after the context, such as the question, doesn't matter."""

_PADDING = "\n"
_MAX_TRIES = 24


@dataclass(frozen=True, slots=True)
class Reordering:
    """An order of documents, and what it is expected to save.

    Attributes:
        order: the documents by their indices, each once.
        num_chained: how many of them, the first ones, are there because the cache has them so; the last of these may
            be cached in part.
        expected: what a request with this context would find in the cache now: its `cached_tokens_hot` and
            `cached_tokens_cold` of `prompt_tokens`, which count the template and not the question.
        padding: the white space in front of each document, in the new order; empty unless they are aligned.
        context: the documents in their new order, with the separator and the padding.
    """

    order: tuple[int, ...]
    num_chained: int
    expected: Usage
    padding: tuple[str, ...]
    context: str


def canonical_key(document: str) -> str:
    """The place of a document among those that the cache doesn't order: a hash of its text."""
    return hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()


def reorder(
    engine: Engine,
    documents: Sequence[str],
    *,
    render: Render,
    separator: str = "\n\n",
    keys: Sequence[Any] | None = None,
    align: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Reordering:
    """Order documents by what the engine has cached.

    Deterministic for a state of the cache, and stable: equal documents keep their order. Takes a walk through the
    cached blocks behind the prompt's head, and no look at other orders.

    Args:
        engine: the engine that will be asked.
        documents: their texts, as the context has them.
        render: makes the prompt of a context.
        separator: stands between two documents.
        keys: sort the documents that the cache doesn't order, one each; None is `canonical_key` of their texts.
        align: have each document begin a block, by white space in front of it. A document's last block can then be
            reused whatever follows it, at the price of up to a block of white space each.
        options: those of the request that change its prompt or what it may reuse, such as ``tools``, ``cache_salt``.

    Raises:
        InvalidParameterError: documents are to be aligned behind a separator that isn't white space.
        InvalidRequestError: the prompt can't be served.
    """
    if align and separator.strip():
        raise InvalidParameterError(
            f"separator={separator!r} with align=True, which may put any white space between documents: give a "
            "separator of white space"
        )
    options = options or {}
    sort_keys = [canonical_key(document) for document in documents] if keys is None else keys
    canonical = sorted(range(len(documents)), key=sort_keys.__getitem__)
    # What has no text can't be found in a prompt, nor does it matter where it stands.
    texts = [(index, documents[index].strip()) for index in canonical]
    found = [(index, text) for index, text in texts if text]
    chain: list[int] = []
    if found:
        prompt = render(separator.join(documents[index] for index, _ in found))
        places = engine.find_cached_order(prompt, [text for _, text in found], any_space=align, **options)
        chain = [found[place][0] for place in places]
    order = (*chain, *(index for index in canonical if index not in set(chain)))
    ordered = [documents[index] for index in order]
    padding = [""] * len(ordered)
    if align:
        padding = _Aligner(engine, render, options).align(ordered, separator)
    context = separator.join(space + document for space, document in zip(padding, ordered, strict=True))
    expected = engine.count_cached_tokens(render(context), **options)
    return Reordering(order, len(chain), expected, tuple(padding), context)


class _Aligner:
    """Finds the white space that has documents begin a block."""

    def __init__(self, engine: Engine, render: Render, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._render = render
        self._options = options

    def align(self, documents: Sequence[str], separator: str) -> list[str]:
        """The white space in front of each; none where no amount of it will do."""
        padding: list[str] = []
        context = ""
        for document in documents:
            before = context + separator if padding else ""
            padding.append(self._padding(before, document) if document.strip() else "")
            context = before + padding[-1] + document
        return padding

    def _padding(self, before: str, document: str) -> str:
        # What stands before it is named, too, lest an earlier place with the same text be taken for it.
        texts = [text for text in (before.strip(), document.strip()) if text]
        count = 0
        for _ in range(_MAX_TRIES):
            prompt = self._render(before + _PADDING * count + document)
            missing = -self._engine.find_starts(prompt, texts, **self._options)[-1] % self._engine.cache.block_size
            if not missing:
                return _PADDING * count
            count += missing  # a token may be several of them, and never the other way round: this comes closer
        return ""
