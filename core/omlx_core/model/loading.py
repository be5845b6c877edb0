"""Load a model and its tokenizer with mlx-lm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from omlx_core.mlx_backend import mx

from omlx_core.errors import ModelLoadError, ModelNotFoundError
from omlx_core.model.fingerprint import model_arrays
from omlx_core.model.load_progress import LoadProgress, OnLoadProgress

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# Tokenizers without a limit of their own carry 1e30.
_LARGEST_CONTEXT = 10**8
_NUM_READING_STEPS = 100
_WEIGHT_FILES = "model*.safetensors"  # what mlx-lm reads; a repository may hold the same weights under other names too
_ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: the ``mlx.nn.Module``, its arrays evaluated.
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

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays that the model holds; one that it holds in two places counts once."""
        return sum(array.nbytes for array in _distinct(model_arrays(self.model).values()))


def load_model(
    path_or_repo: str | os.PathLike[str],
    adapter_path: str | None = None,
    on_progress: OnLoadProgress | None = None,
) -> LoadedModel:
    """Load a model from a folder in mlx-lm's layout or from the Hugging Face hub.

    Call it on the thread that will run the model: arrays that MLX has not evaluated may not change threads.

    Args:
        path_or_repo: a folder or a repository id. What looks like a path is never looked up on the hub.
        adapter_path: folder of an adapter made by mlx-lm.
        on_progress: is told how far it has come.

    Raises:
        ModelNotFoundError: no such folder or repository, or no adapter in that folder.
        ModelLoadError: mlx-lm can't make a model of what is there.
    """
    from mlx_lm.utils import load

    folder = _local_folder(path_or_repo)
    adapter = None if adapter_path is None else _adapter_folder(adapter_path)
    source = str(path_or_repo) if folder is None else str(folder)
    report = _ignore if on_progress is None else on_progress
    if folder is None:
        report(LoadProgress(source, "downloading"))
    with _explained_failures(source, adapter, is_local=folder is not None):
        # Lazy: weights are read when they are evaluated, which is then done in steps.
        model, tokenizer, config = load(source, adapter_path=adapter, return_config=True, lazy=True)
    arrays = _distinct(model_arrays(model).values())
    read_bytes, total_bytes = 0, sum(array.nbytes for array in arrays)
    report(LoadProgress(source, "reading", read_bytes, total_bytes))
    for group in _groups(arrays, -(-total_bytes // _NUM_READING_STEPS)):
        with _explained_failures(source, adapter, is_local=folder is not None):
            mx.eval(group)
        read_bytes += sum(array.nbytes for array in group)
        report(LoadProgress(source, "reading", read_bytes, total_bytes))
    report(LoadProgress(source, "ready", read_bytes, total_bytes))
    name = source if folder is None else folder.resolve().name
    return LoadedModel(model=model, tokenizer=tokenizer, name=name, config=config, adapter_path=adapter)


def estimate_size_bytes(path_or_repo: str | os.PathLike[str], adapter_path: str | None = None) -> int | None:
    """What a model will take in memory, by the size of its files; None if it is a repository that isn't here yet.

    A model that is stored in another precision than it runs in takes something else.

    Raises:
        ModelNotFoundError: no such folder, or no adapter in that folder.
    """
    folder = _local_folder(path_or_repo) or _downloaded_folder(str(path_or_repo))
    if folder is None:
        return None
    files = list(folder.glob(_WEIGHT_FILES))
    if adapter_path is not None:
        files.append(Path(_adapter_folder(adapter_path), _ADAPTER_FILES[-1]))
    return sum(file.stat().st_size for file in files)


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


def _downloaded_folder(repo_id: str) -> Path | None:
    """Where a repository was downloaded to; None if it wasn't, or not all of it."""
    from mlx_lm.utils import hf_repo_to_path

    try:
        return hf_repo_to_path(repo_id)  # type: ignore[no-any-return]
    except Exception as exc:
        if _is_hub_failure(exc):
            return None
        raise


def _adapter_folder(adapter_path: str) -> str:
    folder = Path(adapter_path).expanduser()
    for name in _ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ModelNotFoundError(
                f"adapter_path={adapter_path!r} holds no {name}: name a folder that mlx_lm.lora has written"
            )
    return str(folder)


@contextmanager
def _explained_failures(source: str, adapter: str | None, *, is_local: bool) -> Iterator[None]:
    """Raise what mlx-lm raises as one of this project's errors, with the way out."""
    try:
        yield
    except Exception as exc:
        if not is_local and _is_hub_failure(exc):
            raise ModelNotFoundError(
                f"model {source!r} is neither a folder here nor to be had from the Hugging Face hub "
                f"({_first_line(exc)}): check the name, the network and your access, or give a folder's path"
            ) from exc
        with_adapter = "" if adapter is None else f" with the adapter {adapter!r}"
        raise ModelLoadError(
            f"model {source!r}{with_adapter} can't be loaded ({type(exc).__name__}: {_first_line(exc)}): it must be "
            "one that mlx-lm supports, complete, in mlx-lm's or Hugging Face's safetensors layout"
        ) from exc


def _distinct(arrays: Iterable[Any]) -> list[Any]:
    return list({id(array): array for array in arrays}.values())


def _groups(arrays: Iterable[Any], min_bytes: int) -> Iterator[list[Any]]:
    """Consecutive arrays, so many at a time that they come to that size; the last group may be smaller."""
    group: list[Any] = []
    group_bytes = 0
    for array in arrays:
        group.append(array)
        group_bytes += array.nbytes
        if group_bytes >= min_bytes:
            yield group
            group, group_bytes = [], 0
    if group:
        yield group


def _ignore(progress: LoadProgress) -> None:
    pass


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
