"""Asking the vLLM around us, in this process: what it samples, and what it gives the tokens of a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from numpy.typing import NDArray
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import Receive, Scope, Send

from apollo_ipc.errors import ApolloError, UserError
from apollo_router.tinker.batch import Datum
from apollo_router.tinker.bodies import Sample, SamplingParams
from apollo_router.tinker.schema import floats, ints, schema

MAX_FORWARDS = 16  # prompts of one forward pass that vLLM has at once

# What a model's generation_config.json may say otherwise.
_PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


class Vllm:
    """vLLM's own /v1/completions without its --api-key: the client has shown the train key.

    has_processed_logprobs: vLLM was started with --logprobs-mode processed_logprobs.
    """

    def __init__(self, app: FastAPI, model: str, max_model_len: int, *, has_processed_logprobs: bool):
        handlers = {k: v for k, v in app.exception_handlers.items() if k not in (500, Exception)}
        # As in fastapi.FastAPI.build_middleware_stack, less what others put around the app.
        inner = ExceptionMiddleware(AsyncExitStackMiddleware(app.router), handlers=handlers)

        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            await inner({**scope, "app": app}, receive, send)

        self.model, self.max_model_len = model, max_model_len
        self._has_processed_logprobs = has_processed_logprobs
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(asgi), base_url="http://vllm", timeout=None
        )
        self._forwards = asyncio.Semaphore(MAX_FORWARDS)

    async def close(self) -> None:
        await self._http.aclose()

    async def sample(self, asked: Sample) -> bytes:
        """A SampleResponse. Raises UserError."""
        prompt, params, pb = asked.prompt.ids(), asked.sampling_params, schema()
        body = {"prompt": prompt, "n": asked.num_samples, "logprobs": 0, **self._wanted(params, len(prompt))}
        if asked.prompt_logprobs:
            body["prompt_logprobs"] = 0
        said = await self._complete(body)
        response = pb.SampleResponse()
        for choice in said["choices"]:
            logprobs = choice["logprobs"]["token_logprobs"] if self._follows(params) else []
            is_stop = choice["finish_reason"] == "stop"
            response.sequences.add(
                stop_reason=pb.STOP_REASON_STOP if is_stop else pb.STOP_REASON_LENGTH,
                tokens=ints(choice["token_ids"]),
                **({"logprobs": floats(logprobs)} if logprobs else {}),
            )
        if asked.prompt_logprobs:
            response.prompt_logprobs = floats(_last(asked, _prompt_logprobs(said, prompt)))
        return response.SerializeToString()

    async def logprobs(self, data: Sequence[Datum]) -> list[NDArray[np.float64]]:
        """log p of each datum's N targets by the weights as they are; 0 where the target is not the next
        token, whose term never counts. Raises UserError."""
        return list(await asyncio.gather(*(self._logprobs(one) for one in data)))

    async def _logprobs(self, one: Datum) -> NDArray[np.float64]:
        plain = self._wanted(SamplingParams(max_tokens=1), len(one.tokens))
        async with self._forwards:
            said = await self._complete({"prompt": one.tokens, "prompt_logprobs": 0, **plain})
        return np.where(one.is_next, _prompt_logprobs(said, one.tokens)[1:], 0.0)

    def _follows(self, params: SamplingParams) -> bool:
        """Whether vLLM's log-probabilities are those that it sampled by."""
        is_plain = (params.temperature, params.top_p) == (1.0, 1.0) and params.top_k in (-1, 0)
        return is_plain or self._has_processed_logprobs

    def _wanted(self, params: SamplingParams, num_prompt_tokens: int) -> dict[str, Any]:
        left = self.max_model_len - num_prompt_tokens
        if left < 1:
            raise UserError(
                f"{num_prompt_tokens} tokens leave none of the model's {self.max_model_len} for an answer"
            )
        stops: list[Any] = [params.stop] if isinstance(params.stop, str) else list(params.stop or [])
        return {
            "model": self.model,
            "max_tokens": left if params.max_tokens is None else params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop": [stop for stop in stops if isinstance(stop, str)],
            "stop_token_ids": [stop for stop in stops if isinstance(stop, int)],
            "ignore_eos": params.stop is not None,  # the stops that are given are all
            "return_token_ids": True,
            **_PLAIN,
        }

    async def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.post("/v1/completions", json=body)
        if answer.status_code == 200:
            return answer.json()
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:500]
        if answer.status_code >= 500:
            raise ApolloError(f"vLLM failed: {message}")
        raise UserError(f"vLLM refuses it: {message}")


def scores(asked: Sample, logprobs: Sequence[float]) -> bytes:
    """A SampleResponse of an empty sequence. logprobs: of each token of the prompt but the first."""
    pb = schema()
    response = pb.SampleResponse(prompt_logprobs=floats(_last(asked, np.asarray([np.nan, *logprobs]))))
    response.sequences.add(stop_reason=pb.STOP_REASON_LENGTH)
    return response.SerializeToString()


def _last(asked: Sample, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Only those that were asked for."""
    if asked.prompt_logprobs_last_n is not None:
        values[: len(values) - asked.prompt_logprobs_last_n] = np.nan
    return values


def _prompt_logprobs(said: dict[str, Any], prompt: Sequence[int]) -> NDArray[np.float64]:
    """(tokens of the prompt,), NaN for the first, which nothing predicts."""
    rows = said["choices"][0]["prompt_logprobs"]
    known = [row[str(token)]["logprob"] for row, token in zip(rows[1:], prompt[1:], strict=True)]
    return np.asarray([np.nan, *known])
