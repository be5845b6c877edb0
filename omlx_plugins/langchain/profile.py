"""What LangChain may know of a model before it is loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from langchain_core.language_models.model_profile import ModelProfile

from omlx_plugins.model_files import ModelDescription, describe_model

if TYPE_CHECKING:
    from omlx_core import Engine


def make_profile(model: str, engine: Engine | None, max_tokens: int) -> ModelProfile:
    """A model's profile.

    What isn't on this machine yet is taken for a chat model. Structured output and the choice of tools need the extra
    ``structured``.

    Args:
        model: a folder or a repository id.
        engine: the engine, if it is there already.
        max_tokens: most tokens of an answer.
    """
    description = _describe_engine(engine) if engine is not None else describe_model(model)
    is_chat = description is None or description.has_chat_template
    constrains = importlib.util.find_spec("llguidance") is not None
    profile = ModelProfile(
        name=model,
        open_weights=True,
        text_inputs=True,
        image_inputs=False,
        image_url_inputs=False,
        pdf_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        image_tool_message=False,
        pdf_tool_message=False,
        text_outputs=True,
        image_outputs=False,
        audio_outputs=False,
        video_outputs=False,
        max_output_tokens=max_tokens,
        tool_calling=is_chat,
        tool_choice=is_chat and constrains,
        tool_call_streaming=is_chat,
        structured_output=constrains,
        attachment=False,
        temperature=True,
    )
    if description is not None:
        profile["reasoning_output"] = description.can_think
        if description.context_length is not None:
            profile["max_input_tokens"] = description.context_length
    return profile


def _describe_engine(engine: Engine) -> ModelDescription:
    return ModelDescription(
        context_length=engine.context_length,
        has_chat_template=engine.has_chat_template,
        can_think=bool(getattr(engine.tokenizer, "has_thinking", False)),
    )
