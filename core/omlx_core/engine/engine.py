"""`Engine`: what callers hold. Any thread and any event loop may use it; one thread behind it owns MLX."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from omlx_core.mlx_backend import mx

from omlx_core.cache.tiered_cache import TieredCache
from omlx_core.engine.calls import MakeRequest, arun, results_of, run
from omlx_core.engine.constraint_compiler import ConstraintCompiler
from omlx_core.engine.constraint_processor import ConstraintProcessor
from omlx_core.engine.divergence import RecentSequences
from omlx_core.engine.output import OutputAssembler
from omlx_core.engine.params import GenerationOptions, GenerationParams, Prompt
from omlx_core.engine.prefix_cache import open_prefix_cache
from omlx_core.engine.prefix_reuse import PrefixReuse
from omlx_core.engine.progress import PrefillBar
from omlx_core.engine.prompt_caches import PromptCaches
from omlx_core.engine.request import Emit, Request
from omlx_core.engine.results import Divergence, GenerationChunk, GenerationResult
from omlx_core.engine.scheduler import Scheduler
from omlx_core.engine.speculative import DraftedModel
from omlx_core.errors import InvalidParameterError, InvalidSettingError
from omlx_core.model.chat import RenderedChat
from omlx_core.model.fingerprint import model_arrays
from omlx_core.model.history import TokenHistory
from omlx_core.model.load_progress import OnLoadProgress
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
        draft_model: a smaller model with the same vocabulary, for speculative decoding: the answers are the same.

    Raises:
        InvalidSettingError: the settings, or the draft, don't fit the model.
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
        draft_model: Any = None,
    ) -> None:
        model = model if draft_model is None else DraftedModel(model, draft_model)
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
        draft_model: str | Path | None = None,
        cache: CacheSettings | None = None,
        settings: EngineSettings | None = None,
        on_progress: OnLoadProgress | None = None,
    ) -> Self:
        """Load a model from a folder or a hub repository and serve it.

        Args:
            path_or_repo: a folder in mlx-lm's format, or a repository id.
            adapter_path: a folder with a LoRA adapter.
            draft_model: a folder or repository of a smaller model with the same vocabulary, for speculative decoding.
            cache: how prefixes are cached.
            settings: how requests are run.
            on_progress: is told how far the load has come.

        Raises:
            ModelNotFoundError: there is no such model, adapter or draft.
            InvalidSettingError: the settings, or the draft, don't fit the model.
            ModelLoadError: its files can't be loaded.
            CacheDirectoryError: the SSD tier's folder can't be used.
        """
        adapter = None if adapter_path is None else os.fspath(adapter_path)
        engine = cls.__new__(cls)

        def load() -> LoadedModel:
            loaded = load_model(path_or_repo, adapter, on_progress)
            if draft_model is None:
                return loaded
            return dataclasses.replace(loaded, model=DraftedModel(loaded.model, load_model(draft_model).model))

        engine._start(Path(path_or_repo).name, load, cache, settings)
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
            prompt_caches = PromptCaches(loaded.model, loaded.name, settings, cache.block_size)
            tiers, codec = open_prefix_cache(loaded, cache, prompt_caches)
            tokenizer = loaded.tokenizer
            end_token_ids = sorted(tokenizer.eos_token_ids) if tokenizer else []
            newline_token_ids = tokenizer.encode("\n", add_special_tokens=False) if tokenizer else []
            reuse = PrefixReuse(prompt_caches, tiers, codec, settings=settings, wake=scheduler.wake)
            scheduler.serve(loaded.model, end_token_ids, newline_token_ids, reuse, prompt_caches)
            return loaded, tiers, codec is not None and codec.has_checkpoints

        try:
            loaded, tiers, self._has_checkpoints = scheduler.thread.call(load_and_serve)
        except BaseException:
            scheduler.thread.close()
            raise
        self._scheduler = scheduler
        self._settings = settings
        self._recent = RecentSequences()
        self._cache = tiers
        self._name = loaded.name
        self._weights_bytes = loaded.size_bytes
        self._constraints = ConstraintCompiler(loaded.tokenizer)
        self._tokenizer = loaded.tokenizer
        self._context_length = context_length(loaded.model, loaded.config, loaded.tokenizer)
        self._vocab_size = getattr(getattr(loaded.model, "args", None), "vocab_size", None)
        history = TokenHistory() if settings.token_faithful_history else None
        self._encoder = PromptEncoder(
            loaded.tokenizer, self._context_length, self._vocab_size, name=loaded.name, history=history
        )
        # Closes at interpreter exit too, while the thread still runs.
        self._finalizer = weakref.finalize(self, _close, scheduler, tiers, os.getpid())

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
    def num_active_requests(self) -> int:
        """Requests that are not answered yet, waiting ones included."""
        return self._scheduler.occupancy.num_active

    @property
    def memory_bytes(self) -> int:
        """What closing it would free: the bytes of the model's weights, and of what its cache holds in RAM."""
        return self._weights_bytes + self._cache.stats().hot.hot_bytes

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for.

        Raises:
            InvalidPromptError: it can't be served.
        """
        return self._encoder.encode(prompt).token_ids

    def count_tokens(self, prompt: Prompt) -> int:
        """How many tokens a prompt has, the template's included, whether or not it fits the context.

        Raises:
            InvalidPromptError: it is empty or malformed.
        """
        return len(self._encoder.encode_unbounded(prompt).token_ids)

    def generate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Answer a prompt and wait for the whole answer.

        Args:
            prompt: token ids, text, or chat messages.
            **options: see `GenerationParams`.

        Raises:
            InvalidRequestError: the prompt or an option can't be served; nothing has changed.
            EngineClosedError: the engine is, or was meanwhile, closed.
            EngineForkedError: it was made in the process that this one was forked from.
            EngineBusyError: too many requests wait already.
            RequestTimeoutError: the answer wasn't complete within `timeout_s`.
            EngineError: the request failed; its cause is attached.
        """
        [result] = self._sample(prompt, 1, options)
        return result

    def stream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Generator[GenerationChunk]:
        """Answer a prompt piece by piece; the last chunk carries the result.

        The request starts with the first chunk asked for, and closing the iterator cancels it.

        Raises:
            InvalidRequestError: at once.
            Others, see `generate`: while iterating.
        """
        make_requests = self._prepare(prompt, 1, options)

        def chunks() -> Generator[GenerationChunk]:
            for _, chunk in run(self._scheduler, make_requests):
                yield chunk

        return chunks()

    def sample(self, prompt: Prompt, n: int, **options: Unpack[GenerationOptions]) -> list[GenerationResult]:
        """Several answers to one prompt, which is prefilled once; they share its blocks, copy-on-write.

        With a `seed`, the first answer is that of `generate` with this seed, the second that of the next seed, and so
        on. `timeout_s` is for all of them together.

        Args:
            prompt: as for `generate`.
            n: how many; at most `max_batch_size`.
            **options: see `GenerationParams`.

        Raises:
            As `generate`; the first error ends all.
        """
        return self._sample(prompt, n, options)

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Like `generate`, on an event loop; cancelling the task cancels the request."""
        [result] = await self._asample(prompt, 1, options)
        return result

    def astream(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> AsyncGenerator[GenerationChunk]:
        """Like `stream`, on an event loop."""
        make_requests = self._prepare(prompt, 1, options)

        async def chunks() -> AsyncGenerator[GenerationChunk]:
            async with aclosing(arun(self._scheduler, make_requests)) as running:
                async for _, chunk in running:
                    yield chunk

        return chunks()

    async def asample(self, prompt: Prompt, n: int, **options: Unpack[GenerationOptions]) -> list[GenerationResult]:
        """Like `sample`, on an event loop."""
        return await self._asample(prompt, n, options)

    def close(self, *, drain: bool = False) -> None:
        """Flush the SSD tier and stop all threads. Idempotent.

        Args:
            drain: first take no more requests, and wait until those under way are answered; otherwise they fail.
        """
        if drain and self._finalizer.alive:
            self._scheduler.occupancy.drain()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _sample(self, prompt: Prompt, n: int, options: GenerationOptions) -> list[GenerationResult]:
        return results_of([*run(self._scheduler, self._prepare(prompt, n, options))], n)

    async def _asample(self, prompt: Prompt, n: int, options: GenerationOptions) -> list[GenerationResult]:
        async with aclosing(arun(self._scheduler, self._prepare(prompt, n, options))) as running:
            return results_of([arrived async for arrived in running], n)

    def _prepare(self, prompt: Prompt, n: int, options: GenerationOptions) -> list[MakeRequest]:
        """Validate everything; what is returned makes the requests and can't fail."""
        params = self._check(GenerationParams.from_options(options), n)
        encoded = self._encoder.encode(prompt, params)
        if self._context_length is not None:
            room = self._context_length - len(encoded.token_ids)
            params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
        if params.progress:
            params = dataclasses.replace(params, on_prefill=PrefillBar(params.on_prefill))
        make_constraint = self._compile_constraint(params, encoded.chat)
        system_tokens = self._encoder.count_system_tokens(prompt, encoded, params) if self._has_checkpoints else 0
        divergence = self._find_divergence(encoded.token_ids, params)
        # The requests must not keep the engine from being collected.
        tokenizer, encoder, recent = self._tokenizer, self._encoder, self._recent

        def finished(answer_ids: list[int]) -> None:
            encoder.remember(encoded, params, answer_ids)
            if params.store:
                recent.add([*encoded.token_ids, *answer_ids], params.extra_keys)

        def make(sample_params: GenerationParams, emit: Emit) -> Request:
            return Request(
                encoded.token_ids,
                sample_params,
                emit,
                OutputAssembler(tokenizer, sample_params, encoded.chat),
                system_tokens=system_tokens,
                on_finished=finished,
                divergence=divergence,
                make_constraint=make_constraint,
            )

        return [partial(make, _params_of_sample(params, index)) for index in range(n)]

    def _check(self, params: GenerationParams, n: int) -> GenerationParams:
        """Check what depends on the engine."""
        most = self._settings.max_batch_size
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
            raise InvalidParameterError(f"n={n!r}: give a whole number from 1 to max_batch_size={most}")
        if params.stop and self._tokenizer is None:
            raise InvalidParameterError(f"stop={params.stop!r}: this engine has no tokenizer and so no text to stop at")
        unknown = [token_id for token_id in params.logit_bias if token_id >= (self._vocab_size or 2**32)]
        if unknown:
            raise InvalidParameterError(
                f"logit_bias: token ids {unknown[:5]} are not in the vocabulary of {self._vocab_size} tokens"
            )
        return params

    def _compile_constraint(
        self, params: GenerationParams, chat: RenderedChat | None
    ) -> Callable[[], ConstraintProcessor] | None:
        """What makes an answer follow its constraint, or call the tool that it must; None if it is free."""
        thinking_start, thinking_end = ([], []) if chat is None else self._thinking_tokens(chat)
        compiled = self._constraints.compile(
            params.constraint,
            tools=() if chat is None else chat.tools,
            tool_choice=params.tool_choice,
            call_format=None if chat is None else chat.call_format,
            thinking_start=thinking_start,
            thinking_end=thinking_end,
        )
        if compiled is None:
            return None
        is_thinking_open = chat is not None and chat.is_thinking_open
        return partial(compiled.make_processor, starts_in_thinking=is_thinking_open)

    def _thinking_tokens(self, chat: RenderedChat) -> tuple[list[int], list[int]]:
        """The tokens by which the answer may open thinking, and those that end it; none if it has been ended."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking or chat.text.rstrip().endswith(tokenizer.think_end):
            return [], []
        return [] if chat.is_thinking_open else list(tokenizer.think_start_tokens), list(tokenizer.think_end_tokens)

    def _find_divergence(self, token_ids: list[int], params: GenerationParams) -> Divergence | None:
        decode = self._tokenizer.decode if params.divergence_text and self._tokenizer is not None else None
        return self._recent.find_divergence(token_ids, params.extra_keys, decode)


def _params_of_sample(params: GenerationParams, index: int) -> GenerationParams:
    """Each sample draws from a seed of its own."""
    if params.seed is None or not index:
        return params
    return dataclasses.replace(params, seed=(params.seed + index) % 2**64)


def _close(scheduler: Scheduler, tiers: TieredCache, process_id: int) -> None:
    if os.getpid() != process_id:
        return  # a forked process has neither the threads nor a share in what they hold
    scheduler.thread.close()
    tiers.close()
