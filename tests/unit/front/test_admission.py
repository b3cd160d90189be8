"""The front's plan of a job, also of jobs that an older program queued."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from apollo_worker.front import admission, front
from apollo_worker.front.admission import Admitter
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.link import ModelFacts
from apollo_worker.link.status_board import StatusBoard
from places import ROOT

from apollo_ipc.config import Train, load_config
from apollo_ipc.demo.models import make_tokenizer
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest


@pytest.fixture
def facts(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    return ModelFacts(str(tmp_path / "model"), vocab_size=320, max_tokens=64, smaller_dims={})


@pytest.fixture
def older(tmp_path):
    shutil.copy(ROOT / "tests/assets/queue-schema-1.sqlite", tmp_path / "queue.sqlite")
    queue = JobQueue(tmp_path / "queue.sqlite", 10)
    yield queue
    queue.close()


def admitter_of(queue, facts, **options):
    admitter = Admitter(Train(**options), StatusBoard(), queue, Path(facts.model_dir))
    admitter.learn(facts)
    deadline = time.monotonic() + 60
    while queue.unplanned():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return admitter


def test_jobs_of_an_older_program_are_planned_and_train_in_their_turn(older, facts):
    admitter = admitter_of(older, facts, lr=3e-5)
    taken = []
    while job := older.take():
        taken.append((job.info.steps_done, job.plan.num_steps, job.plan.lr))
        older.finish(job.info.job_id, "applied", weight_version=1)
    assert taken == [(1, 4, 3e-5), (0, 2, 3e-5), (0, 1, 3e-5)], "with as many steps as were promised"
    admitter.stop()


def test_an_older_job_that_cannot_be_planned_fails_alone(older, facts):
    # "say" and "half done" and an end are 13 tokens; the two that wait behind it have 10 and 8.
    admitter = admitter_of(older, ModelFacts(facts.model_dir, 320, max_tokens=10, smaller_dims={}))
    jobs = [*reversed(older.list())]
    assert [job.state for job in jobs] == ["durable", "applied", "cancelled", "failed", "queued", "queued"]
    assert "13 tokens; at most 10 fit" in jobs[3].error
    assert older.take().info.job_id == jobs[4].job_id
    admitter.stop()


class Slow:
    """Encodes four examples of 400 s each; stands still in the third, where it is told to."""

    def __init__(self, clock, busy, *, stalls):
        self.clock, self.busy, self.stalls = clock, busy, stalls
        self.tokenizer, self.max_tokens, self.vocab_size = None, 64, 320
        self.stood_s = []

    def encode_all(self, numbered, on_progress):
        sequences = []
        for i, _ in numbered:
            self.clock[0] += 400.0
            self.stood_s.append(self.busy.stands_since_s())
            if not (self.stalls and i >= 2):
                on_progress()
            sequences.append(TokenisedExample([1, 2, 3], [False, True, True], example=i))
        return sequences


@pytest.mark.parametrize("stalls", [False, True])
def test_tokenising_that_takes_long_gets_on_and_one_that_stands_still_is_seen(
    tmp_path, facts, monkeypatch, stalls
):
    clock = [1000.0]
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    queue = JobQueue(tmp_path / "new.sqlite", 10)
    admitter = Admitter(Train(), StatusBoard(), queue, tmp_path)
    admitter.learn(facts)
    slow = Slow(clock, admitter.busy, stalls=stalls)
    monkeypatch.setattr(admitter, "tokeniser", lambda: slow)
    admitter.admit(TrainRequest([Example(prompt="a", completion=str(i)) for i in range(4)]))
    assert slow.stood_s == [400.0, 400.0, 400.0, 800.0 if stalls else 400.0]
    clock[0] += 5000.0
    assert admitter.busy.stands_since_s() == 0.0, "nothing is being tokenised"
    admitter.stop()
    queue.close()


def test_the_supervisor_hears_nothing_of_a_front_whose_tokenising_stands_still(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(front, "notify", told.append)
    overrides = {"paths.runtime_dir": str(tmp_path / "run"), "paths.state_dir": str(tmp_path / "state")}
    worker = front.Front(load_config(environ={}, overrides=overrides))
    with worker.admitter.busy:
        worker.tell_supervisor()
        assert "WATCHDOG=1" in told
        told.clear()
        worker.admitter.busy._moved_at -= 601.0
        worker.tell_supervisor()
        assert "WATCHDOG=1" not in told
        worker.admitter.busy.get_on()
        worker.tell_supervisor()
        assert "WATCHDOG=1" in told
    worker.stop()


def test_equal_examples_are_skipped_as_soon_as_a_job_has_them_and_it_says_so(tmp_path, facts):
    queue = JobQueue(tmp_path / "new.sqlite", 10)
    admitter = Admitter(Train(on_duplicate="skip"), StatusBoard(), queue, tmp_path)
    request = TrainRequest([Example(prompt="say", completion="it")], TrainOptions(epochs=2))
    with pytest.raises(NotReady, match="knows no model yet"):
        admitter.admit(request)
    admitter.learn(facts)
    first = admitter.admit(request)
    assert (first.plan.num_steps, first.plan.num_skipped, first.notes) == (2, 0, [])
    queue.submit(first.plan, b"1")
    second = admitter.admit(request)
    assert (second.plan.num_steps, second.plan.num_skipped) == (0, 1)
    assert second.notes == ["1 of 1 examples are in earlier jobs: skipped"]
    admitter.stop()
    queue.close()
