"""The worker's socket: raw sockets against the real service."""

from __future__ import annotations

import os
import pickle
import signal
import socket as unix
import subprocess
import sys
import threading
import time

import msgspec
import pytest
from apollo_worker.front.endpoint import Endpoint
from fake_worker import end, request_of, serving, start_service, start_worker
from planned import text_of
from raw_peer import Peer

from apollo_ipc.errors import AlreadyRunning, ConfigError
from apollo_ipc.wire import messages as m


def test_a_submitted_job_is_in_the_queue_when_the_reply_comes_and_wakes_the_trainer(served, peer):
    _, board, queue = served
    reply = peer.ask(m.Submit("r1", request_of(num=3), "key"))
    assert queue.get(reply.job.job_id) == reply.job
    assert (reply.job.state, reply.job.num_steps, reply.job.notes) == ("queued", 3, ["admitted"])
    assert board.wake.is_set()
    assert peer.ask(m.Submit("r2", request_of(num=3), "key")).job == reply.job
    conflict = peer.ask(m.Submit("r3", request_of(num=2), "key")).error
    assert (conflict.type, conflict.http_status) == ("Conflict", 422)


def test_every_question_gets_its_answer(served, peer, directory):
    _, board, _ = served
    job = peer.ask(m.Submit("1", request_of())).job
    assert peer.ask(m.GetJob("2", job.job_id)).job.loss_history == []
    assert [one.job_id for one in peer.ask(m.ListJobs("3")).jobs] == [job.job_id]
    assert peer.ask(m.GetJob("4", "job-x")).error.http_status == 404
    board.wake.clear()
    assert peer.ask(m.CancelJob("5", job.job_id)).job.state == "cancelled"
    assert board.wake.is_set()
    assert peer.ask(m.CancelJob("6", job.job_id)).error.http_status == 409
    peer.hello()
    status = peer.ask(m.GetStatus("7")).status
    assert (status.worker_pid, status.num_queued, status.num_routers) == (os.getpid(), 0, 1)
    assert status.worker_boot_id == board.worker_boot_id

    peer.send(m.SyncCheckpoint("8"))
    future = board.asked.get(timeout=2).done
    future.set_result(m.SyncResult(3, 1.0, 1, 1, 1, 10, 10, 0.1))
    assert peer.receive(m.Reply).sync.weight_version == 3


def test_a_users_mistake_and_a_bug_cross_the_wire_with_what_is_needed(peer):
    mistake = peer.ask(m.Submit("1", request_of("bad"))).error
    assert (mistake.type, mistake.code, mistake.field) == (
        "UserError",
        "invalid_example",
        "examples[0].completion",
    )
    assert mistake.traceback is None
    bug = peer.ask(m.Submit("2", request_of("bug"))).error
    assert (bug.type, bug.message, bug.http_status) == ("ZeroDivisionError", "a bug in admit", 500)
    assert "in admit" in bug.traceback
    assert peer.ask(m.GetStatus("3")).status is not None


def test_the_ack_comes_within_800_ms_while_admitting_takes_2_s_and_order_is_kept(served, peer):
    _, _, queue = served
    for name, text in (("a", "slow"), ("b", "fast")):
        started = time.monotonic()
        peer.send(m.Submit(name, request_of(text)))
        assert peer.receive(m.Ack).request_id == name
        assert time.monotonic() - started < m.ACK_TIMEOUT_S
    peer.send(m.GetStatus("c"))  # is not behind the slow one
    assert [peer.receive(m.Reply, timeout_s=5).request_id for _ in range(3)] == ["c", "a", "b"]
    assert [text_of(queue.take())] == ["slow"]


GARBAGE = [
    b"",
    b"\x00" * 100,
    b"GET / HTTP/1.1\r\n\r\n",
    pickle.dumps({"type": "GetStatus", "request_id": "x"}),
    b"\x91" * 1_000_000,  # arrays in arrays
    b"\x82\xa4type\xa6Submit\xa7request" + b"\x81\xa1a" * 500_000,
    b"\xdd\xff\xff\xff\xff",  # claims four thousand million elements
    b"\xc6\xff\xff\xff\xff",  # claims 4 GB
    msgspec.msgpack.encode({"type": "Reboot", "request_id": "x"}),
    msgspec.msgpack.encode({"type": "GetJob", "request_id": 3}),
    msgspec.msgpack.encode({"type": "Submit", "request_id": "x", "request": {"examples": []}}),
    m.encode(m.Heartbeat(1, "x", None, True, 1, m.Progress("x", 1))),
]


def test_bytes_that_are_no_message_are_dropped_and_counted_and_the_next_one_is_answered(served, peer):
    for data in GARBAGE:
        peer.send(data)
    peer.socket.send_multipart([b"two", b"frames"])
    status = peer.ask(m.GetStatus("1")).status
    assert status.num_bad_messages == len(GARBAGE) + 1


def test_a_raw_unix_connection_that_speaks_no_zmtp_does_no_harm(served, peer, directory):
    for data in (b"\xff" * 1000, b"", b"hello\n"):
        with unix.socket(unix.AF_UNIX) as raw:
            raw.connect(str(directory / "worker.sock"))
            raw.sendall(data)
    assert peer.ask(m.GetStatus("1")).status is not None


def test_an_oversize_message_costs_its_sender_the_connection_and_nobody_else_anything(
    served, peer, directory
):
    assert peer.ask(m.GetStatus("1")).status is not None
    with Peer(directory) as rude:
        rude.send(b"x" * (m.MAX_MESSAGE_BYTES + 1))
        assert peer.ask(m.GetStatus("2")).status.num_bad_messages == 0
        time.sleep(0.3)  # libzmq reconnects
        assert rude.ask(m.GetStatus("3")).status is not None


def test_heartbeats_go_to_those_who_said_hello_and_carry_boot_ids_and_progress(served, peer, directory):
    _, board, _ = served
    assert peer.receive(m.Heartbeat, timeout_s=0.6) is None
    peer.hello()
    first = peer.receive(m.Heartbeat, timeout_s=0.2)  # at once
    assert (first.worker_boot_id, first.vllm_boot_id) == (board.worker_boot_id, None)
    board.state.vllm_boot_id, board.state.attached, board.state.weight_version = "vllm-1", True, 7
    board.show("training", job_id="job-1", steps_done=2, num_steps=3)
    beats, deadline = [], time.monotonic() + 1.5
    while time.monotonic() < deadline:
        beats += filter(None, [peer.receive(m.Heartbeat, timeout_s=0.5)])
    assert 4 <= len(beats) <= 8  # every 250 ms
    last = beats[-1]
    assert (last.vllm_boot_id, last.attached, last.weight_version) == ("vllm-1", True, 7)
    assert (last.progress.activity, last.progress.activity_count) == ("training", 1)


def test_a_client_of_another_protocol_version_is_told_both_versions_and_gets_no_heartbeat(peer):
    peer.hello(protocol=99)
    refusal = peer.receive(m.Reply)
    assert refusal.request_id == ""
    assert refusal.error.code == "protocol_mismatch"
    assert f"version {m.PROTOCOL_VERSION}," in refusal.error.message
    assert "99" in refusal.error.message
    assert peer.receive(m.Heartbeat, timeout_s=0.6) is None
    assert peer.ask(m.GetStatus("1")).error.code == "protocol_mismatch"


def test_a_silent_client_is_forgotten_and_a_new_hello_brings_it_back(served, peer, monkeypatch):
    monkeypatch.setattr("apollo_worker.front.peers.PEER_TIMEOUT_S", 0.5)
    peer.hello()
    time.sleep(1.0)
    while peer.receive(m.Heartbeat, timeout_s=0.1):
        pass
    assert peer.receive(m.Heartbeat, timeout_s=0.6) is None
    assert peer.ask(m.GetStatus("1")).status.num_routers == 0
    peer.hello()
    assert peer.receive(m.Heartbeat) is not None


def test_a_second_worker_is_refused_by_pid_and_the_first_goes_on(served, peer, directory):
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
        start_service(directory)
    assert peer.ask(m.GetStatus("1")).status is not None
    with Peer(directory) as late:
        assert late.ask(m.GetStatus("1")).status is not None


def test_the_socket_file_of_a_killed_worker_is_no_obstacle(directory):
    child = start_worker(directory)
    end(child, signal.SIGKILL)
    assert (directory / "worker.sock").exists()
    with serving(directory), Peer(directory) as peer:
        assert peer.ask(m.GetStatus("1")).status.worker_pid == os.getpid()


def test_socket_lock_and_directory_are_private_and_a_long_path_is_explained(served, directory):
    assert directory.stat().st_mode & 0o777 == 0o700
    for name in ("worker.sock", "worker.lock"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600
    long = directory / ("x" * 100)
    with pytest.raises(ConfigError, match="107"):
        Endpoint(long, long / "worker.sock").lock()


FOREIGN = """
import os, sys, zmq
os.setuid(int(sys.argv[3]))
context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.setsockopt(zmq.LINGER, 0)
socket.connect("ipc://" + sys.argv[1])
socket.send(bytes.fromhex(sys.argv[2]))
print("answered" if socket.poll(1000) else "silence")
"""


def test_another_users_process_is_not_heard_even_where_the_directory_lets_it_in(served, peer, directory):
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    directory.chmod(0o755)
    (directory / "worker.sock").chmod(0o777)
    for uid, outcome in ((os.getuid(), "answered"), (65534, "silence")):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                FOREIGN,
                str(directory / "worker.sock"),
                m.encode(m.GetStatus("1")).hex(),
                str(uid),
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stdout == f"{outcome}\n", done.stderr
    assert peer.ask(m.GetStatus("1")).status.num_bad_messages == 0


def test_a_client_that_does_not_read_holds_nobody_up(served, peer, directory):
    _, _, queue = served
    job = peer.ask(m.Submit("1", request_of("x" * 100_000))).job
    queue.take()
    with Peer(directory) as lazy:
        lazy.hello()
        for i in range(400):  # more replies than its queue holds
            lazy.send(m.ListJobs(f"l{i}"))
        peer.hello()
        assert peer.ask(m.GetJob("2", job.job_id)).job.state == "running"
        assert peer.receive(m.Heartbeat)


def test_stopping_answers_open_requests_and_frees_the_directory(directory):
    service, board, queue = start_service(directory)
    with Peer(directory) as peer:
        peer.send(m.SyncCheckpoint("s"))
        assert peer.receive(m.Ack)
        # Beside it, as a client reads: libzmq drops what lies unread when an IMMEDIATE connection closes.
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        assert peer.receive(m.Reply).error.code == "stopping"
        stopping.join(timeout=5)
        board.asked.get(timeout=1).done.set_result(None)  # the main loop's answer harms nothing
    assert service.publish(1) is False
    service.stop()
    queue.close()
    with serving(directory):
        pass
