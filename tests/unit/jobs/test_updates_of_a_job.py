"""Which examples each update of a job takes, and what is remembered of them."""

from __future__ import annotations

from typing import Any

import pytest
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.jobs.queue import JobQueue
from planned import plan_of_tokens, submit

from apollo_ipc.config import Train
from apollo_ipc.wire.requests import Example, TrainRequest


def ids_of(made: JobPlan, step: int) -> list[int]:
    return [example.input_ids[1] for example in made.examples_of(step)]


def test_steps_are_updates_and_none_goes_over_the_end_of_an_epoch():
    made = plan_of_tokens([1, 2, 3, 4, 5], accumulate_steps=2, epochs=2)
    groups = [[1, 2], [3, 4], [5]]
    assert [ids_of(made, step) for step in range(made.num_steps)] == groups * 2
    assert plan_of_tokens([1, 2, 3, 4, 5], accumulate_steps=2, max_steps=2).num_steps == 2
    rates = [made.learning_rate(step) for step in range(made.num_steps)]
    assert rates.index(max(rates)) < 2, "the schedule counts updates: the warm-up is over"


def test_without_it_every_step_is_one_example_as_before():
    made = plan_of_tokens([1, 2, 3], epochs=2)
    assert [ids_of(made, step) for step in range(made.num_steps)] == [[1], [2], [3]] * 2
    assert made.accumulate_steps == 1


def test_the_configuration_says_what_a_job_does_not():
    defaults = Train(accumulate_steps=3)
    assert plan_of_tokens([1, 2, 3, 4], defaults).num_steps == 2
    assert plan_of_tokens([1, 2, 3, 4], defaults, accumulate_steps=1).num_steps == 4


@pytest.mark.parametrize(("num_steps", "known"), [(0, 0), (1, 2), (2, 4), (3, 4), (4, 4)])
def test_the_examples_of_finished_updates_are_remembered_each_once(num_steps, known):
    made = plan_of_tokens([1, 2, 3, 4, 4], accumulate_steps=2, epochs=2)  # 4 comes twice
    assert made.hashes_of(num_steps) == list(dict.fromkeys(made.hashes))[:known]


def test_a_note_is_added_once_however_often_the_job_is_resumed(tmp_path):
    queue = JobQueue(tmp_path / "queue.sqlite", 10)
    changed: list[Any] = []
    request = TrainRequest([Example(prompt="a", completion="b")])
    job_id = submit(queue, request, num_steps=1, notes=["said before"]).job_id
    queue.take()
    queue.on_change = changed.append
    queue.add_notes(job_id, [])
    assert not changed
    for _ in range(2):
        queue.add_notes(job_id, ["12.3 GB more"])
    assert queue.get(job_id).notes == ["said before", "12.3 GB more"]
    assert [job.notes for job in changed] == [["said before", "12.3 GB more"]], "clients hear of it"
    queue.close()
