"""Has vLLM drop, once a weight version, what it computed with older weights: one router is asked to do it.

All API servers of a vLLM share its one engine, so one drop is enough for all of them, and more would preempt
its running requests for nothing. Who drops is decided here: a router never drops by itself. A version that no
router has confirmed, whatever the reason (none was there, its DropCache was lost, the drop failed), is asked
for again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress

from apollo_ipc.wire.messages import CacheDropped, DropCache
from apollo_worker.front.peers import Peers
from apollo_worker.link.status_board import StatusBoard

logger = logging.getLogger(__name__)

LOOK_S = 0.1
RETRY_S = 1.0  # after an attempt that nobody confirmed
CONFIRM_S = 5.0  # all routers together; what one confirms later counts too
PATIENCE_S = 121.0  # more, with a router that waits for a long prompt (its cache.py has 120)


class Publisher:
    """send: whether that router took the message. distance_s: between two attempts, at least. Only the
    server's loop calls this."""

    def __init__(
        self,
        board: StatusBoard,
        peers: Peers,
        send: Callable[[bytes, DropCache], bool],
        distance_s: float,
    ):
        self._board, self._peers, self._send = board, peers, send
        self._distance_s, self._asked_at = distance_s, -math.inf
        # (boot of vLLM, version) of the newest drop that a router has confirmed.
        self._dropped: tuple[str | None, int] = (None, 0)
        self._asking = asyncio.Lock()
        # Router -> the version awaited, and whether it waits itself.
        self._confirming: dict[bytes, tuple[int, asyncio.Future[bool]]] = {}

    async def publish(self, weight_version: int, timeout_s: float) -> bool:
        """Whether a router has confirmed. False where none is there (at once) or none confirmed in
        `timeout_s`, to which the distance to the drop before and a router's wait for a long prompt come."""
        if not self._peers.routers(self._board.state.vllm_boot_id, time.monotonic()):
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._distance_s + timeout_s) as limit, self._asking:
                await asyncio.sleep(self._asked_at + self._distance_s - time.monotonic())
                deadline = time.monotonic() + timeout_s
                routers = self._peers.routers(self._board.state.vllm_boot_id, time.monotonic())
                for i, identity in enumerate(routers):
                    if self._is_dropped(weight_version):
                        break
                    # Equal shares of what is left, so that one which hangs leaves time for the next one.
                    share_s = (deadline - time.monotonic()) / (len(routers) - i)
                    if await self._ask(identity, weight_version, share_s):
                        limit.reschedule(asyncio.get_running_loop().time() + PATIENCE_S)
                        await self._wait(identity, weight_version, PATIENCE_S)
                        deadline += PATIENCE_S
        return self._is_dropped(weight_version)

    async def keep_up(self) -> None:
        """One look: whether the served version still has to be published."""
        shown = self._board.state
        has_router = bool(self._peers.routers(shown.vllm_boot_id, time.monotonic()))
        if not shown.attached or not has_router or self._is_dropped(shown.weight_version):
            await asyncio.sleep(LOOK_S)
        elif not await self.publish(shown.weight_version, CONFIRM_S):
            await asyncio.sleep(RETRY_S)

    def on_cache_dropped(self, identity: bytes, message: CacheDropped) -> None:
        if not message.ok and not message.is_waiting:
            logger.warning("a router could not drop its cache: %s", message.error)
        boot_id = self._board.state.vllm_boot_id
        # Also where nobody waits for it any more.
        if message.ok and identity in self._peers.routers(boot_id, time.monotonic()):
            before = self._dropped[1] if self._dropped[0] == boot_id else 0
            self._dropped = boot_id, max(before, message.weight_version)
        if identity in self._confirming:
            version, is_waiting = self._confirming[identity]
            if message.weight_version >= version and not is_waiting.done():
                is_waiting.set_result(message.is_waiting)

    def _is_dropped(self, weight_version: int) -> bool:
        boot_id, version = self._dropped
        return weight_version <= (version if boot_id == self._board.state.vllm_boot_id else 0)

    async def _ask(self, identity: bytes, weight_version: int, timeout_s: float) -> bool:
        """Whether it has said that it waits itself: its answer is still to come."""
        self._asked_at = time.monotonic()
        if not self._send(identity, DropCache(weight_version)):
            return False
        return await self._wait(identity, weight_version, timeout_s)

    async def _wait(self, identity: bytes, weight_version: int, timeout_s: float) -> bool:
        is_waiting: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._confirming[identity] = weight_version, is_waiting
        try:
            await asyncio.wait({is_waiting}, timeout=timeout_s)
            return is_waiting.done() and is_waiting.result()
        finally:
            del self._confirming[identity]
