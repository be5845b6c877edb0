"""LlamaIndex's ways to ask a model, as one."""

from __future__ import annotations

import inspect
from typing import Any

CHAT_FORMS = ["chat", "stream_chat", "achat", "astream_chat"]
COMPLETE_FORMS = ["complete", "stream_complete", "acomplete", "astream_complete"]
WITH_TOOLS_FORMS = [f"{form}_with_tools" for form in CHAT_FORMS]
STRUCTURED_FORMS = [
    "structured_predict",
    "stream_structured_predict",
    "astructured_predict",
    "astream_structured_predict",
]


async def all_of(llm: Any, form: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What one of the forms gives, as a list."""
    given = getattr(llm, form)(*args, **kwargs)
    if inspect.isawaitable(given):
        given = await given
    if inspect.isasyncgen(given):
        return [piece async for piece in given]
    if inspect.isgenerator(given):
        return list(given)
    return [given]
