"""Curves: what each library is told, whoever is killed in between.

TensorBoard's files are read by its own reader; Weights & Biases and MLflow only where they are installed.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from apollo_worker.curves.feed import Feed
from apollo_worker.curves.libraries import keeper_of
from apollo_worker.curves.marks import Marks
from apollo_worker.jobs.queue import JobQueue
from curve_readers import library, mlflow_run, of_mlflow, of_tensorboard, of_wandb
from planned import submit
from waiting import wait_for

from apollo_ipc.config import load_config
from apollo_ipc.errors import ConfigError
from apollo_ipc.wire.requests import Example, TrainRequest

REQUEST = TrainRequest([Example(prompt="a", completion="b")])


@pytest.fixture
def queue(tmp_path):
    queue = JobQueue(tmp_path / "queue.sqlite", 1000)
    yield queue
    queue.close()


class Shelf:
    """A library in memory: run -> its points. `knows`: it can say how far a run is."""

    def __init__(self, knows=True):
        self.knows, self.points, self.ended = knows, {}, {}

    def __call__(self, run):
        return _Open(self, run)


class _Open:
    def __init__(self, shelf, run):
        self._shelf, self._name = shelf, run.name
        points = shelf.points.setdefault(run.name, [])
        self.last_step = max((point.step for point in points), default=0) if shelf.knows else 0

    def add(self, points):
        self._shelf.points[self._name] += points

    def close(self, ended):
        self._shelf.ended[self._name] = ended


def feed_of(queue, tmp_path, shelf, name="tensorboard"):
    return Feed(queue, Marks(tmp_path / "curves.sqlite", name), shelf)


def look(feed):
    while feed.look():
        pass


def train(queue, losses, state: str | None = "applied", num_steps=None) -> str:
    job_id = submit(queue, REQUEST, num_steps=num_steps or len(losses)).job_id
    queue.take()
    go_on(queue, job_id, losses, state)
    return job_id


def go_on(queue, job_id, losses, state: str | None = "applied", first_step=1):
    for step, loss in enumerate(losses, first_step):
        queue.record_step(job_id, step, loss)
    if state:
        queue.finish(job_id, state, weight_version=7)


def curve(points) -> list[tuple[int, float]]:
    return [(point.step, point.values["loss"]) for point in points]


def test_a_job_of_several_steps_is_a_run_and_every_job_a_point(queue, tmp_path):
    train(queue, [9.0, 9.0])
    shelf = Shelf()
    feed = feed_of(queue, tmp_path, shelf)
    look(feed)
    assert shelf.points == {}, "it had ended before the library was named"
    long = train(queue, [3.0, 2.0, math.nan, 1.0])
    train(queue, [0.5])
    queue.cancel(submit(queue, REQUEST, num_steps=3).job_id)
    failed = train(queue, [4.0, 5.0], "failed", num_steps=9)
    look(feed)
    assert set(shelf.points) == {long, failed, "jobs"}
    assert [step for step, _ in curve(shelf.points[long])] == [1, 2, 3, 4]
    assert math.isnan(curve(shelf.points[long])[2][1])
    assert shelf.ended == {long: "applied", failed: "failed"}
    assert [point.step for point in shelf.points["jobs"]] == [2, 3, 5]
    assert shelf.points["jobs"][0].values == {
        "loss_first": 3.0, "loss_last": 1.0, "steps": 4.0, "weight_version": 7.0
    }  # fmt: skip


def test_a_job_that_trains_is_followed_step_by_step_and_what_is_trained_again_keeps_its_points(
    queue, tmp_path
):
    shelf = Shelf()
    feed = feed_of(queue, tmp_path, shelf)
    look(feed)
    job_id = train(queue, [3.0, 2.0, 1.0], None, num_steps=5)
    look(feed)
    assert curve(shelf.points[job_id]) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    queue.reconcile(0)  # the checkpoint has none of it
    queue.take()
    go_on(queue, job_id, [3.5, 2.5], None)
    look(feed)
    go_on(queue, job_id, [1.5, 0.5, 0.25], first_step=3)
    look(feed)
    assert curve(shelf.points[job_id]) == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5), (5, 0.25)]


@pytest.mark.parametrize("place", ["add", "set_step"])
def test_killed_at_any_call_the_next_process_goes_on_in_the_same_run(queue, tmp_path, place, monkeypatch):
    """After the library has points and before the mark, and the other way round: no point twice."""
    shelf = Shelf()
    look(feed_of(queue, tmp_path, shelf))
    jobs = [train(queue, [3.0, 2.0, 1.0]), train(queue, [6.0, 5.0])]
    owner = _Open if place == "add" else Marks
    for _ in range(20):
        real, left = getattr(owner, place), iter(range(1))

        def once(self, *args, real=real, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, place, once)
            try:
                look(feed_of(queue, tmp_path, shelf))
            except KeyboardInterrupt:
                continue
        break
    assert [curve(shelf.points[job]) for job in jobs] == [
        [(1, 3.0), (2, 2.0), (3, 1.0)],
        [(1, 6.0), (2, 5.0)],
    ]
    assert [point.step for point in shelf.points["jobs"]] == [1, 2]


def test_a_library_that_cannot_say_how_far_it_is_goes_by_the_mark(queue, tmp_path):
    shelf = Shelf(knows=False)
    look(feed_of(queue, tmp_path, shelf))
    job_id = train(queue, [3.0, 2.0], None, num_steps=3)
    look(feed_of(queue, tmp_path, shelf))
    go_on(queue, job_id, [1.0], first_step=3)
    look(feed_of(queue, tmp_path, shelf))
    look(feed_of(queue, tmp_path, shelf))
    assert curve(shelf.points[job_id]) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert [point.step for point in shelf.points["jobs"]] == [1]


def test_two_libraries_are_fed_each_by_its_own_mark(queue, tmp_path):
    first, second = Shelf(), Shelf()
    feeds = [feed_of(queue, tmp_path, first), feed_of(queue, tmp_path, second, "mlflow")]
    for feed in feeds:
        look(feed)
    job_id = train(queue, [2.0, 1.0])
    look(feeds[0])
    look(feeds[1])
    assert curve(first.points[job_id]) == curve(second.points[job_id]) == [(1, 2.0), (2, 1.0)]


# --- the libraries themselves ---


def test_a_library_that_is_not_there_is_said_in_one_sentence_that_names_its_extra(monkeypatch):
    monkeypatch.setattr("apollo_worker.curves.libraries.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(ConfigError) as told:
            keeper_of(name, Path())
        assert told.value.message == f"{name} is not installed: pip install 'apollo-ipc[{name}]'"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('["tensorbord"]', r"train.log_to\[0\]: .*did you mean 'tensorboard'"),
        ('["wandb", "mlflow", "wandb"]', r"train.log_to\[2\]: 'wandb' is given twice"),
        ("wandb", r"train.log_to: a list is needed"),
    ],
)
def test_a_list_of_libraries_that_cannot_be_meant_is_refused_at_its_place(given, words):
    with pytest.raises(ConfigError, match=words):
        load_config(environ={"APOLLO_TRAIN__LOG_TO": given})


def test_a_library_that_cannot_write_says_so_in_a_line_and_that_it_is_told_later(queue, tmp_path):
    look(feed_of(queue, tmp_path, Shelf()))
    train(queue, [2.0, 1.0])
    (tmp_path / "tensorboard").write_text("in the way")
    command = [sys.executable, "-m", "apollo_worker.curves", "tensorboard", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "tensorboard: NotADirectoryError" in line
    assert line.endswith("it is tried again, and told what it missed")
    (tmp_path / "tensorboard").unlink()
    with feeding("tensorboard", tmp_path):
        wait_for(lambda: Marks(tmp_path / "curves.sqlite", "tensorboard").next_seq() == 2, 60)
    assert of_tensorboard(tmp_path, "jobs", "loss_last") == [(1, 1.0)]


@contextmanager
def feeding(name, state_dir, **environment):
    command = [sys.executable, "-m", "apollo_worker.curves", name, str(state_dir)]
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            yield process
        finally:
            process.kill()


def train_and_kill(queue, tmp_path, name, seen, **environment) -> str:
    """A job of 40 steps, whose feed is killed in the middle of it; the job's id."""
    look(feed_of(queue, tmp_path, Shelf(), name))  # from now on
    job_id = submit(queue, REQUEST, num_steps=40).job_id
    queue.take()
    for step in range(1, 21):
        queue.record_step(job_id, step, 4.0 / step)
    with feeding(name, tmp_path, **environment) as process:
        wait_for(lambda: seen(job_id), 60)
        process.kill()
    for step in range(21, 41):
        queue.record_step(job_id, step, 4.0 / step)
    queue.finish(job_id, "applied", weight_version=1)
    with feeding(name, tmp_path, **environment) as process:
        wait_for(lambda: Marks(tmp_path / "curves.sqlite", name).next_seq() == 2, 60)
        process.terminate()
        assert process.wait(30) == 0
    return job_id


WHOLE = [(step, pytest.approx(4.0 / step)) for step in range(1, 41)]


def test_tensorboard_reads_back_what_was_trained_also_over_a_kill(queue, tmp_path):
    library("tensorboard")
    seen = lambda job: len(of_tensorboard(tmp_path, job)) == 20  # noqa: E731
    job_id = train_and_kill(queue, tmp_path, "tensorboard", seen)
    assert of_tensorboard(tmp_path, job_id) == WHOLE
    assert of_tensorboard(tmp_path, "jobs", "loss_last") == [(1, pytest.approx(0.1))]


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow_has_what_was_trained_also_over_a_kill(queue, tmp_path, store, monkeypatch):
    library("mlflow")
    uri = f"sqlite:///{tmp_path}/own.db" if store == "sqlite" else (tmp_path / "mlruns").as_uri()
    environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ALLOW_FILE_STORE": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = lambda job: len(of_mlflow(uri, job)) == 20  # noqa: E731
    job_id = train_and_kill(queue, tmp_path, "mlflow", seen, **environment)
    assert of_mlflow(uri, job_id) == WHOLE
    assert mlflow_run(uri, job_id).info.status == "FINISHED"
    assert of_mlflow(uri, "jobs", "loss_last") == [(1, pytest.approx(0.1))]


def test_wandb_has_what_was_trained_offline_also_over_a_kill(queue, tmp_path):
    library("wandb")
    seen = lambda job: len(of_wandb(tmp_path, job)) == 20  # noqa: E731
    job_id = train_and_kill(queue, tmp_path, "wandb", seen, WANDB_MODE="offline")
    assert of_wandb(tmp_path, job_id) == WHOLE
