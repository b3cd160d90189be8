"""An open loop of streamed completions against vLLM, and what their clients saw. For gpu_loop.py.

Requests are sent at times drawn before, whatever the earlier ones do: a server that slows down gets no rest,
and the time to the first token counts from when a request was due.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from typing import Any

import httpx
import numpy as np

REQUEST_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class LoadSettings:
    """rate: requests a second, with exponential gaps. vocab_size: prompts are ids below it."""

    rate: float
    seconds: float
    prompt_tokens: int
    output_tokens: int
    vocab_size: int


@dataclasses.dataclass
class Request:
    """Times of time.perf_counter(). longest_wait_s: for a next token, or for the first one since it was due.
    error: why it counts as failed."""

    due_at: float
    first_at: float | None = None
    last_at: float | None = None
    num_tokens: int = 0
    sent_late_s: float = 0.0
    longest_wait_s: float = 0.0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.due_at

    @property
    def tpot_s(self) -> float | None:
        if self.first_at is None or self.last_at is None or self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Seconds from the start of a phase: a Poisson process, the same one for the same seed."""
    generator, times, at = random.Random(seed), [], 0.0
    while (at := at + generator.expovariate(rate)) < seconds:
        times.append(at)
    return times


def run_phase(url: str, model: str, settings: LoadSettings, seed: int, prompt_seed: int) -> list[Request]:
    """Sends all requests of one phase and returns when every one has ended.

    seed: of the arrivals; prompt_seed: of the prompts, no two of which may be alike (the prefix cache).
    """
    return asyncio.run(_run_phase(url, model, settings, seed, prompt_seed))


async def _run_phase(
    url: str, model: str, settings: LoadSettings, seed: int, prompt_seed: int
) -> list[Request]:
    prompts = random.Random(prompt_seed)
    no_limit = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=no_limit) as client:
        started = time.perf_counter()
        tasks = []
        for at in arrivals(settings.rate, settings.seconds, seed):
            ids = [prompts.randrange(min(256, settings.vocab_size)) for _ in range(settings.prompt_tokens)]
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, model, ids, settings, started + at)))
        return list(await asyncio.gather(*tasks))


async def _send(
    client: httpx.AsyncClient, model: str, ids: list[int], settings: LoadSettings, due_at: float
) -> Request:
    seen = Request(due_at, sent_late_s=time.perf_counter() - due_at)
    body = {
        "model": model, "prompt": ids, "max_tokens": settings.output_tokens, "ignore_eos": True,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                seen.error = f"{response.status_code}: {(await response.aread())[:300].decode()}"
                return seen
            async for line in response.aiter_lines():
                _read_line(line, seen)
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    if seen.error is None and seen.num_tokens != settings.output_tokens:
        seen.error = f"{seen.num_tokens} tokens came, {settings.output_tokens} were asked for"
    return seen


def _read_line(line: str, seen: Request) -> None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        seen.error = str(event["error"])[:300]
    if event.get("choices"):
        now = time.perf_counter()
        seen.longest_wait_s = max(seen.longest_wait_s, now - (seen.last_at or seen.due_at))
        seen.last_at = now
        seen.first_at = seen.first_at or now
    if usage := event.get("usage"):
        seen.num_tokens = usage["completion_tokens"]


def summary(requests: list[Request]) -> dict[str, Any]:
    """Percentiles over the requests that did not fail; None where there are none."""
    good = [r for r in requests if r.error is None]
    ttft = [r.ttft_s for r in good if r.ttft_s is not None]
    tpot = [r.tpot_s for r in good if r.tpot_s is not None]
    return {
        "num_requests": len(requests),
        "num_failed": len(requests) - len(good),
        "errors": sorted({r.error for r in requests if r.error is not None})[:5],
        "ttft_p50_s": percentile(ttft, 50), "ttft_p99_s": percentile(ttft, 99),
        "tpot_p50_s": percentile(tpot, 50), "tpot_p99_s": percentile(tpot, 99),
        "wait_p99_s": percentile([r.longest_wait_s for r in good], 99),
        "wait_max_s": max((r.longest_wait_s for r in good), default=None),
        "sent_late_max_s": max((r.sent_late_s for r in requests), default=None),
    }  # fmt: skip


def percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
