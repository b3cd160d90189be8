"""A client that follows a job: to its end, across a killed worker, and when it is left early."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from fake_worker import end, request_of, short_dir, start_worker
from scripted_worker import scripted, until

from apollo_ipc.errors import NotFound, NotReady
from apollo_ipc.wire import messages as m
from apollo_ipc.wire.client import WorkerClient


@pytest.fixture
def directory():
    with short_dir() as directory:
        yield directory


@pytest.fixture
def path(directory):
    return directory / "worker.sock"


async def follow(client, job_id, **options):
    return [(job, ended) async for job, ended in client.watch(job_id, **options)]


def test_a_watch_yields_until_the_end_and_ends_with_the_history(path, directory):
    child = start_worker(directory, step_s=0.05)

    async def main():
        async with WorkerClient(path, "cli") as client:
            job = (await client.request(m.Submit("", request_of(num=10)))).job
            seen = await follow(client, job.job_id)
            assert [ended for _, ended in seen] == [False] * (len(seen) - 1) + [True]
            assert len(seen) >= 3
            last = seen[-1][0]
            assert (last.state, last.steps_done, len(last.loss_history)) == ("applied", 10, 10)
            with pytest.raises(NotFound):
                await follow(client, "job-x")

    try:
        asyncio.run(main())
    finally:
        end(child, signal.SIGTERM)


def test_a_watch_survives_a_worker_that_is_killed_and_started_again(path, directory):
    children = [start_worker(directory, step_s=0.1)]

    async def main():
        async with WorkerClient(path, "cli") as client:
            job = (await client.request(m.Submit("", request_of(num=12)))).job
            steps, ended = [], False
            async for now, ended in client.watch(job.job_id):
                steps.append(now.steps_done)
                assert ended == (now.state == "applied")
                if now.steps_done >= 4 and len(children) == 1:
                    end(children[0], signal.SIGKILL)
                    children.append(await asyncio.to_thread(start_worker, directory, 0.1))
            assert ended
            assert (now.state, len(now.loss_history)) == ("applied", 12)
            assert steps == sorted(steps)  # resumed after its last finished step

    try:
        asyncio.run(main())
    finally:
        for child in children:
            end(child)


def test_a_watch_of_a_silent_worker_gives_up_after_the_time_it_was_given(path):
    async def main():
        async with WorkerClient(path, "cli") as client:
            started = time.monotonic()
            with pytest.raises(NotReady, match="nothing heard"):
                await follow(client, "job-1", silence_s=0.5)
            assert time.monotonic() - started < 1.5

    asyncio.run(main())


def test_a_watch_that_is_left_early_is_ended_at_the_worker(path):
    async def main():
        async with WorkerClient(path, "cli") as client, scripted(path) as worker:
            watching = client.watch("job-1")
            first = asyncio.ensure_future(anext(watching))
            await until(lambda: worker.kinds(m.Watch))
            request_id = worker.kinds(m.Watch)[0].request_id
            job = m.JobInfo("job-1", 1, "running", 0.0, 1, 1)
            await worker.send(m.JobEvent(request_id, job, False))
            assert await first == (job, False)
            await watching.aclose()
            await until(lambda: worker.kinds(m.Unwatch) == [m.Unwatch(request_id)])

    asyncio.run(main())
