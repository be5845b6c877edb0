"""The scheduler: takes every request of a model from match to release, in small steps on the MLX thread.

A request waits in line, is matched against the cache, waits for blocks that come from SSD while others compute, is
prefilled in steps, and joins mlx-lm's running batch. The line is first come, first served; only a request whose blocks
are still being read lets others go ahead.

Between two steps of a prefill the batch decodes one token: a stream waits for its next token no longer than one
decode step and one prefill step of `prefill_step_size` tokens take, and one restore. Only one request prefills at a
time: one that shares its prefix finds, when its turn comes, the blocks that the one before it has stored. Prompts so
short that several fit into one step join the batch together, so that it doesn't decode half empty meanwhile.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from omlx_core.mlx_backend import backend_name, has_device_memory, mx

from mlx_lm.generate import generation_stream

from omlx_core.engine.decoding import DecodingBatches
from omlx_core.engine.document_reuse import DocumentReuse
from omlx_core.engine.mlx_thread import MLXThread, as_engine_error
from omlx_core.engine.occupancy import Occupancy
from omlx_core.engine.prefix_reuse import PrefixReuse
from omlx_core.engine.prompt_caches import PromptCaches, when_filled
from omlx_core.engine.request import Request
from omlx_core.engine.sampling import top_logprobs
from omlx_core.engine.sequential_batch import Response
from omlx_core.errors import CacheInvariantError, OMLXError
from omlx_core.settings import EngineSettings
from omlx_core.state.prompt_state import PromptCache

logger = logging.getLogger(__name__)

# Nobody waits for tokens meanwhile, and a GPU is not busy with fewer; mlx-lm's own step.
_LONE_STEP_TOKENS = 2048
# Whoever waits for the first token gets the interpreter: what follows keeps it for milliseconds.
_HAND_OVER_S = 5e-5
_READ_AHEAD = 3  # requests whose blocks may be read at once; each holds what it has read in RAM


class Scheduler:
    """Runs requests against one model. `submit` and `wake` are for any thread, all else is the MLX thread's.

    Args:
        name: the model's name, for the thread and the log.
        settings: step, batch and line sizes.

    Attributes:
        thread: the MLX thread.
        occupancy: how many requests there are.
    """

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self._settings = settings
        self._is_on_gpu = not backend_name().startswith("cpu")
        # Where kernels take long to launch, the next step's are launched while this one computes: two steps' memory.
        self._num_steps_ahead = 1 if has_device_memory() else 0
        self.occupancy = Occupancy(settings.max_waiting_requests)
        self._line_may_be_overdue = False  # it is searched only then, lest a step take longer the longer the line is
        self._next_deadline_s = math.inf
        self._waiting: deque[Request] = deque()
        self._reading: list[Request] = []
        self._prefilling: Request | None = None
        self._decoding: dict[int, Request] = {}
        self._model: Any = None
        self._batches: DecodingBatches | None = None
        self._reuse: PrefixReuse | None = None
        self._caches: PromptCaches | None = None
        self._document_reuse: DocumentReuse | None = None
        self.thread = MLXThread(name, self)

    # From any thread.

    def submit(self, request: Request) -> None:
        """Put a request in line.

        Raises:
            EngineClosedError, EngineForkedError: see `MLXThread.send`.
            EngineBusyError: too many wait already.
        """
        num_samples = len(request.samples)
        self.occupancy.enter(num_samples)
        try:
            self.thread.send(partial(self._enter_line, request))
        except OMLXError:
            self.occupancy.leave_line(num_samples)
            self.occupancy.leave(num_samples)
            raise

    def wake(self) -> None:
        """Make the thread look around, for a cancelled request or a finished read."""
        self._line_may_be_overdue = True
        self.thread.wake()

    def check_document_reuse(self) -> None:
        """See `DocumentReuse.check`; raises what that does."""

        def check() -> None:
            self._documents.check()  # on that thread: a closed engine has none any more, and says so itself

        self.thread.call(check)

    # On the MLX thread.

    def serve(
        self,
        model: Any,
        end_token_ids: list[int],
        newline_token_ids: list[int],
        reuse: PrefixReuse,
        prompt_caches: PromptCaches,
        *,
        document_reuse: DocumentReuse,
    ) -> None:
        """Say what to serve; requests are taken from then on.

        Args:
            model: the mlx-lm model.
            end_token_ids: tokens that end an answer.
            newline_token_ids: the tokens of a line break, which XTC spares as it spares those.
            reuse: its use of the prefix cache.
            prompt_caches: makes its prompt caches.
            document_reuse: puts documents in place in its prompts.
        """
        self._model, self._reuse, self._caches = model, reuse, prompt_caches
        self._document_reuse = document_reuse
        self._batches = DecodingBatches(
            model, end_token_ids, newline_token_ids, prompt_caches, self._settings, announce=self._take_first_token
        )

    def step(self) -> float | None:
        """One step of a prefill, and one of the batch; see `Worker`."""
        self._end_overdue()
        if self._reuse is not None:
            self._reuse.tend()
        self._advance_prefill()
        try:
            self._decode()
        except Exception as exc:  # a batch that fails takes its requests with it, and none of those in line
            logger.exception("a step of the batch failed")
            self._fail_decoding(as_engine_error(exc))
        return self._idle_s()

    def fail(self, error: OMLXError) -> None:
        """End all requests with an error."""
        self._fail_decoding(error)
        requests = list(self._all())
        self._waiting.clear()
        self._reading.clear()
        self._prefilling = None
        for request in requests:
            self._end(request, error)

    def _fail_decoding(self, error: OMLXError) -> None:
        requests = list(self._decoding.values())
        self._decoding.clear()
        self._drop_batches()
        for request in requests:
            self._end(request, error)

    def close(self) -> None:
        """Let go of the model and all of its state; nothing is served any more."""
        self._drop_batches()
        self._model = self._reuse = self._caches = self._batches = self._document_reuse = None

    def _drop_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()

    @property
    def _answers(self) -> DecodingBatches:
        if self._batches is None:
            raise CacheInvariantError("a request came before the model")
        return self._batches

    def _enter_line(self, request: Request) -> None:
        self._waiting.append(request)
        self._line_may_be_overdue = True  # what was cancelled on its way here has been looked for in vain

    @property
    def _prefixes(self) -> PrefixReuse:
        if self._reuse is None:
            raise CacheInvariantError("a request came before the model")
        return self._reuse

    @property
    def _prompt_caches(self) -> PromptCaches:
        if self._caches is None:
            raise CacheInvariantError("a request came before the model")
        return self._caches

    @property
    def _documents(self) -> DocumentReuse:
        if self._document_reuse is None:
            raise CacheInvariantError("a request came before the model")
        return self._document_reuse

    def _under_way(self) -> Iterator[Request]:
        yield from self._decoding.values()
        yield from [self._prefilling] if self._prefilling else []
        yield from self._reading

    def _all(self) -> Iterator[Request]:
        yield from self._under_way()
        yield from self._waiting

    def _idle_s(self) -> float | None:
        """How long there is nothing to do, unless something comes: a request, the end of a read, a cancellation."""
        if self._decoding or self._prefilling or any(map(self._prefixes.is_ready, self._reading)):
            return 0.0
        if self._waiting and len(self._reading) < _READ_AHEAD:
            return 0.0
        next_s = -math.inf if self._line_may_be_overdue else self._next_deadline_s
        return None if next_s == math.inf else max(0.0, next_s - time.perf_counter())

    def _end(self, request: Request, error: OMLXError) -> None:
        """Let go of a request that has left its place, and tell its callers why."""
        if self._reuse is not None:
            self._reuse.leave(request)
        if request.is_in_line:
            request.is_in_line = False
            self.occupancy.leave_line(len(request.samples))
        self.occupancy.leave(len(request.samples))
        for sample in request.samples:
            sample.emit(error)

    def _end_overdue(self) -> None:
        """Drop what was cancelled or has run out of time, wherever it is."""
        now_s = time.perf_counter()
        searches_line = self._line_may_be_overdue or now_s >= self._next_deadline_s
        if searches_line:
            self._line_may_be_overdue = False  # first: what is cancelled during the search is found by the next one
        overdue = {each for each in (self._all() if searches_line else self._under_way()) if each.is_overdue(now_s)}
        if not (overdue or searches_line):
            return
        if self._prefilling in overdue:
            request, self._prefilling = self._prefilling, None
            self._end(request, request.why_overdue("during its prefill"))
        ended = [(request, "while its blocks were read") for request in self._reading if request in overdue]
        if searches_line:
            ended += [(request, "while it waited in line") for request in self._waiting if request in overdue]
            self._waiting = deque(request for request in self._waiting if request not in overdue)
        self._reading = [request for request in self._reading if request not in overdue]
        for request, when in ended:
            self._end(request, request.why_overdue(when))
        for uid, request in [item for item in self._decoding.items() if item[1] in overdue]:
            self._remove_from_batch(uid)
            self._end(request, request.why_overdue("while it was answered"))
        if searches_line:
            deadlines_s = (request.deadline_s for request in self._all() if request.deadline_s is not None)
            self._next_deadline_s = min(deadlines_s, default=math.inf)

    # Prefill.

    def _advance_prefill(self) -> None:
        """Compute a step's tokens of the next prompts: short ones share a step, and join together."""
        has_streams = bool(self._decoding)
        step_size = self._settings.prefill_step_size
        if not has_streams and self._is_on_gpu:
            step_size = max(step_size, _LONE_STEP_TOKENS)
        num_computed = 0
        while True:
            self._read_ahead()
            if self._prefilling is None:
                self._prefilling = self._next_ready()
            request = self._prefilling
            if request is None:
                return
            try:
                is_first = request.prompt_cache is None
                if is_first and not self._begin(request):
                    continue
                if self._documents.advance(request, step_size):
                    return
                step = self._next_step(request, step_size)
                if num_computed and num_computed + len(step) > step_size:
                    return
                self._prefill_step(request, step)
                num_computed += len(step)
            except Exception as exc:  # one bad request must not end the others
                self._prefilling = None
                self._end(request, as_engine_error(exc))
                continue
            num_restored = request.cached_tokens_hot + request.cached_tokens_cold if is_first else 0
            if num_restored and has_streams:
                return  # restoring takes time too, and those who wait for tokens wait for no more than one

    def _read_ahead(self) -> None:
        """Match the next in line, so that their blocks are read while others compute."""
        while self._waiting and len(self._reading) < _READ_AHEAD:
            request = self._waiting.popleft()
            try:
                self._prefixes.match(request)
            except Exception as exc:
                self._end(request, as_engine_error(exc))
            else:
                self._reading.append(request)

    def _next_ready(self) -> Request | None:
        """The first whose blocks are there, once the batch has room for it."""
        for request in self._reading:
            if self._prefixes.is_ready(request):
                if len(self._decoding) + len(request.samples) > self._settings.max_batch_size:
                    return None
                self._reading.remove(request)
                return request
        return None

    def _begin(self, request: Request) -> bool:
        """Restore what is cached of a prompt; False if more of it is to be read first."""
        if self._prefixes.begin(request):
            return True
        self._reading.insert(0, request)  # it was matched anew
        self._prefilling = None
        return False

    def _next_step(self, request: Request, step_size: int) -> list[int]:
        """The tokens to compute next; the last is left to the batch, whose first step gives the first logits."""
        end = len(request.prompt_ids) - 1
        stop = min(request.num_computed + step_size, end)
        if end - stop == 1:
            stop = end  # a single token takes another path through some layers, and rounds otherwise
        stop = min(self._prompt_caches.end_of_step(request.num_computed, stop), end)
        stop = self._documents.end_of_step(request, stop)
        # A recurrent state can only be had where the computation stops.
        stop = min([stop, *(at for at in request.checkpoints_at if at > request.num_computed)])
        return request.prompt_ids[request.num_computed : stop]

    def _prefill_step(self, request: Request, step: list[int]) -> None:
        """Take a request one step further, and into the batch once its prompt is computed."""
        if step:
            self._compute(request, step)
        request.report_prefill()
        if request.num_computed == len(request.prompt_ids) - 1:
            self._prefilling = None
            self._prefixes.prefilled(request)
            if request.ends_with_prompt:
                self._end_with_prompt(request)
            else:
                self._join_batch(request)

    def _compute(self, request: Request, token_ids: list[int]) -> None:
        prompt_cache = request.prompt_cache or []
        with mx.stream(generation_stream):
            while len(request.steps_under_way) > self._num_steps_ahead:
                mx.eval(request.steps_under_way.popleft())
                if not self._num_steps_ahead:
                    mx.clear_cache()
            self._prompt_caches.prepare_step(prompt_cache)
            self._model(mx.array(token_ids)[None], cache=prompt_cache)
            if not request.num_computed:
                self._prompt_caches.reserve(prompt_cache, request.capacity_tokens)
            states = [layer.state for layer in prompt_cache]
            end = when_filled(states)
            mx.async_eval(states, end)
            request.steps_under_way.append(end)
        request.num_computed += len(token_ids)
        self._prefixes.computed(request, token_ids)

    def _end_with_prompt(self, request: Request) -> None:
        mx.clear_cache()
        self._prefixes.leave(request)
        request.is_in_line = False
        self.occupancy.leave_line(1)
        self.occupancy.leave()
        request.emit_result("length")

    def _join_batch(self, request: Request) -> None:
        """Begin to decode a request, and its further samples, each on a copy-on-write fork of its blocks."""
        uids = self._answers.add(request)
        samples = request.samples
        self._prefixes.fork(request)
        request.prompt_cache, request.samples = None, [request]
        for sample in samples:
            sample.is_in_line = False
        self.occupancy.leave_line(len(samples))
        self._decoding.update(zip(uids, samples, strict=True))

    # Decode.

    def _decode(self) -> None:
        if not self._decoding:
            return
        for response in self._answers.step():
            request = self._decoding.get(response.uid)
            if request is not None:
                self._take_token(request, response)

    def _take_first_token(self, response: Response) -> None:
        """Pass on a first token that the batch's cache doesn't hold yet; `_take_token` follows."""
        request = self._decoding.get(response.uid)
        if request is not None:
            self._emit_token(request, response)

    def _take_token(self, request: Request, response: Response) -> None:
        """Account for a token, pass it on, and end the answer if it was the last."""
        # By now the batch's cache holds this token, and with the first one the prompt's last.
        is_first, request.is_answering = not request.is_answering, True
        added = [request.prompt_ids[-1], response.token] if is_first else [response.token]
        self._prefixes.generated(request, added, partial(self._extract, response.uid, response.prompt_cache))
        if not is_first or not request.output.token_ids:
            self._emit_token(request, response)
        if is_first:
            mx.clear_cache()  # of what the last step of the prefill has left, once nobody waits for it
        finish_reason, error = response.finish_reason, request.why_unmet()
        if finish_reason is not None:
            del self._decoding[response.uid]
            self._prefixes.finish(request, response.prompt_cache)
        elif request.output.is_whole or error is not None:
            finish_reason = "stop"
            self._remove_from_batch(response.uid)
        if finish_reason is not None:
            self.occupancy.leave()
            if error is not None:
                request.emit(error)
            else:
                request.emit_result(finish_reason)

    def _emit_token(self, request: Request, response: Response) -> None:
        params, is_first = request.params, not request.output.token_ids
        request.emit_token(
            response.token,
            response.logprobs[response.token].item() if params.logprobs else None,
            top_logprobs(response.logprobs, params.top_logprobs) if params.top_logprobs else None,
            is_end_token=response.finish_reason == "stop",
        )
        if is_first:
            time.sleep(_HAND_OVER_S)

    def _remove_from_batch(self, uid: int) -> None:
        self._prefixes.finish(self._decoding.pop(uid), self._answers.remove(uid))

    def _extract(self, uid: int, final: PromptCache | None) -> PromptCache:
        """A decoding request's prompt cache; `final` if the batch has let go of it."""
        return self._answers.extract(uid) if final is None else final
