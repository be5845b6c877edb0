"""How far the loading of a model has come. Imports nothing of MLX, so whoever shows it doesn't need to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm import tqdm

LoadPhase = Literal["downloading", "reading", "ready"]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One report.

    Attributes:
        model: what is loaded: a pool's id, otherwise the folder or repository id that was given.
        phase: ``"downloading"`` while the hub is asked for a repository and sends what isn't here yet, which
            huggingface_hub shows with bars of its own; ``"reading"`` while weights are read; ``"ready"`` at the end.
        read_bytes: weights in memory so far.
        total_bytes: all of them; None until the files' headers have been read.
    """

    model: str
    phase: LoadPhase
    read_bytes: int = 0
    total_bytes: int | None = None


OnLoadProgress = Callable[[LoadProgress], None]
"""Is told of every step, on the thread that loads. What it raises gives the load up, and reaches its caller."""


@contextmanager
def report_load(model: str, on_load: OnLoadProgress | None, *, has_bar: bool) -> Iterator[OnLoadProgress]:
    """For one load, tell a listener and show a bar.

    Args:
        model: what the reports call the model.
        on_load: the listener, if any.
        has_bar: as `load_progress_bar`.
    """
    with load_progress_bar() if has_bar else nullcontext() as show:

        def report(progress: LoadProgress) -> None:
            progress = replace(progress, model=model)
            for listener in (on_load, show):
                if listener is not None:
                    listener(progress)

        yield report


@contextmanager
def load_progress_bar() -> Iterator[OnLoadProgress]:
    """A bar on stderr, if that is a terminal, for one load; gone when the block ends."""
    bar: Any = None

    def show(progress: LoadProgress) -> None:
        nonlocal bar
        if progress.total_bytes is None:
            return
        if bar is None:
            bar = tqdm(
                desc=f"Loading {progress.model}",
                total=progress.total_bytes,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,  # tqdm's word for "unless stderr is no terminal"
            )
        bar.update(progress.read_bytes - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
