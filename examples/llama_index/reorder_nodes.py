"""Two questions whose nodes arrive in another order each; the second skips those that it shares with the first.

python examples/llama_index/reorder_nodes.py [MODEL]
"""

import sys

from llama_index.core import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from omlx_core import CacheSettings
from omlx_core.model.sample_model import ensure_sample_model
from omlx_plugins.llama_index import OMLX
from omlx_plugins.rag.llama_index import CacheAwareReorder

FACTS = [
    "Paris lies on the Seine. Its towers, bridges and museums draw more visitors than those of most cities.",
    "Rome lies on the Tiber. Its ruins, fountains and churches are two thousand years of history side by side.",
    "Vienna lies on the Danube. Its palaces, coffee houses and concert halls are known all over the world.",
]


class ByFirstWord(BaseRetriever):
    """Best first: the facts that begin with a word of the question."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        scores = [float(fact.split()[0] in query_bundle.query_str) for fact in FACTS]
        nodes = [
            NodeWithScore(node=TextNode(text=fact), score=score) for fact, score in zip(FACTS, scores, strict=True)
        ]
        return sorted(nodes, key=lambda node: -(node.score or 0))


model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_sample_model())
# Documents this short need small blocks: a prefix is reused in whole blocks.
llm = OMLX(model=model, kv_cache=CacheSettings(block_size=16), max_tokens=12)
template = PromptTemplate("Answer from these documents.\n\n{context_str}\n\n{query_str}")
query_engine = RetrieverQueryEngine(
    ByFirstWord(),
    response_synthesizer=get_response_synthesizer(llm=llm, text_qa_template=template),
    node_postprocessors=[
        CacheAwareReorder(
            llm=llm,
            text_qa_template=template,
            on_reorder=lambda plan: print(f"  {plan.expected.cached_tokens} tokens are expected there"),
        )
    ],
)

for question in ("On which river does Rome lie?", "On which river does Vienna lie?"):
    before = llm.get_engine().cache.stats()
    print(question)
    print(f"  {query_engine.query(question)}")
    after = llm.get_engine().cache.stats()
    print(f"  {after.matched_tokens - before.matched_tokens} prompt tokens reused")
