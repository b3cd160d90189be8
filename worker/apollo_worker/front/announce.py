"""The front's webhooks: jobs that have ended go to the outbox, and the outbox out, in a thread of its own.

What is told of jobs is read from the queue's file, never from memory: a front that is killed between a job's
end and the outbox finds it there at its next start.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from contextlib import suppress
from typing import Any

import msgspec

from apollo_ipc.config import Config
from apollo_ipc.keys import webhook_secret
from apollo_ipc.webhooks.outbox import KEEP_S, Event, Outbox, event, outbox_path
from apollo_ipc.webhooks.sender import Sender, key_of, new_client
from apollo_ipc.wire.replies import JobInfo
from apollo_worker.jobs.endings import Ending, endings
from apollo_worker.jobs.queue import JobQueue

log = logging.getLogger(__name__)
LOOK_S = 0.5
TIDY_S = 3600.0
_TYPES = {
    "applied": "job.done",
    "durable": "job.done",
    "failed": "job.failed",
    "quarantined": "job.quarantined",
}


class Announcer:
    """`start` and `stop` from any thread. Without URLs it does nothing. Raises ConfigError (the secret)."""

    def __init__(self, config: Config, queue: JobQueue):
        self._config, self._queue = config, queue
        self._key = key_of(webhook_secret(config)) if config.webhooks.urls else b""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        if self._config.webhooks.urls:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name="apollo-webhooks", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """What was not sent is sent after the next start."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join()

    def _run(self) -> None:
        assert self._loop is not None
        try:
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._work())
        except Exception:
            # A damaged outbox must not stop training.
            log.exception("webhooks: none are sent any more by this worker")
        finally:
            self._loop.close()

    def _cancel(self) -> None:
        assert self._loop is not None
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    async def _work(self) -> None:
        outbox = Outbox(outbox_path(self._config), self._config.webhooks.urls)
        try:
            async with new_client() as client, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._collect(outbox))
                for url in self._config.webhooks.urls:
                    tasks.create_task(Sender(outbox, url, self._key, client).run())
        finally:
            outbox.close()

    async def _collect(self, outbox: Outbox) -> None:
        collector, tidied_at = Collector(self._queue, outbox), 0.0
        while True:
            try:
                collector.collect()
                if time.monotonic() - tidied_at > TIDY_S:
                    outbox.forget(time.time() - KEEP_S)
                    tidied_at = time.monotonic()
            except Exception:
                log.exception("webhooks: jobs that have ended were not noted; trying again")
            await asyncio.sleep(LOOK_S)


class Collector:
    """Jobs that have ended become events. What had ended before the outbox was made is no news."""

    def __init__(self, queue: JobQueue, outbox: Outbox):
        self._queue, self._outbox = queue, outbox
        self._added: set[Ending] = set()  # by this process: only spares work

    def collect(self) -> None:
        """What has ended since the last look, in one transaction with how far it was read."""
        queue, outbox = self._queue, self._outbox
        with outbox.transaction():
            if (since := outbox.mark("jobs_since")) is None:
                since = time.time()
                outbox.set_mark("jobs_since", since)
            from_seq = int(outbox.mark("jobs_from_seq") or 1)
            ended, next_seq = endings(queue, from_seq)
            seen = {one._replace(state=_TYPES[one.state]) for one in ended if one.ended_at >= since}
            for ending in sorted(seen - self._added):
                job = queue.get(ending.job_id)
                if job.ended_at == ending.ended_at:  # else it is trained anew, and ends anew
                    outbox.add(_event_of(job, ending, queue.queue_id))
            if next_seq != from_seq:
                outbox.set_mark("jobs_from_seq", next_seq)
        self._added = seen


def _event_of(job: JobInfo, ending: Ending, queue_id: int) -> Event:
    """An end has one id, however often it is looked at. state here: the event's type."""
    kind: Any = ending.state
    told = msgspec.structs.asdict(job)
    del told["loss_history"]
    ending_id = f"{queue_id} {job.job_id} {kind} {ending.ended_at}"
    event_id = "evt_" + hashlib.sha256(ending_id.encode()).hexdigest()[:32]
    return event(kind, job.job_id, told, ending.ended_at, event_id)
