"""What the small files of a model say about it, without loading it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# What the templates of models that think write around it, in mlx-lm's families.
_THINKING_MARKERS = ("<think>", "<longcat_think>", "<|think:start|>", "<|channel>thought", "<|channel|>analysis")


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What is known of a model before it is loaded.

    Attributes:
        context_length: most tokens of prompt and answer together; None if its configuration doesn't say.
        has_chat_template: whether it takes chats.
        can_think: whether its chat template has a place for reasoning.
    """

    context_length: int | None
    has_chat_template: bool
    can_think: bool


def describe_model(model: str) -> ModelDescription | None:
    """Read a model's configuration and chat template; nothing is downloaded.

    Args:
        model: a folder or a repository id.

    Returns:
        None if it isn't on this machine.
    """
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        cached = _cached_folder(model)
        if cached is None:
            return None
        folder = cached
    return _describe_folder(folder, (folder / "config.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _describe_folder(folder: Path, _: int) -> ModelDescription:
    config = _read_json(folder / "config.json")
    template = _chat_template(folder)
    return ModelDescription(
        context_length=_context_length(config),
        has_chat_template=bool(template),
        can_think=any(marker in template for marker in _THINKING_MARKERS),
    )


def _cached_folder(repo_id: str) -> Path | None:
    """Where the hub's client keeps a repository that was fetched before."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    repository = Path(hub).expanduser() / f"models--{repo_id.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = repository / "snapshots" / revision
    return folder if (folder / "config.json").is_file() else None


def _context_length(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    for facts in (config, nested if isinstance(nested, Mapping) else {}):
        for key in _CONTEXT_KEYS:
            if isinstance(facts.get(key), int) and facts[key] > 0:
                length: int = facts[key]
                return length
    return None


def _chat_template(folder: Path) -> str:
    """The source of all its chat templates; empty if it has none."""
    template = folder / "chat_template.jinja"
    if template.is_file():
        return template.read_text(encoding="utf-8", errors="replace")
    source = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if source is None:
        source = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several by name
        return "\n".join(str(named.get("template", "")) for named in source if isinstance(named, Mapping))
    return source if isinstance(source, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
