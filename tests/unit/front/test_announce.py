"""Jobs that have ended become webhooks, whoever is killed in between."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from apollo_worker.front.announce import Collector
from apollo_worker.jobs.queue import JobQueue
from fake_trainer import CRASH, NORMAL
from fake_worker import short_dir
from planned import submit
from test_front import wait_for, worker_in

from apollo_ipc.webhooks.outbox import Outbox
from apollo_ipc.wire.requests import Example, TrainRequest

URL = "http://hooks.test/in"
REQUEST = TrainRequest([Example(prompt="a", completion="b")])


@pytest.fixture
def queue(tmp_path):
    queue = JobQueue(tmp_path / "queue.sqlite", 1000)
    yield queue
    queue.close()


@pytest.fixture
def outbox(tmp_path):
    outbox = Outbox(tmp_path / "webhooks.sqlite", [URL])
    yield outbox
    outbox.close()


def train(queue, state="applied", **more) -> str:
    job_id = submit(queue, REQUEST).job_id
    assert queue.take().info.job_id == job_id
    queue.record_step(job_id, 1, 2.0)
    queue.finish(job_id, state, **more)
    return job_id


def told(outbox) -> list[tuple[str, str]]:
    return [(one.type, one.subject) for one in reversed(outbox.deliveries(1000))]


def test_done_failed_and_quarantined_jobs_are_told_once_and_cancelled_ones_not(queue, outbox):
    collector = Collector(queue, outbox)
    train(queue)
    collector.collect()
    assert told(outbox) == [], "it had ended before anybody was to be told"
    done, failed = train(queue), train(queue, "failed", error="too hot")
    bad = train(queue, "quarantined")
    queue.cancel(submit(queue, REQUEST).job_id)
    for _ in range(3):
        collector.collect()
    queue.mark_durable(100)
    collector.collect()
    Collector(queue, outbox).collect()
    assert told(outbox) == [("job.done", done), ("job.failed", failed), ("job.quarantined", bad)]
    body = json.loads(outbox.due(URL, time.time()).body)
    assert (body["type"], body["data"]["job_id"], body["data"]["loss_last"]) == ("job.done", done, 2.0)


def test_a_job_that_is_trained_again_after_a_crash_ends_again(queue, outbox):
    collector = Collector(queue, outbox)
    collector.collect()
    job_id = train(queue)
    collector.collect()
    queue.reconcile(0)
    collector.collect()
    assert queue.take().info.job_id == job_id
    queue.finish(job_id, "failed", error="now it fails")
    collector.collect()
    assert told(outbox) == [("job.done", job_id), ("job.failed", job_id)]


def test_a_job_that_was_durable_is_seen_again_when_its_checkpoint_is_lost(queue, outbox):
    collector = Collector(queue, outbox)
    collector.collect()
    first, second = train(queue), train(queue)
    queue.mark_durable(100)
    collector.collect()
    assert outbox.mark("jobs_from_seq") == 3
    queue.reconcile(1)
    collector.collect()
    queue.take()
    queue.finish(second, "applied")
    collector.collect()
    assert told(outbox) == [("job.done", first), ("job.done", second), ("job.done", second)]


def test_killed_before_the_outbox_has_it_the_next_front_finds_it_in_the_queue(queue, outbox, monkeypatch):
    Collector(queue, outbox).collect()
    jobs = [train(queue) for _ in range(3)]
    real, left = outbox.add, iter(range(2))

    def add(event):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(event)

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "add", add)
        with pytest.raises(KeyboardInterrupt):
            Collector(queue, outbox).collect()
    assert told(outbox) == []
    Collector(queue, outbox).collect()
    assert told(outbox) == [("job.done", job_id) for job_id in jobs]


def test_a_long_queue_costs_a_look_little(queue, outbox):
    collector = Collector(queue, outbox)
    collector.collect()
    for _ in range(20):
        train(queue)
    collector.collect()
    asked, real = [], queue.get
    queue.get = lambda job_id: asked.append(job_id) or real(job_id)
    collector.collect()
    assert asked == []


class Receiver(ThreadingHTTPServer):
    def __init__(self):
        self.is_down, self.taken = True, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.server.is_down:
            self.server.taken.append((body["data"]["job_id"], body["type"], self.headers["webhook-id"]))
        self.send_response(503 if self.server.is_down else 204)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def receiving():
    with Receiver() as receiver:
        yield receiver
        receiver.shutdown()


def test_front_and_trainer_are_killed_again_and_again_and_every_end_is_told(monkeypatch):
    rng = random.Random(7)
    with short_dir() as directory, receiving() as receiver:
        url = f"http://127.0.0.1:{receiver.server_address[1]}/in"
        monkeypatch.setenv("FAKE_FRONT_WEBHOOK", url)
        jobs = []
        for round_ in range(3):
            with worker_in(directory, step_s=0.05) as worker:
                worker.wait_until_attached(round_ + 1)
                jobs += [worker.submit(NORMAL, 2, lr=rng.random() / 100) for _ in range(3)]
                time.sleep(rng.random())
                os.kill(worker.trainers()[-1], signal.SIGKILL)
                time.sleep(rng.random() / 4)
        receiver.is_down = False
        with worker_in(directory, step_s=0.01) as worker:
            worker.wait_until_attached(len(worker.trainers()) + 1)
            jobs.append(worker.submit(CRASH, 1))
            wait_for(lambda: {job_id for job_id, *_ in receiver.taken} >= set(jobs), 60)
            ends = {job_id: worker.job(job_id).state for job_id in jobs}
    types = dict.fromkeys(jobs)
    for job_id, kind, _ in receiver.taken:
        types[job_id] = kind  # the last that was told
    assert {job_id: kind.removeprefix("job.") for job_id, kind in types.items()} == {
        job_id: "done" if state in ("applied", "durable") else state for job_id, state in ends.items()
    }
    assert ends[jobs[-1]] == "quarantined"
