"""Retrieval: documents that arrive in another order for each question, and are computed once all the same.

`omlx_plugins.rag.langchain` and `omlx_plugins.rag.llama_index` have a `CacheAwareReorder` each; what they do is in
`omlx_plugins.rag.reorder` and needs no framework.
"""
