"""Dropping what vLLM computed with older weights.

KV blocks in the prefix cache belong to the weights that computed them. Seen on vLLM 0.32: without
`reset_running_requests` the reset clears nothing while any block is in use, so never under load; with it,
running requests are preempted and computed again (vllm/v1/core/sched/scheduler.py, reset_prefix_cache), and
every one of them finishes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from apollo_ipc.errors import ApolloError, NotReady
from apollo_router import metrics
from apollo_router.log import logger


class CacheDropper:
    """Drops this engine's caches on the worker's request; one drop at a time."""

    def __init__(self) -> None:
        self._engine_client: Any = None  # vllm.engine.protocol.EngineClient, from init_state on
        self._lock = asyncio.Lock()

    def set_engine(self, engine_client: Any) -> None:
        self._engine_client = engine_client

    async def drop(self, weight_version: int) -> None:
        """When this returns, no request that starts from now on reuses KV of older weights.

        Raises NotReady before vLLM has an engine client, ApolloError where vLLM says that it kept blocks.
        """
        engine_client = self._engine_client
        if engine_client is None:
            raise NotReady("vLLM has no engine yet")
        async with self._lock:
            started = time.perf_counter()
            try:
                await _drop(engine_client)
            except BaseException:
                metrics.cache_drop_failures.inc()
                raise
            duration_s = time.perf_counter() - started
        metrics.cache_drop_seconds.observe(duration_s)
        logger.info("weights %d: prefix cache dropped in %.1f ms", weight_version, duration_s * 1e3)


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
