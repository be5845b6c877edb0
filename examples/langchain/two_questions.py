"""Two questions about one document through a LangChain chain; the second skips the document.

    python examples/langchain/two_questions.py [--model MODEL]

Run it again: now the first question skips the document too, because it is on SSD.
"""

import argparse
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="a folder or a repository id; left out, a small model is fetched")
model = parser.parse_args().model or str(ensure_sample_model())
document = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text(encoding="utf-8")

llm = ChatOMLX(model=model, kv_cache=CacheSettings(paged_ssd_cache_dir="auto"), max_tokens=40)
chain = ChatPromptTemplate([("system", "Answer from this document.\n\n{document}"), ("user", "{question}")]) | llm

for question in ("What is the hot tier?", "What is the cold tier?"):
    answer = chain.invoke({"document": document, "question": question})
    usage = answer.usage_metadata
    print(f"{question} {answer.text}")
    print(
        f"  {usage['input_tokens']} prompt tokens, {usage['input_token_details']['cache_read']} of them reused, "
        f"first token after {answer.response_metadata['omlx']['ttft_s']:.2f} s"
    )
