"""Gives each fine-tuning job to the worker, once: whatever was lost on the way, whoever asks again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from apollo_ipc.errors import NotFound, NotReady, UserError
from apollo_ipc.wire.messages import GetJob, Submit
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import convert
from apollo_router.fine_tuning.create import CreateJob, at_its_line, train_body
from apollo_router.fine_tuning.store import FineTuningStore, StoredJob, store_path
from apollo_router.gateway import Gateway
from apollo_router.log import logger

# A worker that died is back within this; the SDK itself gives up after two retries, 4 s later.
WORKER_AWAY_S = 30.0
LOOK_S = 0.5
AGAIN_S = 5.0
# With these, nothing was done: all the others may have been done all the same.
REFUSALS = ("not_delivered", "not_ready", "queue_full", "busy")

T = TypeVar("T")


class JobDelivery:
    """The jobs between the store and the worker. Belongs to one event loop."""

    def __init__(self, gateway: Gateway):
        self.gateway = gateway
        self._store: FineTuningStore | None = None
        self._opening = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def store(self) -> FineTuningStore:
        async with self._opening:
            if self._store is None:
                self._store = await asyncio.to_thread(FineTuningStore, store_path(self.gateway.config))
        return self._store

    async def run(self) -> None:
        """For ever: delivers what was admitted while the worker was away."""
        while True:
            await asyncio.sleep(AGAIN_S)
            try:
                store = await self.store()
                for job in await asyncio.to_thread(store.undelivered, WORKER_AWAY_S):
                    await self._deliver_late(job)
            except Exception:
                logger.exception("delivering a fine-tuning job failed; trying again")

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    async def deliver(self, job: StoredJob) -> StoredJob:
        """The job as the worker has accepted it; or as it was, where it is not known whether the worker has.

        Raises UserError where the worker refuses it, NotReady where it surely has not got it: the job is
        forgotten then.
        """
        store, is_unknown, until = await self.store(), False, time.monotonic() + WORKER_AWAY_S
        async with self._lock(job.id):
            job = await asyncio.to_thread(store.job, job.id)  # another request may have delivered it
            while job.worker_job is None and job.error is None:
                try:
                    return await self._submit(store, job)
                except UserError:
                    await asyncio.to_thread(store.forget, job.id)
                    raise
                except NotReady as error:
                    is_unknown |= error.code not in REFUSALS
                    if time.monotonic() < until:
                        await asyncio.sleep(LOOK_S)
                    elif is_unknown:
                        break
                    else:
                        await asyncio.to_thread(store.forget, job.id)
                        raise
        return job

    async def info(self, job: StoredJob) -> JobInfo | None:
        """What the worker says of it, with its losses. Raises NotReady after WORKER_AWAY_S without one."""
        if (job_id := job.worker_job) is None:
            return None
        try:
            reply = await patiently(lambda: self.gateway.client.request(GetJob("", job_id)))
        except NotFound:
            return JobInfo(job_id, 0, "failed", job.created_at, 0, 0, error="the worker's queue was lost")
        return reply.job

    async def _deliver_late(self, job: StoredJob) -> None:
        store = await self.store()
        async with self._lock(job.id):
            job = await asyncio.to_thread(store.job, job.id)
            if job.worker_job is None and job.error is None:
                try:
                    await self._submit(store, job)
                except NotReady:
                    return  # next time
                except UserError as error:  # its client has been told that it is being validated
                    told: dict[str, Any] = {
                        "code": error.code,
                        "message": error.message,
                        "param": error.field,
                    }
                    await asyncio.to_thread(store.settle, job.id, error=told)

    async def _submit(self, store: FineTuningStore, job: StoredJob) -> StoredJob:
        create = convert(job.request, CreateJob)
        config = self.gateway.config
        content = await asyncio.to_thread(store.content, create.training_file, "training_file")
        body = await asyncio.to_thread(train_body, create, content, config.train)
        submit = Submit("", body, job.id)
        try:
            reply = await self.gateway.client.request(submit, timeout_s=config.http.wait_timeout_s)
        except UserError as error:
            raise at_its_line(error, content) from None
        assert reply.job is not None
        return await asyncio.to_thread(store.settle, job.id, worker_job=reply.job.job_id)

    def _lock(self, job_id: str) -> asyncio.Lock:
        return self._locks.setdefault(job_id, asyncio.Lock())


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks until the worker answers, for WORKER_AWAY_S. For what may be asked twice. Raises NotReady."""
    until = time.monotonic() + WORKER_AWAY_S
    while True:
        try:
            return await ask()
        except NotReady:
            if time.monotonic() >= until:
                raise
        await asyncio.sleep(LOOK_S)
