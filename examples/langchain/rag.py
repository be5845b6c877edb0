"""Ten questions to a RAG chain over this project's documents: a section that several of them find is read once.

    python examples/langchain/rag.py [--model MODEL]

All questions are asked a second time where nothing is kept or found, and the answers are the same.
"""

import argparse
import math
import re
import time
import zlib
from collections import Counter
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from tqdm import tqdm

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX

ROOT = Path(__file__).parents[2]
SECTION_CHARS = 500
COMMON_WORDS = ("does", "from", "that", "they", "what", "when", "where", "which", "with")
QUESTIONS = (
    "How is a prefix pinned?",
    "When are pinned prefixes evicted?",
    "What share do pinned prefixes take?",
    "What is a checkpoint of a recurrent layer?",
    "Where are checkpoints of recurrent layers kept?",
    "How many checkpoints of recurrent layers are kept?",
    "What does copy-on-write copy?",
    "When is a block copied on write?",
    "How is a plugin found?",
    "What is an entry point of a plugin?",
)


class HashedWords(Embeddings):
    """Words hashed into a vector, the rare ones weighing more; made of the texts that are to be found."""

    def __init__(self, texts, size=2048):
        self._size = size
        self._in_texts = Counter(word for text in texts for word in set(self._words(text)))
        self._num_texts = len(texts)

    def embed_query(self, text):
        vector = [0.0] * self._size
        for word, count in Counter(self._words(text)).items():
            rarity = math.log((1 + self._num_texts) / (1 + self._in_texts[word]))
            vector[zlib.crc32(word.encode()) % self._size] += (1 + math.log(count)) * rarity
        return vector

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    @staticmethod
    def _words(text):
        words = re.findall(r"[a-z_]{4,}", text.lower())
        return [word.rstrip("s") for word in words if word not in COMMON_WORDS]


def load_sections():
    """The documents without their code, cut at their headings; but for the pages that are tables of results."""
    pages = {
        path.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        if path.name not in ("performance.md", "architectures.md")
    }
    return [
        Document(section[:SECTION_CHARS], metadata={"page": name})
        for name, text in sorted(pages.items())
        for section in re.split(r"(?m)^(?=#+ )", re.sub(r"```.*?```\n", "", text, flags=re.DOTALL))
        if len(section) > 100
    ]


def ask(chain, progress):
    """Every question's answer, and the seconds that it took."""
    for question in QUESTIONS:
        start_s = time.perf_counter()
        answer = chain.invoke(question)
        progress.update()
        yield answer, time.perf_counter() - start_s


def prefilled(answer):
    return answer.usage_metadata["input_tokens"] - answer.usage_metadata["input_token_details"]["cache_read"]


parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="a folder or a repository id; left out, a small model is fetched")
model = parser.parse_args().model or str(ensure_sample_model())

sections = load_sections()
store = InMemoryVectorStore(HashedWords([section.page_content for section in sections]))
store.add_documents(sections)
find = {"context": store.as_retriever(search_kwargs={"k": 1}), "question": RunnablePassthrough()}
prompt = ChatPromptTemplate([("system", "Answer from this, in a few words.\n\n{context}"), ("user", "{question}")])

# These prompts are short; the default block size is 256.
llm = ChatOMLX(model=model, kv_cache=CacheSettings(block_size=16), max_tokens=12)
llm.get_engine()  # loads the model, before the clock starts
with tqdm(total=2 * len(QUESTIONS), desc="questions", disable=None) as progress:
    cached = list(ask(find | prompt | llm, progress))
    uncached = list(ask(find | prompt | llm.bind(cache_salt="nothing is kept here", store=False), progress))

row = "{:50} {:>6} {:>9} {:>8} {:>14}  {}".format
print(row("question", "prompt", "prefilled", "time", "without cache", "same answer"))
for question, (answer, time_s), (alone, alone_time_s) in zip(QUESTIONS, cached, uncached, strict=True):
    is_same = "yes" if answer.text == alone.text else f"no: {answer.text!r}, {alone.text!r}"
    num_tokens = answer.usage_metadata["input_tokens"]
    print(row(question, num_tokens, prefilled(answer), f"{time_s:.2f} s", f"{alone_time_s:.2f} s", is_same))
total = sum(answer.usage_metadata["input_tokens"] for answer, _ in cached)
total_prefilled = sum(prefilled(answer) for answer, _ in cached)
seconds = [f"{sum(time_s for _, time_s in answers):.2f} s" for answers in (cached, uncached)]
all_same = "yes" if all(a.text == b.text for (a, _), (b, _) in zip(cached, uncached, strict=True)) else "no"
print(row("total", total, total_prefilled, *seconds, all_same))
