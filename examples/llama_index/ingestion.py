"""Metadata for the parts of a page: many short prompts that begin with one long instruction, with and without a cache.

python examples/llama_index/ingestion.py [--model MODEL]
"""

import time
from pathlib import Path

from common import make_llm, parse_model
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document

# What stays the same comes first: a prefix can only be reused up to where two prompts part.
INSTRUCTION = """\
You write the summaries in the catalogue of a technical library. Librarians read them to decide which section answers
a reader's question, so each one must name what the section is about and what can be learned from it.

Rules:
- One sentence of at most fifteen words, in the present tense.
- Begin with the subject of the section, never with "This section" or "The text".
- Use the terms of the section itself, spelled as they are there, and explain none of them.
- Name settings, commands and classes exactly; leave out their default values and their types.
- Leave out opinions, examples, links and anything that the section merely mentions.
- If the section is a table, say what its rows are.
- If the section has no content of its own, answer "Nothing to catalogue."

Good: "Eviction in RAM takes the least recently used leaf blocks first, and never a pinned one."
Good: "OMLX_MODEL_IDLE_TIMEOUT_S unloads models that nobody has used for a while."
Bad: "This section explains in great detail how the very fast cache decides what to keep."

The section:
{context_str}

Its summary: """

page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text(encoding="utf-8")[:1000]
model = parse_model(__doc__)

print(f"{'cache':>5} {'prompts':>8} {'prompt tokens':>14} {'prefilled':>10} {'time':>8}")
for is_cached in (False, True):
    llm, table = make_llm(model, is_cached=is_cached, max_tokens=6)
    llm.get_engine()  # loaded before the clock starts
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(chunk_size=64, chunk_overlap=0),
            SummaryExtractor(llm=llm, prompt_template=INSTRUCTION, num_workers=1),
        ]
    )
    start_s = time.perf_counter()
    nodes = pipeline.run(documents=[Document(text=page)])
    duration_s = time.perf_counter() - start_s
    prompt_tokens, reused = table.sums()
    name = "on" if is_cached else "off"
    print(f"{name:>5} {len(nodes):>8} {prompt_tokens:>14} {prompt_tokens - reused:>10} {duration_s:>6.1f} s")
