"""`Engine`: what callers hold. Any thread and any event loop may use it; one thread behind it owns MLX."""

from __future__ import annotations

import dataclasses
import gc
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from omlx_core.mlx_backend import mx

from omlx_core.cache.pins import PinnedPrefix
from omlx_core.cache.tiered_cache import TieredCache
from omlx_core.engine.calls import arun, results_of, run
from omlx_core.engine.document_reuse import DocumentReuse
from omlx_core.engine.params import GenerationOptions, GenerationParams, Prompt
from omlx_core.engine.prefix_cache import open_prefix_cache
from omlx_core.engine.prefix_reuse import PrefixReuse
from omlx_core.engine.preparation import RequestMaker
from omlx_core.engine.prompt_caches import PromptCaches
from omlx_core.engine.prompt_lookup import PromptLookup
from omlx_core.engine.results import GenerationChunk, GenerationResult, Usage
from omlx_core.engine.scheduler import Scheduler
from omlx_core.engine.speculative import DraftedModel
from omlx_core.errors import InvalidSettingError
from omlx_core.model.chat_messages import with_user_turn
from omlx_core.model.fingerprint import model_arrays
from omlx_core.model.load_progress import OnLoadProgress
from omlx_core.model.loading import LoadedModel, load_model
from omlx_core.settings import CacheSettings, EngineSettings
from omlx_core.state.prompt_state import PromptStateCodec


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
        self._start(name, lambda: loaded, cache, settings, owns_model=False)

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

        engine._start(Path(path_or_repo).name, load, cache, settings, owns_model=True)
        return engine

    def _start(
        self,
        name: str,
        load: Callable[[], LoadedModel],
        cache: CacheSettings | None,
        settings: EngineSettings | None,
        *,
        owns_model: bool,
    ) -> None:
        cache = CacheSettings() if cache is None else cache
        if not isinstance(cache, CacheSettings):
            raise InvalidSettingError(f"cache={cache!r}: give a CacheSettings")
        settings = EngineSettings() if settings is None else settings
        scheduler = Scheduler(name, settings)

        def load_and_serve() -> tuple[LoadedModel, TieredCache, PromptStateCodec | None]:
            loaded = load()
            prompt_caches = PromptCaches(loaded.model, loaded.name, settings, cache.block_size)
            tiers, codec = open_prefix_cache(loaded, cache, prompt_caches)
            tokenizer = loaded.tokenizer
            end_token_ids = sorted(tokenizer.eos_token_ids) if tokenizer else []
            newline_token_ids = tokenizer.encode("\n", add_special_tokens=False) if tokenizer else []
            reuse = PrefixReuse(prompt_caches, tiers, codec, settings=settings, wake=scheduler.wake)
            documents = DocumentReuse(loaded.model, loaded.name, prompt_caches, tiers, codec)
            scheduler.serve(
                loaded.model, end_token_ids, newline_token_ids, reuse, prompt_caches, document_reuse=documents
            )
            return loaded, tiers, codec

        try:
            loaded, tiers, codec = scheduler.thread.call(load_and_serve)
        except BaseException:
            scheduler.thread.close()
            raise
        self._scheduler = scheduler
        has_checkpoints = codec is not None and codec.has_checkpoints
        self._maker = RequestMaker(
            loaded,
            settings,
            tiers.find_neighbour,
            counts_system_tokens=has_checkpoints,
            check_document_reuse=scheduler.check_document_reuse,
        )
        self._lookup = PromptLookup(tiers.lookup, codec, self._maker.encoder.decode)
        self._cache = tiers
        self._name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._weights_bytes = loaded.size_bytes
        # Closes at interpreter exit too, while the thread still runs.
        self._finalizer = weakref.finalize(self, _close, scheduler, tiers, owns_model, os.getpid())

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
        return self._maker.context_length

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be given as a prompt."""
        return self._maker.encoder.has_chat_template

    @property
    def num_active_requests(self) -> int:
        """Requests that are not answered yet, waiting ones included."""
        return self._scheduler.occupancy.num_active

    @property
    def memory_bytes(self) -> int:
        """What closing it would free: the bytes of the model's weights, and of what its cache holds in RAM."""
        return 0 if self.is_closed else self._weights_bytes + self._cache.stats().hot.hot_bytes

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for.

        Raises:
            InvalidPromptError: it can't be served.
        """
        return self._maker.encoder.encode(prompt).token_ids

    def count_tokens(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> int:
        """How many tokens a prompt has, the template's included, whether or not it fits the context.

        Args:
            prompt: token ids, text, or chat messages.
            **options: see `GenerationParams`; those for chats count, such as the tools.

        Raises:
            InvalidPromptError: it is empty or malformed.
            InvalidRequestError: an option can't be served.
        """
        return len(self._maker.encoder.encode_unbounded(prompt, GenerationParams.from_options(options)).token_ids)

    def count_cached_tokens(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Usage:
        """How much of a prompt a request would find in the cache now; nothing is computed, read, held or kept.

        Args:
            prompt: as for `generate`.
            **options: those of the request, as far as they change the prompt: ``tools``, ``template_args``,
                ``cache_salt``.

        Returns:
            The prompt's tokens, and how many of them are in RAM and on SSD.

        Raises:
            InvalidRequestError: the prompt or an option can't be served.
        """
        params = GenerationParams.from_options(options)
        token_ids = self._maker.encoder.encode_unbounded(prompt, params).token_ids
        found = self._lookup.find(token_ids, params.extra_keys)
        return Usage(len(token_ids), cached_tokens_hot=found.tokens_hot, cached_tokens_cold=found.tokens_cold)

    def find_cached_order(
        self, prompt: Prompt, texts: Sequence[str], *, any_space: bool = False, **options: Unpack[GenerationOptions]
    ) -> list[int]:
        """Which of a prompt's documents, in which order, continue its head furthest in the cache.

        Args:
            prompt: text or messages with all of the documents.
            texts: of these documents, in the order in which they are in the prompt.
            any_space: any white space may stand before a document, instead of what does in this prompt.
            **options: as for `count_cached_tokens`.

        Returns:
            Indices of `texts`: put first in this order, they let the request reuse the longest chain of blocks
            that is there for any order. The others are not part of it; see `PromptLookup.find_order`.

        Raises:
            InvalidRequestError: the prompt or an option can't be served, or a document isn't in the prompt.
        """
        params = GenerationParams.from_options(options)
        text, token_ids = self._encode_with_text(prompt, params)
        return self._lookup.find_order(text, token_ids, texts, params.extra_keys, any_space=any_space)

    def find_starts(self, prompt: Prompt, texts: Sequence[str], **options: Unpack[GenerationOptions]) -> list[int]:
        """The index of the token that each of a prompt's documents begins in; arguments as for `find_cached_order`.

        Raises:
            InvalidRequestError: as `find_cached_order`, or the tokenizer changes texts.
        """
        text, token_ids = self._encode_with_text(prompt, GenerationParams.from_options(options))
        return self._lookup.find_starts(text, token_ids, texts)

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
        make_requests = self._maker.prepare(prompt, 1, options)

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
        make_requests = self._maker.prepare(prompt, 1, options)

        async def chunks() -> AsyncGenerator[GenerationChunk]:
            async with aclosing(arun(self._scheduler, make_requests)) as running:
                async for _, chunk in running:
                    yield chunk

        return chunks()

    async def asample(self, prompt: Prompt, n: int, **options: Unpack[GenerationOptions]) -> list[GenerationResult]:
        """Like `sample`, on an event loop."""
        return await self._asample(prompt, n, options)

    def prefill(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Usage:
        """Compute a prompt and keep it in the cache, without an answer: what begins like it then starts there.

        Args:
            prompt: as for `generate`; messages that are system messages only will do.
            **options: those of the requests that are to find it, as far as they change the prompt: ``tools``,
                ``template_args``, ``cache_salt``. ``pin`` keeps it in RAM.

        Returns:
            How many tokens there were, and how many of them were cached already.

        Raises:
            As `generate`.
        """
        [result] = self._sample(_with_user(prompt), 1, options, ends_with_prompt=True)
        return result.usage

    async def aprefill(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Usage:
        """Like `prefill`, on an event loop; cancelling the task cancels the request."""
        [result] = await self._asample(_with_user(prompt), 1, options, ends_with_prompt=True)
        return result.usage

    def pins(self) -> list[PinnedPrefix]:
        """The prefixes that requests with ``pin`` keep in RAM, least recently used first."""
        return self._cache.pins()

    def unpin(self, prompt: Prompt | None = None, **options: Unpack[GenerationOptions]) -> int:
        """Let pinned prefixes be evicted again; they stay cached until they are.

        Args:
            prompt: unpin those that it begins with; None unpins all.
            **options: those that it was pinned with, as far as they change the prompt.

        Returns:
            How many there were.

        Raises:
            InvalidRequestError: the prompt or an option can't be served.
        """
        if prompt is None:
            return self._cache.unpin()
        params = GenerationParams.from_options(options)
        token_ids = self._maker.encoder.encode_unbounded(_with_user(prompt), params).token_ids
        return self._cache.unpin(token_ids, params.extra_keys)

    def close(self, *, drain: bool = False) -> None:
        """Flush the SSD tier, stop all threads, and give back the memory, the weights' too. Idempotent.

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

    def _encode_with_text(self, prompt: Prompt, params: GenerationParams) -> tuple[str, list[int]]:
        encoded = self._maker.encoder.encode_unbounded(prompt, params)
        return encoded.text_with_documents, encoded.token_ids

    def _sample(
        self, prompt: Prompt, n: int, options: GenerationOptions, *, ends_with_prompt: bool = False
    ) -> list[GenerationResult]:
        make_requests = self._maker.prepare(prompt, n, options, ends_with_prompt=ends_with_prompt)
        return results_of([*run(self._scheduler, make_requests)], n)

    async def _asample(
        self, prompt: Prompt, n: int, options: GenerationOptions, *, ends_with_prompt: bool = False
    ) -> list[GenerationResult]:
        make_requests = self._maker.prepare(prompt, n, options, ends_with_prompt=ends_with_prompt)
        async with aclosing(arun(self._scheduler, make_requests)) as running:
            return results_of([arrived async for arrived in running], n)


def _with_user(prompt: Prompt) -> Prompt:
    """A chat of system messages only, with the user's message that some templates want."""
    messages = [] if isinstance(prompt, str) else [item for item in prompt if isinstance(item, Mapping)]
    return with_user_turn(messages) if messages and len(messages) == len(prompt) else prompt


def _close(scheduler: Scheduler, tiers: TieredCache, owns_model: bool, process_id: int) -> None:
    if os.getpid() != process_id:
        return  # a forked process has neither the threads nor a share in what they hold
    scheduler.thread.close()
    tiers.close()
    if owns_model:
        gc.collect()  # some of mlx-lm's modules refer to the one that they are in
    mx.clear_cache()
