"""Two questions about one document through a LlamaIndex query engine; the second skips the document.

    python examples/llama_index/two_questions.py [MODEL]

Run it again: now the first question skips the document too, because it is on SSD.
"""

import sys
from pathlib import Path

from llama_index.core import Document, PromptTemplate, SummaryIndex

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.llama_index import OMLX

document = Document(text=(Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8"))
model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_sample_model())

llm = OMLX(model=model, kv_cache=CacheSettings(paged_ssd_cache_dir="auto"), max_tokens=40)
query_engine = SummaryIndex.from_documents([document]).as_query_engine(
    llm=llm,
    response_mode="compact",
    # What stays the same comes first: a prefix can only be reused up to where two prompts part.
    text_qa_template=PromptTemplate("Answer from this document.\n\n{context_str}\n\n{query_str}"),
)

for question in ("How are adapters found?", "What happens to a broken plugin?"):
    before = llm.get_engine().cache.stats()
    print(f"{question} {query_engine.query(question)}")
    after = llm.get_engine().cache.stats()
    reused = after.matched_tokens - before.matched_tokens
    print(f"  {reused + after.missed_tokens - before.missed_tokens} prompt tokens, {reused} of them reused")
