"""What an open page hears: the worker's heartbeat, and the job that it trains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from anyio import CancelScope

from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.wire.client import WorkerClient
from apollo_ipc.wire.replies import JobInfo
from apollo_router.events import HEARTBEAT_S, encode_event
from apollo_router.gateway import Gateway

LOOK_S = 0.1


async def page_stream(gateway: Gateway, ends_at: float | None) -> AsyncIterator[bytes]:
    """At most ten `beat` and ten `job` events a second, each only where it differs from the last.

    Ends with the session at `ends_at` (seconds since the epoch), and with the server.
    """
    follower, shown, told_at = JobFollower(gateway.client), None, time.monotonic()
    try:
        while ends_at is None or time.time() < ends_at:
            beat = _beat(gateway.client)
            pieces = [encode_event("beat", beat)] if beat != shown else []
            follower.follow(beat["progress"]["job_id"] if beat["is_up"] else None)
            pieces += [encode_event(name, job) for name, job in follower.take()]
            shown = beat
            if not pieces and time.monotonic() - told_at > HEARTBEAT_S:
                pieces = [b": waiting\n\n"]
            if pieces:
                yield b"".join(pieces)
                told_at = time.monotonic()
            await gateway.until_gone(asyncio.sleep(LOOK_S))
    except NotReady:
        return  # the server stops: the page asks again until it is back
    finally:
        await follower.close()


def _beat(client: WorkerClient) -> dict[str, Any]:
    beat = client.heartbeat
    if not client.is_alive or beat is None:
        return {"is_up": False, "attached": False, "weight_version": None, "progress": None}
    progress = {
        name: getattr(beat.progress, name)
        for name in ("activity", "job_id", "steps_done", "num_steps", "loss")
    }
    return {
        "is_up": True,
        "attached": beat.attached,
        "weight_version": beat.weight_version,
        "progress": progress,
    }


class JobFollower:
    """Follows one job after another; of each only the newest state counts, and its end."""

    def __init__(self, client: WorkerClient):
        self._client = client
        self._job_id: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()  # of jobs before: their ends are on the way
        self._news: dict[str, tuple[str, JobInfo]] = {}

    def follow(self, job_id: str | None) -> None:
        if job_id is None or job_id == self._job_id:
            return
        if self._task is not None and not self._task.done():
            self._ending.add(self._task)
            self._task.add_done_callback(self._ending.discard)
        self._job_id = job_id
        self._task = asyncio.create_task(self._watch(job_id))

    def take(self) -> list[tuple[str, JobInfo]]:
        news, self._news = [*self._news.values()], {}
        return news

    async def _watch(self, job_id: str) -> None:
        try:
            async with aclosing(self._client.watch(job_id)) as jobs:
                async for job, ended in jobs:
                    self._news[job_id] = ("end" if ended else "job", job)
        except ApolloError:
            if self._job_id == job_id:
                self._job_id = None  # asked again with the next beat

    async def close(self) -> None:
        tasks = [*self._ending, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        with CancelScope(shield=True):  # see apollo_router.events
            await asyncio.gather(*tasks, return_exceptions=True)
