"""What the routes of one API server process share: the key, the ZMQ client, and who this vLLM is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request

from apollo_ipc.config import Config
from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.keys import train_key
from apollo_ipc.wire.client import WorkerClient
from apollo_ipc.wire.messages import GetStatus
from apollo_router import metrics
from apollo_router.cache import CacheDropper
from apollo_router.log import logger
from apollo_router.served import ServedBoot
from apollo_router.spool import Spool
from apollo_router.worker_metrics import WorkerMetrics

TICK_S = 1.0
STATUS_EVERY_S = 2.0

T = TypeVar("T")


class VllmOptions(NamedTuple):
    """What of vLLM's own options matters here; from init_state on."""

    num_api_servers: int = 1
    max_model_len: int = 0
    logprobs_mode: str = "raw_logprobs"


class Gateway:
    """Made by the plugin's factory; opened and closed by the app's lifespan.

    Raises ConfigError where the train key cannot be read or made, or the spool's directory is not ours.
    """

    def __init__(self, config: Config):
        self.config = config
        self.train_key = train_key(config)
        self.cache = CacheDropper()
        self.served = ServedBoot(config.runtime_dir)
        self.worker_metrics = WorkerMetrics(config.runtime_dir)
        traffic = config.traffic
        self.spool = Spool(Path(traffic.directory), traffic.max_bytes) if traffic.directory else None
        self.model_names: list[str] = []  # as clients of vLLM call the model, from init_state on
        self.vllm = VllmOptions()
        self._client: WorkerClient | None = None
        self._stopping = asyncio.Event()

    @property
    def client(self) -> WorkerClient:
        """Raises NotReady before the app has started."""
        if self._client is None:
            raise NotReady("the server is starting or stopping")
        return self._client

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        async with WorkerClient(
            self.config.socket_path, "router", self.cache.want, lambda: self.served.boot_id
        ) as client:
            self._client = client
            if self.spool is not None:
                self.spool.open()
            works = (self._tick(app), self._look_at_worker(), self.cache.run(client.tell))
            tasks = [asyncio.create_task(work) for work in works]
            try:
                yield
            finally:
                self._client = None
                self._stopping.set()
                await _end(*tasks)
                self.worker_metrics.close()
                if self.spool is not None:
                    await asyncio.to_thread(self.spool.close)

    async def until_gone(self, work: Awaitable[T], request: Request | None = None) -> T:
        """`work`'s result. Raises NotReady when the server stops first, ClientDisconnect when the client of
        `request` (whose body has been read) goes first. `work` is cancelled then; the worker's job is not.

        uvicorn waits for open requests before it stops, without a limit: a request that waits for training
        would hold up vLLM's shutdown for as long.
        """
        working = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stopping.wait())
        gone = asyncio.ensure_future(_disconnected(request)) if request else stop
        try:
            await asyncio.wait({working, stop, gone}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if stop.done():
                raise NotReady("the server is stopping; the worker goes on")
            raise ClientDisconnect
        finally:
            await _end(working, stop, gone)

    async def _tick(self, app: FastAPI) -> None:
        while True:
            try:
                await asyncio.to_thread(self.served.refresh)
                self._measure()
                # Set by vLLM's serve_http; should_exit becomes true before it waits for open requests.
                if getattr(getattr(app.state, "server", None), "should_exit", False):
                    self._stopping.set()
            except Exception:
                # One bad look (say, /proc under memory pressure) must not end all later ones.
                logger.exception("looking after the training worker failed; trying again")
            await asyncio.sleep(TICK_S)

    async def _look_at_worker(self) -> None:
        """What only its status says, for metrics."""
        while True:
            await asyncio.sleep(STATUS_EVERY_S)
            try:
                if self.client.is_alive:
                    reply = await self.client.request(GetStatus(""))
                    assert reply.status is not None
                    self.worker_metrics.show(reply.status)
            except ApolloError as error:
                logger.debug("the worker's status is not known: %s", error)
            except Exception:
                logger.exception("the worker's metrics failed; trying again")

    def _measure(self) -> None:
        client = self.client
        metrics.worker_up.set(client.is_alive)
        if client.heartbeat is not None:
            metrics.weight_version.set(client.heartbeat.weight_version)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancels them and waits for their ends: what they use may be closed only then."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone. The body must have been read: nothing else is left to receive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
