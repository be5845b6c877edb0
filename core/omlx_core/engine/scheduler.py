"""The scheduler: one thread that owns MLX and takes every request from match to release.

A request waits in line, is matched against the cache, waits for blocks that come from SSD, is prefilled in steps,
and joins mlx-lm's running batch. Between two steps of a prefill the batch decodes one token, so a long prompt
doesn't stop the streams beside it. Only one request prefills at a time: a request that shares its prefix is matched
when its turn comes, and finds the blocks that the one before it has stored.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from omlx_core.mlx_backend import mx

from mlx_lm.generate import BatchGenerator, generation_stream

from omlx_core.engine.prefix_reuse import PrefixReuse
from omlx_core.engine.request import Request
from omlx_core.engine.sampling import make_sampler
from omlx_core.engine.sequential_batch import SequentialBatch, needs_sequential_decoding
from omlx_core.errors import CacheInvariantError, EngineClosedError, EngineError, OMLXError, RequestCancelledError
from omlx_core.settings import EngineSettings
from omlx_core.state.prompt_state import PromptCache

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Scheduler:
    """Runs requests against one model. All methods but `submit`, `wake` and `run_on_thread` are the thread's own.

    Args:
        name: the model's name, for the thread and the log.
        settings: step and batch sizes.
    """

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self._settings = settings
        self._inbox: queue.SimpleQueue[Request | Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._submit_lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._prefilling: Request | None = None
        self._decoding: dict[int, Request] = {}
        self._model: Any = None
        self._end_token_ids: list[int] = []
        self._generator: BatchGenerator | None = None
        self._sequential_batch: SequentialBatch | None = None
        self._reuse: PrefixReuse | None = None
        self._thread = threading.Thread(target=self._run, name=f"omlx-mlx-{name}", daemon=True)
        self._thread.start()

    # From any thread.

    def submit(self, request: Request) -> None:
        """Put a request in line.

        Raises:
            EngineClosedError: the engine was closed.
        """
        with self._submit_lock:
            if self._is_closed:
                raise EngineClosedError("the engine is closed: make a new one")
            self._inbox.put(request)

    def wake(self) -> None:
        """Make an idle thread look around, for a cancelled request or a finished read."""
        self._inbox.put(lambda: None)

    def run_on_thread(self, function: Callable[[], _Result]) -> _Result:
        """Run a function on the MLX thread, between two steps, and return or raise what it does."""
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

        self._inbox.put(run)
        return future.result()

    def close(self) -> None:
        """Fail all requests, stop the thread and wait for it. Idempotent."""
        with self._submit_lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # On the MLX thread.

    def serve(self, model: Any, end_token_ids: list[int], reuse: PrefixReuse) -> None:
        """Say what to serve; requests are taken from then on.

        Args:
            model: the mlx-lm model.
            end_token_ids: tokens that end an answer.
            reuse: its use of the prefix cache.
        """
        self._model, self._end_token_ids, self._reuse = model, end_token_ids, reuse

    @property
    def _prefixes(self) -> PrefixReuse:
        if self._reuse is None:
            raise CacheInvariantError("a request came before the model")
        return self._reuse

    def _run(self) -> None:
        try:
            self._serve_until_closed()
        finally:
            # MLX aborts the process now and then if a thread ends with streams of its own (ml-explore/mlx#4110).
            mx.clear_streams()

    def _serve_until_closed(self) -> None:
        while True:
            is_idle = not (self._waiting or self._prefilling or self._decoding)
            is_waiting_for_reads = self._is_reading() and not self._decoding
            if not self._take_messages(block=is_idle or is_waiting_for_reads):
                break
            try:
                self._drop_cancelled()
                if self._reuse is not None:
                    self._reuse.tend()
                self._advance_prefill()
                self._decode()
            except Exception as exc:  # the thread must outlive whatever one step does
                logger.exception("a step of the engine failed")
                self._fail_all(_as_engine_error(exc))
        self._fail_all(EngineClosedError("the engine was closed while the request ran"))
        if self._generator is not None:
            self._generator.close()

    def _take_messages(self, *, block: bool) -> bool:
        """Move what has arrived into place; False when the engine is to close."""
        while True:
            try:
                message = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if message is None:
                return False
            if isinstance(message, Request):
                self._waiting.append(message)
            else:
                message()

    def _is_reading(self) -> bool:
        request = self._prefilling
        return request is not None and request.pending is not None and not request.pending.is_ready()

    def _drop_cancelled(self) -> None:
        for request in [request for request in self._waiting if request.is_cancelled]:
            self._waiting.remove(request)
            request.emit(RequestCancelledError("the request was cancelled while it waited in line"))
        if self._prefilling is not None and self._prefilling.is_cancelled:
            request, self._prefilling = self._prefilling, None
            self._prefixes.leave(request)
            request.emit(RequestCancelledError("the request was cancelled during its prefill"))
        for uid, request in list(self._decoding.items()):
            if request.is_cancelled:
                self._remove_from_batch(uid)
                request.emit(RequestCancelledError("the request was cancelled while it was answered"))

    # Prefill.

    def _advance_prefill(self) -> None:
        if self._prefilling is None:
            if not self._waiting or len(self._decoding) >= self._settings.max_batch_size:
                return
            self._prefilling = self._waiting.popleft()
        request = self._prefilling
        try:
            self._prefill_step(request)
        except Exception as exc:  # one bad request must not end the others
            self._prefilling = None
            self._prefixes.leave(request)
            request.emit(_as_engine_error(exc))

    def _prefill_step(self, request: Request) -> None:
        """Take a request one step further: match, restore, prefill one step, or join the batch."""
        if request.prompt_cache is None and not self._prefixes.begin(request):
            return
        # The last token is left to the batch, whose first step gives the first logits.
        end = len(request.prompt_ids) - 1
        stop = min(request.num_computed + self._settings.prefill_step_size, end)
        if end - stop == 1:
            stop = end  # a single token takes another path through some layers, and rounds otherwise
        # A recurrent state can only be had where the computation stops.
        stop = min([stop, *(at for at in request.checkpoints_at if at > request.num_computed)])
        step = request.prompt_ids[request.num_computed : stop]
        if step:
            self._compute(request, step)
        if request.num_computed == len(request.prompt_ids) - 1:
            self._prefilling = None
            self._join_batch(request)

    def _compute(self, request: Request, token_ids: list[int]) -> None:
        with mx.stream(generation_stream):
            self._model(mx.array(token_ids)[None], cache=request.prompt_cache)
            mx.eval([layer.state for layer in request.prompt_cache or ()])
        request.num_computed += len(token_ids)
        self._prefixes.computed(request, token_ids)
        mx.clear_cache()

    def _join_batch(self, request: Request) -> None:
        prompt_cache = request.prompt_cache or []
        is_sequential = needs_sequential_decoding(self._model, prompt_cache, len(request.prompt_ids))
        batch = self._sequential() if is_sequential else self._batch()
        [uid] = batch.insert_segments(
            [[request.prompt_ids[-1:]]],
            max_tokens=[request.params.max_tokens],
            caches=[prompt_cache],
            all_tokens=[request.prompt_ids[:-1]],
            samplers=[make_sampler(request.params)],
        )
        request.prompt_cache = None
        self._decoding[uid] = request

    # Decode.

    def _decode(self) -> None:
        if not self._decoding:
            return
        # Each is asked for its share of the requests only: an empty step costs time too.
        has_batched, has_sequential = any(uid >= 0 for uid in self._decoding), any(uid < 0 for uid in self._decoding)
        responses = [
            *(self._batch().next()[1] if has_batched else ()),
            *(self._sequential().next()[1] if has_sequential else ()),
        ]
        for response in responses:
            request = self._decoding.get(response.uid)
            if request is None:
                continue
            # By now the batch's cache holds this token, and with the first one the prompt's last.
            added = [response.token] if request.output.token_ids else [request.prompt_ids[-1], response.token]
            self._prefixes.generated(request, added, partial(self._extract, response.uid, response.prompt_cache))
            is_end_token = response.finish_reason == "stop"
            logprob = response.logprobs[response.token].item() if request.params.logprobs else None
            request.emit_token(response.token, logprob, is_end_token=is_end_token)
            if response.finish_reason is not None:
                del self._decoding[response.uid]
                self._prefixes.finish(request, response.prompt_cache)
                request.emit_result(response.finish_reason)
            elif request.output.has_met_stop_text:
                self._remove_from_batch(response.uid)
                request.emit_result("stop")

    def _remove_from_batch(self, uid: int) -> None:
        prompt_cache, _ = self._batch_of(uid).remove([uid], return_prompt_caches=True)[uid]
        self._prefixes.finish(self._decoding.pop(uid), prompt_cache)

    def _extract(self, uid: int, final: PromptCache | None) -> PromptCache:
        """A decoding request's prompt cache; `final` if the batch has let go of it."""
        if final is not None:
            return final
        prompt_cache, _ = self._batch_of(uid).extract_cache([uid])[uid]
        return prompt_cache

    # Batch.

    def _batch(self) -> BatchGenerator:
        if self._generator is None:
            self._generator = BatchGenerator(
                self._model,
                stop_tokens=[[token_id] for token_id in self._end_token_ids],
                completion_batch_size=self._settings.max_batch_size,
                prefill_batch_size=self._settings.max_batch_size,
            )
        return self._generator

    def _sequential(self) -> SequentialBatch:
        if self._sequential_batch is None:
            self._sequential_batch = SequentialBatch(self._model, self._end_token_ids)
        return self._sequential_batch

    def _batch_of(self, uid: int) -> BatchGenerator | SequentialBatch:
        return self._batch() if uid >= 0 else self._sequential()

    def _fail_all(self, error: OMLXError) -> None:
        requests = [*self._decoding.values(), *([self._prefilling] if self._prefilling else []), *self._waiting]
        self._decoding.clear()
        self._waiting.clear()
        self._prefilling = None
        self._generator = self._sequential_batch = None
        for request in requests:
            self._prefixes.leave(request)
            request.emit(error)


def _as_engine_error(exc: Exception) -> OMLXError:
    if isinstance(exc, OMLXError):
        return exc
    error = EngineError(f"the request failed inside the engine: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error
