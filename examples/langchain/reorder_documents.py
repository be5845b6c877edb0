"""Two questions whose documents arrive in another order each; the second skips those that it shares with the first.

python examples/langchain/reorder_documents.py [MODEL]
"""

import sys

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.langchain import ChatOMLX
from omlx_plugins.rag.langchain import CacheAwareReorder

FACTS = {
    "Paris": "Paris lies on the Seine. Its towers, bridges and museums draw more visitors than those of most cities.",
    "Rome": "Rome lies on the Tiber. Its ruins, fountains and churches are two thousand years of history side by side.",
    "Vienna": "Vienna lies on the Danube. Its palaces, coffee houses and concert halls are known all over the world.",
}
model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_sample_model())

# Documents this short need small blocks: a prefix is reused in whole blocks.
llm = ChatOMLX(model=model, kv_cache=CacheSettings(block_size=16), max_tokens=12)
prompt = ChatPromptTemplate([("system", "Answer from these documents.\n\n{context}"), ("user", "{question}")])
reorder = CacheAwareReorder(
    llm=llm, prompt=prompt, on_reorder=lambda plan: print(f"  {plan.expected.cached_tokens} tokens are expected there")
)

for question, retrieved in (
    ("On which river does Rome lie?", ["Rome", "Paris", "Vienna"]),
    ("On which river does Vienna lie?", ["Vienna", "Rome", "Paris"]),
):
    print(question)
    documents = reorder.transform_documents([Document(FACTS[city]) for city in retrieved])
    context = "\n\n".join(document.page_content for document in documents)
    answer = (prompt | llm).invoke({"context": context, "question": question})
    usage = answer.usage_metadata
    print(f"  {answer.text}")
    print(f"  {usage['input_tokens']} prompt tokens, {usage['input_token_details']['cache_read']} of them reused")
