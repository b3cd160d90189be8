"""Dropping what vLLM computed with older weights, when the worker asks for it.

KV blocks in the prefix cache belong to the weights that computed them. Seen on vLLM 0.32: without
`reset_running_requests` the reset clears nothing while any block is in use, so never under load; with it,
running requests are preempted and computed again (vllm/v1/core/sched/scheduler.py, reset_prefix_cache). A
prompt that takes longer than the distance of two drops would never end: each drop waits until what the last
one preempted has got on by a token.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.wire.messages import CacheDropped
from apollo_router import metrics
from apollo_router.log import logger

DROP_TIMEOUT_S = 30.0
PATIENCE_S = 120.0  # with what the drop before preempted
LOOK_S = 0.02


class CacheDropper:
    """Drops this engine's caches on the worker's request; one drop at a time, and the newest version wins."""

    def __init__(self) -> None:
        self._engine_client: Any = None  # vllm.engine.protocol.EngineClient, from init_state on
        self._wanted: int | None = None
        self._needed = asyncio.Event()
        self._preempted: dict[str, int] = {}  # request -> output tokens it had

    def set_engine(self, engine_client: Any) -> None:
        self._engine_client = engine_client

    def want(self, weight_version: int) -> None:
        """`run` drops soon."""
        self._wanted = weight_version
        self._needed.set()

    async def run(self, answer: Callable[[CacheDropped], Any]) -> None:
        """For ever. answer: sends it to the worker, which asks again for what failed or was not answered."""
        while True:
            await self._needed.wait()
            if self._is_behind():
                assert self._wanted is not None
                answer(CacheDropped(self._wanted, ok=False, is_waiting=True))
                await self._let_get_on()
            self._needed.clear()
            version, error = self._wanted, None
            assert version is not None
            try:
                await asyncio.wait_for(self.drop(version), DROP_TIMEOUT_S)
            except Exception as failure:
                metrics.cache_drop_failures.inc()
                logger.warning("could not drop the cache for weights %d: %r", version, failure)
                error = f"{type(failure).__name__}: {failure}"
            if self._wanted == version:  # asked for once more meanwhile: this drop was the answer
                self._needed.clear()
            answer(CacheDropped(version, ok=error is None, error=error))

    async def drop(self, weight_version: int) -> None:
        """When this returns, no request that starts from now on reuses KV of older weights.

        Raises NotReady before vLLM has an engine client, ApolloError where vLLM says that it kept blocks.
        """
        if self._engine_client is None:
            raise NotReady("vLLM has no engine yet")
        running, started = _output_tokens(self._engine_client), time.perf_counter()
        await _drop(self._engine_client)
        self._preempted = running
        duration_s = time.perf_counter() - started
        metrics.cache_drop_seconds.observe(duration_s)
        logger.info("weights %d: prefix cache dropped in %.1f ms", weight_version, duration_s * 1e3)

    def _is_behind(self) -> bool:
        now = _output_tokens(self._engine_client)
        return any(now.get(request) == num for request, num in self._preempted.items())

    async def _let_get_on(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self._is_behind():
            await asyncio.sleep(LOOK_S)


def _output_tokens(engine_client: Any) -> dict[str, int]:
    """Of each request of this API server that may be running: the oldest ones, as many as vLLM runs. None of
    a vLLM that keeps them otherwise than 0.32: it is not waited for them then, and dropped all the same."""
    try:
        most = engine_client.vllm_config.scheduler_config.max_num_seqs
        states = itertools.islice(engine_client.output_processor.request_states.items(), most)
        return {
            request: state.detokenizer.num_output_tokens() if state.detokenizer else 0
            for request, state in states
        }
    except AttributeError:
        return {}


async def _drop(engine_client: Any) -> None:
    config = engine_client.vllm_config
    # KV that a connector keeps elsewhere is as old. Off without one: earlier releases answer False then.
    has_connector = config.kv_transfer_config is not None
    # Without a prefix cache no block outlives its request: preempting the running ones would only cost time.
    if config.cache_config.enable_prefix_caching or has_connector:
        cleared = await engine_client.reset_prefix_cache(
            reset_running_requests=True, reset_connector=has_connector
        )
        if not cleared:
            raise ApolloError("vLLM kept its prefix cache: old KV blocks stay in use", code="cache_kept")
    if engine_client.model_config.is_multimodal_model:
        await engine_client.reset_encoder_cache()
