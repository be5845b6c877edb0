"""The project's own documents, and a BM25 retriever over them for each framework."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bm25s
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core.retrievers import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import ConfigDict

_MIN_SECTION_CHARS = 80


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document under one heading."""

    source: str
    text: str


def load_sections() -> list[Section]:
    """The sections of the documents beside this package's checkout; of the README alone if it was installed."""
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file() and (root / "docs").is_dir():
        paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    else:
        texts = {"README.md": importlib.metadata.metadata("omlx-plugins")["Description"]}
    return [
        Section(source, text.strip())
        for source, document in texts.items()
        for text in re.split(r"(?m)^(?=#+ )", document)
        if len(text.strip()) >= _MIN_SECTION_CHARS
    ]


@dataclass
class Bm25Index:
    """Sections ranked by BM25."""

    sections: Sequence[Section]
    _bm25: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._bm25 = bm25s.BM25()
        self._bm25.index(self._tokenize([section.text for section in self.sections]), show_progress=False)

    def search(self, query: str, count: int) -> list[tuple[Section, float]]:
        """The best sections with their scores, best first."""
        count = min(count, len(self.sections))
        found, scores = self._bm25.retrieve(self._tokenize([query]), k=count, show_progress=False)
        return [(self.sections[int(i)], float(score)) for i, score in zip(found[0], scores[0], strict=True)]

    @staticmethod
    def _tokenize(texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", show_progress=False)


class LangChainBm25Retriever(LangChainRetriever):
    """The index as a LangChain retriever."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    index: Bm25Index
    count: int

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del run_manager  # there are no steps to report
        return [
            Document(section.text, metadata={"source": section.source})
            for section, _ in self.index.search(query, self.count)
        ]


class LlamaIndexBm25Retriever(LlamaIndexRetriever):
    """The index as a LlamaIndex retriever."""

    def __init__(self, index: Bm25Index, count: int) -> None:
        super().__init__()
        self._index = index
        self._count = count

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(node=TextNode(text=section.text, metadata={"source": section.source}), score=score)
            for section, score in self._index.search(query_bundle.query_str, self._count)
        ]
