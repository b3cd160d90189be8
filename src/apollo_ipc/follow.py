"""A router's side of publishing: dropping the prefix cache whenever the weights have changed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from apollo_ipc.wire.messages import CacheDropped, Heartbeat

logger = logging.getLogger(__name__)

DROP_TIMEOUT_S = 30.0
RETRY_S = 1.0  # between a failed drop and the next one that only a heartbeat asks for


class CacheFollower:
    """Drops when a DropCache asks, and when a heartbeat shows newer weights (a DropCache may get lost, and
    only one of several routers is sent one). One drop at a time; the newest version wins.

    drop: returns once no request that starts may reuse KV of older weights; called again after it raised.
    answer: sends a CacheDropped to the worker.
    """

    def __init__(self, drop: Callable[[int], Awaitable[None]] | None, answer: Callable[[CacheDropped], Any]):
        # The version for which the cache was last dropped. None: that was for a worker that is gone; the new
        # one may have restored older weights, so its first heartbeat drops whatever the version.
        self.version: int | None = 0
        self._drop = drop
        self._answer = answer
        self._worker_boot_id: str | None = None
        self._num_restarts = 0
        self._wanted: int | None = None
        self._needed = asyncio.Event()
        self._not_before = 0.0

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        if self._worker_boot_id not in (None, heartbeat.worker_boot_id):
            self._num_restarts += 1
            self.version = None
        self._worker_boot_id = heartbeat.worker_boot_id
        outdated = self.version is None or heartbeat.weight_version > self.version
        if outdated and self._drop and time.monotonic() >= self._not_before:
            self.want(heartbeat.weight_version)

    def want(self, weight_version: int) -> None:
        self._wanted = weight_version
        self._needed.set()

    async def run(self) -> None:
        while True:
            await self._needed.wait()
            self._needed.clear()
            version, num_restarts, error = self._wanted, self._num_restarts, None
            assert version is not None
            if version != self.version:  # else a heartbeat was faster than its DropCache
                error = await self._drop_now(version)
            if error is not None:
                self._not_before = time.monotonic() + RETRY_S
            elif num_restarts == self._num_restarts:
                self.version = version
            self._answer(CacheDropped(version, ok=error is None, error=error))

    async def _drop_now(self, weight_version: int) -> str | None:
        """What went wrong, or None."""
        if self._drop is None:
            return "this client holds no cache"
        try:
            await asyncio.wait_for(self._drop(weight_version), DROP_TIMEOUT_S)
        except Exception as error:  # retried at a later heartbeat or DropCache
            logger.warning("could not drop the cache for weights %d: %r", weight_version, error)
            return f"{type(error).__name__}: {error}"
        return None
