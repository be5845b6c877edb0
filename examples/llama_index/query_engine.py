"""Questions to this project's documentation: what retrieval finds again is not read again.

python examples/llama_index/query_engine.py [--model MODEL]
"""

from pathlib import Path

from common import make_llm, parse_model
from llama_index.core import SimpleDirectoryReader, SimpleKeywordTableIndex
from llama_index.core.node_parser import SentenceSplitter

DOCS = Path(__file__).parents[2] / "docs"

llm, table = make_llm(parse_model(__doc__), max_tokens=12)
documents = SimpleDirectoryReader(DOCS, required_exts=[".md"]).load_data()
splitter = SentenceSplitter(chunk_size=128, chunk_overlap=0)
# Found by keywords, without an embedding model; any retriever does.
index = SimpleKeywordTableIndex.from_documents(documents, llm=llm, transformations=[splitter])
query_engine = index.as_query_engine(llm=llm, num_chunks_per_query=2, response_mode="compact")

for question in ("What is a block?", "How is a block hashed?", "Who may use a block?"):
    print(f"{question} {query_engine.query(question)}")
table.print()
