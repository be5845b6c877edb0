"""LlamaIndex nodes in the order that the prefix cache knows best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from omlx_core.engine.params import Prompt
from omlx_core.errors import InvalidParameterError
from omlx_plugins.llama_index.llm import OMLX
from omlx_plugins.llama_index.messages import convert_messages
from omlx_plugins.rag.reorder import Reordering, reorder

_CONTEXT = "context_str"


class CacheAwareReorder(BaseNodePostprocessor):
    """Puts retrieved nodes in the order that lets the model reuse most of what it has computed.

    ::

        template = PromptTemplate("Answer from these.\\n\\n{context_str}\\n\\n{query_str}")
        query_engine = index.as_query_engine(
            llm=llm,
            text_qa_template=template,
            node_postprocessors=[CacheAwareReorder(llm=llm, text_qa_template=template)],
        )

    Nodes are never dropped or changed: it returns the same objects in another order. The engine is asked what it has
    cached, and computes nothing; the model is loaded on first use. Put it last among the postprocessors.

    Attributes:
        llm: the model that will answer.
        text_qa_template: the query engine's template, or a string that is one; LlamaIndex's own by default. What comes
            before ``{context_str}`` must be the same for all questions.
        separator: what the synthesizer puts between two nodes.
        key: sorts the nodes that the cache doesn't order; by default a hash of their text does.
        align: have each node begin a block of the cache, by white space in front of it. LlamaIndex's synthesizers
            strip such space, so this is for code that takes the `context` of `plan` for its prompt.
        options: those of the requests to come, as far as they change the prompt, such as ``cache_salt``.
        on_reorder: is told of each order, and what it is expected to reuse.

    Raises:
        InvalidParameterError: the template has no ``{context_str}``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: OMLX
    text_qa_template: BasePromptTemplate = DEFAULT_TEXT_QA_PROMPT_SEL
    separator: str = "\n\n"
    key: Callable[[NodeWithScore], Any] | None = None
    align: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    on_reorder: Callable[[Reordering], None] | None = Field(default=None, exclude=True, repr=False)

    def __init__(self, *, llm: OMLX, text_qa_template: BasePromptTemplate | str | None = None, **fields: Any) -> None:
        if isinstance(text_qa_template, str):
            text_qa_template = PromptTemplate(text_qa_template)
        template = DEFAULT_TEXT_QA_PROMPT_SEL if text_qa_template is None else text_qa_template
        if _CONTEXT not in template.template_vars:
            raise InvalidParameterError(
                f"text_qa_template has the variables {template.template_vars}, and none is {_CONTEXT!r}, where the "
                "documents go"
            )
        super().__init__(llm=llm, text_qa_template=template, **fields)

    @classmethod
    def class_name(cls) -> str:
        """The class's name in serialized components."""
        return "OMLXCacheAwareReorder"

    def plan(self, nodes: list[NodeWithScore]) -> Reordering:
        """The order, and what it is expected to reuse; the context in it has the nodes joined."""
        texts = [node.node.get_content(metadata_mode=MetadataMode.LLM).strip() for node in nodes]
        keys = None if self.key is None else [self.key(node) for node in nodes]
        options = self.llm.generation_options(self.options)
        with self.llm.lease_engine() as engine:

            def render(context: str) -> Prompt:
                values = {_CONTEXT: context, "query_str": ""}
                if engine.has_chat_template:
                    return convert_messages(self.llm._get_messages(self.text_qa_template, **values)).messages
                return self.llm._get_prompt(self.text_qa_template, **values)

            return reorder(
                engine,
                texts,
                render=render,
                separator=self.separator,
                keys=keys,
                align=self.align,
                options=options,
            )

    def _postprocess_nodes(
        self,
        nodes: list[NodeWithScore],
        query_bundle: QueryBundle | None = None,  # noqa: ARG002 - LlamaIndex's signature
    ) -> list[NodeWithScore]:
        plan = self.plan(nodes)
        if self.on_reorder is not None:
            self.on_reorder(plan)
        return [nodes[index] for index in plan.order]
