"""LangChain's completion model over the engine: text in, text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from omlx_core import GenerationChunk as EngineChunk
from omlx_core import GenerationResult
from omlx_plugins.langchain.language_model import LangChainOMLX
from omlx_plugins.langchain.metadata import response_metadata, usage_metadata

if TYPE_CHECKING:
    from omlx_core import Engine

_MAX_CONCURRENT = 32  # as many as an engine decodes together unless it is told otherwise


class OMLX(LangChainOMLX, BaseLLM):
    """A local model that goes on with a text, for models without a chat template; `ChatOMLX` is for those with one.

    ::

        llm = OMLX(model="path or repo id")
        llm.invoke("Once upon a time")

    The options of a request are those of `ChatOMLX`, but for tools. The prompts of a batch are answered together.

    A generation's ``generation_info`` has ``finish_reason``, ``model_name``, ``model_provider``, ``usage_metadata`` in
    LangChain's shape, and under ``"omlx"`` and ``"logprobs"`` what `ChatOMLX` has there. While streaming, these come
    with the last chunk. Closing a stream early cancels its request.
    """

    @property
    def _llm_type(self) -> str:
        return "omlx-completion"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=self._traced_stop(stop), **kwargs)
        params["ls_provider"] = "omlx"
        return params

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> LLMResult:
        llm, options = self._for_call(stop, kwargs)
        with llm.lease_engine() as engine:
            if len(prompts) == 1:
                results = [engine.generate(prompts[0], **options)]
            else:
                # Each waits on a thread of its own; the engine decodes them in one batch.
                with ThreadPoolExecutor(min(len(prompts), _MAX_CONCURRENT)) as callers:
                    results = list(callers.map(lambda prompt: engine.generate(prompt, **options), prompts))
            return llm._llm_result(engine, results)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain's signature
        **kwargs: Any,
    ) -> LLMResult:
        llm, options = self._for_call(stop, kwargs)
        is_free = asyncio.Semaphore(_MAX_CONCURRENT)

        async def generate(engine: Engine, prompt: str) -> GenerationResult:
            async with is_free:
                return await engine.agenerate(prompt, **options)

        async with llm.alease_engine() as engine:
            tasks = [asyncio.ensure_future(generate(engine, prompt)) for prompt in prompts]
            try:
                return llm._llm_result(engine, await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        llm, options = self._for_call(stop, kwargs)
        with llm.lease_engine() as engine, closing(engine.stream(prompt, **options)) as chunks:
            for chunk in chunks:
                generation = llm._chunk(engine, chunk)
                if generation is not None:
                    if run_manager is not None:
                        run_manager.on_llm_new_token(generation.text, chunk=generation)
                    yield generation

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        llm, options = self._for_call(stop, kwargs)
        async with llm.alease_engine() as engine, aclosing(engine.astream(prompt, **options)) as chunks:
            async for chunk in chunks:
                generation = llm._chunk(engine, chunk)
                if generation is not None:
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(generation.text, chunk=generation)
                    yield generation

    def _for_call(self, stop: list[str] | None, keywords: Mapping[str, Any]) -> tuple[OMLX, dict[str, Any]]:
        """The model that is asked, and the engine's options."""
        llm, given = self._with_model_of(keywords)
        return llm, llm.generation_options(given if stop is None else {**given, "stop": stop})

    def _llm_result(self, engine: Engine, results: Sequence[GenerationResult]) -> LLMResult:
        generations = [
            [Generation(text=result.text, generation_info=self._generation_info(engine, result))] for result in results
        ]
        token_usage = {
            "prompt_tokens": sum(result.usage.prompt_tokens for result in results),
            "completion_tokens": sum(result.usage.completion_tokens for result in results),
            "total_tokens": sum(result.usage.total_tokens for result in results),
        }
        return LLMResult(generations=generations, llm_output={"model_name": self.model, "token_usage": token_usage})

    def _chunk(self, engine: Engine, chunk: EngineChunk) -> GenerationChunk | None:
        """None where it adds nothing."""
        if chunk.result is not None:
            return GenerationChunk(text=chunk.text, generation_info=self._generation_info(engine, chunk.result))
        return GenerationChunk(text=chunk.text) if chunk.text else None

    def _generation_info(self, engine: Engine, result: GenerationResult) -> dict[str, Any]:
        info = response_metadata(engine, self.model, result)
        return {**info, "usage_metadata": usage_metadata(result.usage)}
