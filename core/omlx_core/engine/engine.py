"""`Engine`: what callers hold. Any thread and any event loop may use it; one thread behind it owns MLX."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import queue
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from omlx_core.mlx_backend import mx

from omlx_core.cache.tiered_cache import TieredCache
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationOptions, GenerationParams, Prompt
from omlx_core.engine.prefix_cache import open_prefix_cache
from omlx_core.engine.prefix_reuse import PrefixReuse
from omlx_core.engine.request import Emit, Request
from omlx_core.engine.results import GenerationChunk, GenerationResult
from omlx_core.engine.scheduler import Scheduler
from omlx_core.errors import CacheInvariantError, InvalidParameterError, InvalidSettingError
from omlx_core.model.fingerprint import model_arrays
from omlx_core.model.loading import LoadedModel, context_length, load_model
from omlx_core.model.prompts import PromptEncoder
from omlx_core.settings import CacheSettings, EngineSettings


class Engine:
    """A model, its thread, and its prefix cache.

    Prompts are token ids, text, or chat messages (dictionaries with ``role`` and ``content``). Whatever part of a
    prompt an earlier one began with is reused, from RAM or from SSD, and changes nothing but the time.

    Args:
        model: an mlx-lm model, loaded.
        tokenizer: its mlx-lm `TokenizerWrapper`; None accepts token ids only and gives no text.
        name: the model's name; part of the cache's identity.
        cache: how prefixes are cached; defaults and ``OMLX_*`` variables otherwise.
        settings: how requests are run; likewise.
        config: the model's configuration as loaded, if it is known.

    Raises:
        CacheDirectoryError: the SSD tier's folder can't be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "model",
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        # An array may change threads once it is evaluated, not before; that goes for those that aren't parameters too.
        mx.eval(list(model_arrays(model).values()))
        loaded = LoadedModel(model=model, tokenizer=tokenizer, name=name, config=config or {}, adapter_path=None)
        self._start(name, lambda: loaded, cache, settings)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        adapter_path: str | Path | None = None,
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
    ) -> Self:
        """Load a model from a folder or a hub repository and serve it.

        Args:
            path_or_repo: a folder in mlx-lm's format, or a repository id.
            adapter_path: a folder with a LoRA adapter.
            cache: how prefixes are cached.
            settings: how requests are run.

        Raises:
            ModelNotFoundError: there is no such model or adapter.
            ModelLoadError: its files can't be loaded.
            CacheDirectoryError: the SSD tier's folder can't be used.
        """
        adapter = None if adapter_path is None else os.fspath(adapter_path)
        engine = cls.__new__(cls)
        engine._start(Path(path_or_repo).name, lambda: load_model(path_or_repo, adapter), cache, settings)
        return engine

    def _start(
        self,
        name: str,
        load: Callable[[], LoadedModel],
        cache: CacheSettings | None,
        settings: EngineSettings | None,
    ) -> None:
        cache = CacheSettings() if cache is None else cache
        if not isinstance(cache, CacheSettings):
            raise InvalidSettingError(f"cache={cache!r}: give a CacheSettings")
        settings = EngineSettings() if settings is None else settings
        scheduler = Scheduler(name, settings)

        def load_and_serve() -> tuple[LoadedModel, TieredCache, bool]:
            loaded = load()
            tiers, codec = open_prefix_cache(loaded, cache)
            end_token_ids = sorted(loaded.tokenizer.eos_token_ids) if loaded.tokenizer else []
            reuse = PrefixReuse(
                loaded.model,
                tiers,
                codec,
                checkpoint_stride_tokens=settings.checkpoint_stride_tokens,
                wake=scheduler.wake,
            )
            scheduler.serve(loaded.model, end_token_ids, reuse)
            return loaded, tiers, codec is not None and codec.has_checkpoints

        try:
            loaded, tiers, self._has_checkpoints = scheduler.run_on_thread(load_and_serve)
        except BaseException:
            scheduler.close()
            raise
        self._scheduler = scheduler
        self._cache = tiers
        self._name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._context_length = context_length(loaded.model, loaded.config, loaded.tokenizer)
        vocab_size = getattr(getattr(loaded.model, "args", None), "vocab_size", None)
        self._encoder = PromptEncoder(loaded.tokenizer, self._context_length, vocab_size)
        # Closes at interpreter exit too, while the thread still runs.
        self._finalizer = weakref.finalize(self, _close, scheduler, tiers)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def cache(self) -> TieredCache:
        """The prefix cache: `stats()`, `flush()`."""
        return self._cache

    @property
    def tokenizer(self) -> Any:
        """The mlx-lm `TokenizerWrapper`, or None."""
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None if the model doesn't say."""
        return self._context_length

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be given as a prompt."""
        return self._encoder.has_chat_template

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for.

        Raises:
            InvalidPromptError: it can't be served.
        """
        return self._encoder.encode(prompt)

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens a prompt has, the template's included, whether or not it fits the context.

        Raises:
            InvalidPromptError: it is empty or malformed.
        """
        return len(self._encoder.encode_unbounded(prompt))

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Answer a prompt and wait for the whole answer.

        Args:
            prompt: token ids, text, or chat messages.
            **options: see `GenerationParams`.

        Raises:
            InvalidRequestError: the prompt or an option can't be served; nothing has changed.
            EngineClosedError: the engine is, or was meanwhile, closed.
            EngineError: the request failed; its cause is attached.
        """
        result = None
        for chunk in self.stream(prompt, **options):
            result = chunk.result
        return _present(result)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Generator[GenerationChunk]:
        """Answer a prompt piece by piece; the last chunk carries the result.

        The request starts with the first chunk asked for, and closing the iterator cancels it.

        Raises:
            InvalidRequestError: at once.
            EngineClosedError, EngineError: while iterating.
        """
        make_request = self._prepare(prompt, options)

        def chunks() -> Generator[GenerationChunk]:
            arrived: queue.SimpleQueue[GenerationChunk | BaseException] = queue.SimpleQueue()
            request = make_request(arrived.put)
            self._scheduler.submit(request)
            try:
                while True:
                    chunk = _or_raise(arrived.get())
                    yield chunk
                    if chunk.result is not None:
                        return
            finally:
                self._cancel(request)

        return chunks()

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Like `generate`, on an event loop; cancelling the task cancels the request."""
        result = None
        async for chunk in self.astream(prompt, **options):
            result = chunk.result
        return _present(result)

    def astream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> AsyncGenerator[GenerationChunk]:
        """Like `stream`, on an event loop."""
        make_request = self._prepare(prompt, options)

        async def chunks() -> AsyncGenerator[GenerationChunk]:
            loop = asyncio.get_running_loop()
            arrived: asyncio.Queue[GenerationChunk | BaseException] = asyncio.Queue()

            def emit(chunk: GenerationChunk | BaseException) -> None:
                try:
                    loop.call_soon_threadsafe(arrived.put_nowait, chunk)
                except RuntimeError:  # the loop is closed: nobody waits for this any more
                    request.cancel()

            request = make_request(emit)
            self._scheduler.submit(request)
            try:
                while True:
                    chunk = _or_raise(await arrived.get())
                    yield chunk
                    if chunk.result is not None:
                        return
            finally:
                self._cancel(request)

        return chunks()

    def close(self) -> None:
        """Fail what still runs, flush the SSD tier, stop all threads. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, prompt: Prompt, options: GenerationOptions) -> Callable[[Emit], Request]:
        """Validate everything; what is returned makes the request and can't fail."""
        params = GenerationParams.from_options(options)
        if params.stop and self._tokenizer is None:
            raise InvalidParameterError(f"stop={params.stop!r}: this engine has no tokenizer and so no text to stop at")
        prompt_ids = self._encoder.encode(prompt)
        if self._context_length is not None:
            room = self._context_length - len(prompt_ids)
            params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
        system_tokens = self._encoder.count_system_tokens(prompt, prompt_ids) if self._has_checkpoints else 0
        return lambda emit: Request(
            prompt_ids, params, emit, OutputAssembler(self._tokenizer, params), system_tokens=system_tokens
        )

    def _cancel(self, request: Request) -> None:
        request.cancel()
        self._scheduler.wake()


def _or_raise(chunk: GenerationChunk | BaseException) -> GenerationChunk:
    if isinstance(chunk, BaseException):
        raise chunk
    return chunk


def _present(result: GenerationResult | None) -> GenerationResult:
    if result is None:
        raise CacheInvariantError("a stream has ended with neither a result nor an error")
    return result


def _close(scheduler: Scheduler, tiers: TieredCache) -> None:
    scheduler.close()
    tiers.close()
