"""The socket pair between front and trainer: whatever arrives or does not, neither end waits or falls."""

from __future__ import annotations

import pickle
import threading
import time

import msgspec
import pytest
from apollo_worker.link import link as link_module
from apollo_worker.link.link import (
    MAX_LINK_BYTES,
    MAX_WAITING,
    Ask,
    FromFront,
    FromTrainer,
    JobChanged,
    Link,
    ModelFacts,
    Publish,
    Refused,
    Start,
    State,
    Stop,
    Wake,
    frame,
    make_pair,
)

from apollo_ipc.config import Config, Worker
from apollo_ipc.wire.messages import SyncCheckpoint
from apollo_ipc.wire.replies import ErrorInfo, Progress, TrainerState


def state_of(activity: str, count: int, **fields) -> State:
    return State(TrainerState(Progress(activity, count), **fields))


@pytest.fixture
def pair():
    ours, its = make_pair()
    front, trainer = Link(ours, FromTrainer), Link(its, FromFront)
    yield front, trainer
    front.close()
    trainer.close()


@pytest.fixture
def raw():
    """(the front's Link, a socket that writes what the test says)."""
    ours, its = make_pair()
    front = Link(ours, FromTrainer)
    yield front, its
    front.close()
    its.close()


def test_messages_arrive_whole_and_in_order_in_both_directions(pair):
    front, trainer = pair
    ask = Ask(1, SyncCheckpoint("", "delta"))
    sent = [
        Start(Config(worker=Worker(num_threads=3)), TrainerState(Progress("idle", 7))),
        Wake(),
        ask,
        Stop(),
    ]
    for message in sent:
        assert front.send(message)
    assert [trainer.receive() for _ in sent] == sent
    back = [
        ModelFacts("/m", 320, 2048, {f"layers.{i}.weight": i for i in range(100_000)}),
        Refused(1, ErrorInfo("CheckpointError", "disk full")),
        state_of("idle", 3, refused=["x"]),
    ]
    for message in back:
        assert trainer.send(message)
    assert [front.receive() for _ in back] == back


GARBAGE = [
    b"",
    b"\x00" * 100,
    pickle.dumps({"type": "Wake"}),
    b"\x91" * 1_000_000,  # arrays in arrays
    b"\xdd\xff\xff\xff\xff",  # claims four thousand million elements
    msgspec.msgpack.encode({"type": "Reboot"}),
    msgspec.msgpack.encode({"type": "JobChanged", "job_id": 3}),
    frame(Wake())[4:],  # the other direction's
]


def test_bytes_that_are_no_message_are_dropped_and_counted_and_the_next_one_is_read(raw):
    front, socket = raw
    frames = [len(data).to_bytes(4, "big") + data for data in GARBAGE]
    stream = b"".join([*frames, frame(JobChanged("job-1"))])
    threading.Thread(target=socket.sendall, args=(stream,), daemon=True).start()
    assert front.receive() == JobChanged("job-1")
    assert front.num_bad_messages == len(GARBAGE)


@pytest.mark.parametrize(
    "data", [(MAX_LINK_BYTES + 1).to_bytes(4, "big") + b"x" * 100, b"\xff" * 4, b"\0\0", b""]
)
def test_an_impossible_length_or_a_cut_message_is_the_end_of_the_link(raw, data):
    front, socket = raw
    socket.sendall(data)
    if len(data) < 4:
        socket.close()
    with pytest.raises(EOFError):
        front.receive()
    assert front.is_closed.is_set()
    assert not front.send(Wake())
    if len(data) >= 4:
        assert socket.recv(10) == b""  # the other end is told


def test_many_notes_become_few_messages_and_the_last_one_always_comes(pair):
    front, trainer = pair
    count = 0
    for count in range(1, 201):
        trainer.note(State, lambda: state_of("training", count))  # noqa: B023
        trainer.note("job-1", lambda: JobChanged("job-1"))
        time.sleep(0.002)
    received, last = [], 0
    while last < count:
        message = front.receive()
        received.append(message)
        if isinstance(message, State):
            last = message.state.progress.activity_count
    assert len(received) <= 2 * (0.4 + 1.0) / link_module.UPDATE_INTERVAL_S
    assert JobChanged("job-1") in received


def test_a_state_goes_out_before_what_is_sent_after_it(pair):
    front, trainer = pair
    for version in range(1, 20):
        trainer.note(State, lambda: state_of("training", version, weight_version=version))  # noqa: B023
        trainer.send(Publish(version))
        seen = 0
        while not isinstance(message := front.receive(), Publish):
            seen = message.state.weight_version
        assert (seen, message.weight_version) == (version, version)


def test_the_heartbeat_comes_without_any_change(pair, monkeypatch):
    monkeypatch.setattr(link_module, "STATE_INTERVAL_S", 0.1)
    front, trainer = pair
    trainer.beat(State, lambda: state_of("idle", 1))
    started = time.monotonic()
    assert [type(front.receive()) for _ in range(4)] == [State] * 4
    assert 0.2 < time.monotonic() - started < 1.0


def test_an_end_that_reads_nothing_stops_nobody_and_what_waits_is_bounded(pair):
    front, _ = pair
    big = Start(Config(), TrainerState(Progress("idle", 0)))
    started, num_taken = time.monotonic(), 0
    for _ in range(20_000):
        num_taken += front.send(big)
    assert time.monotonic() - started < 5.0
    assert num_taken < 20_000
    assert len(front._waiting) <= MAX_WAITING
    front.close()
    front._writer.join(2.0)
    assert not front._writer.is_alive()


def test_finish_hands_over_everything_first(pair):
    front, trainer = pair
    trainer.note(State, lambda: state_of("idle", 5))
    for i in range(100):
        trainer.send(JobChanged(f"job-{i}"))
    trainer.finish(timeout_s=2.0)
    received = [front.receive() for _ in range(101)]
    with pytest.raises(EOFError):
        front.receive()
    assert received[0] == state_of("idle", 5)
    assert received[-1] == JobChanged("job-99")
