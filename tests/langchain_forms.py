"""LangChain's four ways to ask a model, as one."""

from __future__ import annotations

from typing import Any

FORMS = ["invoke", "stream", "ainvoke", "astream"]
STREAMS = ["stream", "astream"]


async def all_of(llm: Any, call: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What one of the four forms gives, as a list."""
    method = getattr(llm, call)
    match call:
        case "invoke":
            return [method(*args, **kwargs)]
        case "stream":
            return list(method(*args, **kwargs))
        case "ainvoke":
            return [await method(*args, **kwargs)]
        case "astream":
            return [chunk async for chunk in method(*args, **kwargs)]
    raise ValueError(call)
