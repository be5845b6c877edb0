"""What LangChain's chat and completion models have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from langchain_core.language_models.base import BaseLanguageModel

from omlx_plugins.base import BaseOMLX, require_tokenizer


class LangChainOMLX(BaseOMLX, BaseLanguageModel[Any]):
    """Counting, tracing and serialization."""

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": self.model, "adapter_path": self.adapter_path, **self.generation_options()}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain can write it down: all but an `engine` of one's own, which stays behind."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Fields whose values are written down in another form."""
        return {} if self.kv_cache is None else {"kv_cache": self.kv_cache.model_dump(mode="json")}

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of a text, without special tokens around it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        token_ids: list[int] = require_tokenizer(self.get_engine()).encode(text, add_special_tokens=False)
        return token_ids

    def _traced_stop(self, stop: list[str] | None) -> list[str]:
        return stop or ([self.stop] if isinstance(self.stop, str) else list(self.stop))

    def _with_model_of(self, keywords: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The model that a call asks for, this one with its options unless it names another; and its other keywords."""
        given = dict(keywords)
        model = given.pop("model", None) or self.model
        if model == self.model:
            return self, given
        return self.model_copy(update={"model": model, "adapter_path": None, "engine": None}), given
