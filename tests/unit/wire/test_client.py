"""The client against a real service, worker processes that are killed and stopped, and a scripted worker."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest
from fake_worker import end, request_of, serving, short_dir, start_worker, thread_states
from scripted_worker import scripted, until

from apollo_ipc.errors import ApolloError, ConfigError, Conflict, NotFound, NotReady, UserError
from apollo_ipc.wire import messages as m
from apollo_ipc.wire.client import WorkerClient, call
from apollo_ipc.wire.remote import RemoteError


@pytest.fixture
def directory():
    with short_dir() as directory:
        yield directory


@pytest.fixture
def path(directory):
    return directory / "worker.sock"


@pytest.fixture
def served(directory):
    with serving(directory) as parts:
        yield parts


def test_a_request_is_answered_and_one_client_may_have_many_open(served, path):
    async def main():
        async with WorkerClient(path, "cli") as client:
            replies = await asyncio.gather(
                *(client.request(m.Submit("", request_of(str(i)))) for i in range(40))
            )
            assert len({reply.job.job_id for reply in replies}) == 40
            listed = (await client.request(m.ListJobs("", limit=100))).jobs
            assert {job.job_id for job in listed} == {reply.job.job_id for reply in replies}

    asyncio.run(main())


def test_the_workers_errors_are_raised_as_they_were(served, path):
    async def main():
        async with WorkerClient(path, "cli") as client:
            with pytest.raises(UserError) as bad:
                await client.request(m.Submit("", request_of("bad")))
            assert (bad.value.code, bad.value.field) == ("invalid_example", "examples[0].completion")
            with pytest.raises(RemoteError, match="ZeroDivisionError: a bug in admit") as bug:
                await client.request(m.Submit("", request_of("bug")))
            assert (bug.value.http_status, "in admit" in bug.value.traceback) == (500, True)
            with pytest.raises(NotFound):
                await client.request(m.GetJob("", "job-x"))
            job = (await client.request(m.Submit("", request_of()))).job
            await client.request(m.CancelJob("", job.job_id))
            with pytest.raises(Conflict) as ended:
                await client.request(m.CancelJob("", job.job_id))
            assert ended.value.http_status == 409

    asyncio.run(main())


def test_without_a_worker_a_request_fails_within_a_second_and_says_what_to_start(path):
    async def main():
        async with WorkerClient(path, "cli") as client:
            started = time.monotonic()
            with pytest.raises(NotReady, match="apollo-ipc worker") as caught:
                await client.request(m.GetStatus(""))
            assert time.monotonic() - started < 1.0
            assert caught.value.code == "not_delivered"
            assert not client.is_alive
            assert client.heartbeat_age_s is None

    asyncio.run(main())


def test_call_works_without_an_event_loop(served, path, directory):
    assert call(path, m.GetStatus("")).status.worker_pid == os.getpid()
    with pytest.raises(NotReady):
        call(directory / "nobody.sock", m.GetStatus(""))
    with pytest.raises(ConfigError, match="107"):
        call(directory / ("x" * 100), m.GetStatus(""))


def test_a_message_larger_than_the_limit_is_refused_before_it_is_sent(served, path):
    with pytest.raises(UserError, match="too large"):
        call(path, m.Submit("", request_of("x" * (m.MAX_MESSAGE_BYTES + 1))))
    call(path, m.Submit("", request_of("x" * (m.MAX_MESSAGE_BYTES // 2))))


def test_the_heartbeat_tells_who_is_alive_and_a_new_worker_has_a_new_boot_id(path, directory):
    async def main():
        async with WorkerClient(path, "cli") as client:
            with serving(directory) as (_, board, _):
                await until(lambda: client.is_alive, 1.0)
                assert client.heartbeat.worker_boot_id == board.worker_boot_id
                assert client.heartbeat_age_s < 0.5
            await until(lambda: not client.is_alive, 2.5)
            with serving(directory) as (_, board, _):
                await until(lambda: client.is_alive, 2.5)
                assert client.heartbeat.worker_boot_id == board.worker_boot_id
                assert (await client.request(m.GetStatus(""))).status is not None

    asyncio.run(main())


def test_a_stopped_worker_is_noticed_within_a_second_and_works_again_when_it_goes_on(path, directory):
    child = start_worker(directory)

    async def main():
        async with WorkerClient(path, "router") as client:
            assert (await client.request(m.GetStatus(""))).status.worker_pid == child.pid
            os.kill(child.pid, signal.SIGSTOP)
            # One thread takes the signal and stops the others; until then they may still send an Ack.
            await until(lambda: set(thread_states(child.pid)) == {"T"})
            started = time.monotonic()
            with pytest.raises(NotReady) as caught:
                await client.request(m.GetStatus(""))
            assert time.monotonic() - started < 1.0
            assert caught.value.code == "not_acknowledged"
            await until(lambda: not client.is_alive, 2.0)
            os.kill(child.pid, signal.SIGCONT)
            await until(lambda: client.is_alive, 2.0)
            assert (await client.request(m.GetStatus(""))).status.worker_pid == child.pid

    try:
        asyncio.run(main())
    finally:
        end(child)


def test_a_request_whose_worker_dies_after_the_ack_does_not_wait_for_its_timeout(path):
    async def main():
        async with WorkerClient(path, "cli") as client, scripted(path) as worker:
            asking = asyncio.create_task(client.request(m.GetStatus("r"), timeout_s=60))
            await until(lambda: worker.kinds(m.GetStatus))
            await worker.beat(boot_id="boot-1")
            await worker.send(m.Ack("r"))
            await asyncio.sleep(0.3)
            await worker.beat(boot_id="boot-2")
            started = time.monotonic()
            with pytest.raises(NotReady) as caught:
                await asking
            assert caught.value.code == "worker_lost"
            assert time.monotonic() - started < 1.0

    asyncio.run(main())


def test_garbage_from_the_worker_is_dropped_and_strange_replies_are_ignored(path):
    async def main():
        async with WorkerClient(path, "cli") as client, scripted(path) as worker:
            asking = asyncio.create_task(client.request(m.ListJobs("r")))
            await until(lambda: worker.kinds(m.ListJobs))
            for data in (b"", b"\x91" * 100_000, m.Reply("nobody"), m.Ack("nobody"), m.Ack("r")):
                await worker.send(data)
            await worker.send(m.Reply("r", jobs=[]))
            await worker.send(m.Reply("r", jobs=[]))  # twice
            assert (await asking).jobs == []
            assert client.num_bad_messages == 2

    asyncio.run(main())


def test_a_worker_that_refuses_the_protocol_version_is_quoted(path):
    async def main():
        async with WorkerClient(path, "cli") as client, scripted(path) as worker:
            await until(lambda: worker.kinds(m.Hello))
            error = m.ErrorInfo("NotReady", "protocol version 1, the client 2", "protocol_mismatch", 503)
            await worker.send(m.Reply("", error=error))
            with pytest.raises(NotReady, match="protocol version 1") as caught:
                await client.request(m.GetStatus(""))
            assert caught.value.code == "protocol_mismatch"
            with pytest.raises(NotReady, match="protocol version 1"):
                await anext(client.watch("job-1"))

    asyncio.run(main())


def test_two_clients_of_one_process_and_repeated_opening_leave_nothing_behind(served, path):
    async def main():
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            async with WorkerClient(path, "cli") as one, WorkerClient(path, "router") as two:
                await asyncio.gather(one.request(m.GetStatus("")), two.request(m.GetStatus("")))
        await asyncio.sleep(0.3)
        assert len(os.listdir("/proc/self/fd")) <= before + 2

    asyncio.run(main())


def test_importing_the_client_imports_no_torch():
    code = "import sys, apollo_ipc.wire.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_error_keeps_its_class_code_field_and_status_across_the_wire():
    from apollo_ipc.errors import AttachError
    from apollo_ipc.wire.remote import error_from, error_info

    sent = AttachError("no", refused=["a"], field="f")
    back = error_from(error_info(sent))
    assert (type(back), back.code, back.field, back.http_status) == (AttachError, sent.code, "f", 503)
    strange = error_from(m.ErrorInfo("nearest", "a function's name is no class", "c", 418))
    assert (type(strange), strange.code, strange.http_status) == (RemoteError, "c", 418)
    assert isinstance(strange, ApolloError)
