"""Load a model and its tokenizer with mlx-lm."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from omlx_core.mlx_backend import mx

from omlx_core.errors import ModelLoadError, ModelNotFoundError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# Tokenizers without a limit of their own carry 1e30.
_LARGEST_CONTEXT = 10**8


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: the ``mlx.nn.Module``, its parameters evaluated.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        name: the repository id, or the folder's name.
        config: the content of ``config.json``.
        adapter_path: where its adapter came from, if it has one.
    """

    model: Any
    tokenizer: Any
    name: str
    config: dict[str, Any]
    adapter_path: str | None


def load_model(path_or_repo: str | os.PathLike[str], adapter_path: str | None = None) -> LoadedModel:
    """Load a model from a folder in mlx-lm's layout or from the Hugging Face hub.

    Call it on the thread that will run the model: arrays that MLX has not evaluated may not change threads.

    Args:
        path_or_repo: a folder or a repository id. What looks like a path is never looked up on the hub.
        adapter_path: folder of an adapter made by mlx-lm.

    Raises:
        ModelNotFoundError: no such folder or repository, or no adapter in that folder.
        ModelLoadError: mlx-lm can't make a model of what is there.
    """
    from mlx_lm.utils import load

    folder = _local_folder(path_or_repo)
    adapter = None if adapter_path is None else _adapter_folder(adapter_path)
    source = str(path_or_repo) if folder is None else str(folder)
    try:
        model, tokenizer, config = load(source, adapter_path=adapter, return_config=True)
        mx.eval(model.parameters())
    except Exception as exc:
        if folder is None and _is_hub_failure(exc):
            raise ModelNotFoundError(
                f"model {source!r} is neither a folder here nor to be had from the Hugging Face hub "
                f"({_first_line(exc)}): check the name, the network and your access, or give a folder's path"
            ) from exc
        with_adapter = "" if adapter is None else f" with the adapter {adapter!r}"
        raise ModelLoadError(
            f"model {source!r}{with_adapter} can't be loaded ({type(exc).__name__}: {_first_line(exc)}): it must be "
            "one that mlx-lm supports, complete, in mlx-lm's or Hugging Face's safetensors layout"
        ) from exc
    name = source if folder is None else folder.resolve().name
    return LoadedModel(model=model, tokenizer=tokenizer, name=name, config=config, adapter_path=adapter)


def architecture_of(model: Any) -> str:
    """The name of a model's module in mlx-lm, such as ``"qwen3"``."""
    return type(model).__module__.rpartition(".")[2]


def context_length(model_or_args: Any, config: Mapping[str, Any] | None, tokenizer: Any | None) -> int | None:
    """How many tokens the model was made for; None if it doesn't say, as recurrent models may not.

    The model's configuration counts before its arguments, and these before its tokenizer, whose limit is often one
    of a truncating pipeline.

    Args:
        model_or_args: the model, or the arguments that it was built from.
        config: the content of ``config.json``, if known.
        tokenizer: the tokenizer, if any.
    """
    args = getattr(model_or_args, "args", model_or_args)
    for source in (config, args, getattr(args, "text_config", None)):
        facts = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
        nested = facts.get("text_config")
        for mapping in (facts, nested if isinstance(nested, Mapping) else {}):
            for key in _CONTEXT_KEYS:
                if _is_context(length := mapping.get(key)):
                    return length
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if _is_context(limit) else None


def _is_context(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_CONTEXT


def _local_folder(path_or_repo: str | os.PathLike[str]) -> Path | None:
    """The folder that is meant; None if it can only be a repository id."""
    text = os.fspath(path_or_repo)
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ModelNotFoundError(f"model folder {text!r} holds no config.json: name a folder with a converted model")
    if path.exists():
        raise ModelNotFoundError(
            f"model {text!r} is a file: name a folder with config.json, *.safetensors and a tokenizer"
        )
    is_repo_id = isinstance(path_or_repo, str) and _REPO_ID.fullmatch(text) is not None
    # "models/typo" beside a folder "models" is a mistyped path, not a repository of the owner "models".
    if is_repo_id and not (len(path.parts) > 1 and path.parent.is_dir()):
        return None
    raise ModelNotFoundError(f"there is no model folder {text!r}: check the path, or give a repository id (owner/name)")


def _adapter_folder(adapter_path: str) -> str:
    folder = Path(adapter_path).expanduser()
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (folder / name).is_file():
            raise ModelNotFoundError(
                f"adapter_path={adapter_path!r} holds no {name}: name a folder that mlx_lm.lora has written"
            )
    return str(folder)


def _is_hub_failure(exc: BaseException) -> bool:
    from huggingface_hub import errors

    kinds = (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        errors.OfflineModeIsEnabled,
        ConnectionError,
    )
    return isinstance(exc, kinds)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
