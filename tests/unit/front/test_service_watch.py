"""The worker's socket towards watchers and routers: events of a job, publishing."""

from __future__ import annotations

import threading
import time

import pytest
from apollo_worker.front.peers import MAX_WATCHES_PER_PEER
from fake_worker import request_of
from raw_peer import Peer

from apollo_ipc.wire import messages as m


def test_a_watcher_sees_the_job_at_once_then_its_changes_then_its_end_with_the_history(served, peer):
    _, _, queue = served
    job = peer.ask(m.Submit("1", request_of(num=50))).job
    peer.hello()
    peer.send(m.Watch("w", job.job_id))
    assert peer.receive(m.JobEvent, timeout_s=0.5) == m.JobEvent("w", job, False)
    queue.take()
    for step in range(1, 51):
        queue.record_step(job.job_id, step, float(step))
        time.sleep(0.01)
    queue.finish(job.job_id, "applied", weight_version=4)
    events = []
    while not events or not events[-1].ended:
        events.append(peer.receive(m.JobEvent))
    assert 2 <= len(events) <= 12  # 0.5 s of changes at ten a second
    steps = [event.job.steps_done for event in events]
    assert steps == sorted(steps)
    assert events[-1].job.loss_history == [float(step) for step in range(1, 51)]
    assert events[-1].job.weight_version == 4
    queue.mark_durable(job.seq)
    assert peer.receive(m.JobEvent, timeout_s=0.4) is None  # the watch ended with the job
    peer.send(m.Watch("late", job.job_id))
    assert peer.receive(m.JobEvent).ended


def test_watches_can_be_ended_are_limited_and_need_a_job(served, peer):
    _, _, queue = served
    job = peer.ask(m.Submit("1", request_of())).job
    peer.hello()
    assert peer.ask(m.Watch("x", "job-x")).error.type == "NotFound"
    for i in range(MAX_WATCHES_PER_PEER):
        peer.send(m.Watch(f"w{i}", job.job_id))
    peer.send(m.Watch("one more", job.job_id))
    refused = peer.receive(m.Reply)
    assert (refused.request_id, refused.error.code) == ("one more", "too_many_watches")
    for i in range(MAX_WATCHES_PER_PEER):
        peer.send(m.Unwatch(f"w{i}"))
    time.sleep(0.3)
    while peer.receive(m.JobEvent, timeout_s=0.1):
        pass
    queue.take()
    assert peer.receive(m.JobEvent, timeout_s=0.4) is None


def publish_in_background(service, version, timeout_s):
    result = []
    thread = threading.Thread(target=lambda: result.append(service.publish(version, timeout_s)))
    thread.start()
    return thread, result


def test_publishing_without_a_router_returns_at_once(served, peer, directory):
    service, board, _ = served
    board.state.vllm_boot_id = "here"
    peer.hello(role="cli")
    with Peer(directory) as other:
        other.hello(vllm_boot_id="another vLLM")
        assert other.receive(m.Heartbeat)
        assert peer.receive(m.Heartbeat)
        started = time.monotonic()
        assert service.publish(1, timeout_s=5.0) is False
        assert time.monotonic() - started < 0.5


@pytest.mark.parametrize("first_does", ["nothing", "fails", "leaves"])
def test_publishing_asks_the_next_router_where_the_first_does_not_confirm(
    served, peer, directory, first_does
):
    service, board, _ = served
    board.state.vllm_boot_id = "here"
    peer.hello(vllm_boot_id=None)  # not known yet: asked last
    assert peer.receive(m.Heartbeat)
    with Peer(directory) as first:
        first.hello(vllm_boot_id="here")
        assert first.receive(m.Heartbeat)
        thread, result = publish_in_background(service, 5, timeout_s=2.0)
        assert first.receive(m.DropCache) == m.DropCache(5)
        assert peer.receive(m.DropCache, timeout_s=0.2) is None  # one router at a time
        if first_does == "fails":
            first.send(m.CacheDropped(5, ok=False, error="no"))
        elif first_does == "leaves":
            first.context.destroy(linger=0)
        assert peer.receive(m.DropCache, timeout_s=2.0) == m.DropCache(5)
        peer.send(m.CacheDropped(4, ok=True))  # an older version does not count
        time.sleep(0.1)
        assert result == []
        peer.send(m.CacheDropped(5, ok=True))
        thread.join(timeout=3)
        assert result == [True]


def test_publishing_to_routers_that_never_answer_ends_in_time(served, peer):
    service, _, _ = served
    peer.hello()
    assert peer.receive(m.Heartbeat)
    started = time.monotonic()
    assert service.publish(1, timeout_s=0.5) is False
    assert 0.4 < time.monotonic() - started < 1.5
