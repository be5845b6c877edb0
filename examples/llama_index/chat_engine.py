"""A conversation about a page of this project's documentation: each turn reads only what is new.

python examples/llama_index/chat_engine.py [--model MODEL]
"""

from pathlib import Path

from common import make_llm, parse_model
from llama_index.core import SummaryIndex
from llama_index.core.schema import Document

page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")[:1000]

llm, table = make_llm(parse_model(__doc__), max_tokens=16)
# The page is in the system message, where every turn begins alike.
chat_engine = SummaryIndex.from_documents([Document(text=page)]).as_chat_engine(chat_mode="context", llm=llm)

for question in ("What is a block?", "And how large is one?", "Thank you."):
    print(f"{question} ", end="")
    for token in chat_engine.stream_chat(question).response_gen:
        print(token, end="", flush=True)
    print()
table.print()
