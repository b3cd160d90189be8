"""What a restore makes of jobs: their states are those of the weights, however often these go back."""

from __future__ import annotations

import random

from planned import hash_of, request_of, submit


def train(queue, text: str, version: int) -> str:
    job_id = submit(queue, request_of(text)).job_id
    queue.take()
    queue.finish(job_id, "applied", weight_version=version)
    queue.mark_durable(queue.applied_seq())
    return job_id


def test_a_job_is_back_with_a_version_that_holds_it(queue):
    job_id = train(queue, "a", 1)
    queue.restored(0, 1, weight_version=0, new_version=2)
    assert (queue.get(job_id).state, queue.get(job_id).undone_by) == ("undone", 0)
    assert queue.known_examples([hash_of("a")]) == set(), "sent again, it is trained"
    assert [job.job_id for job in queue.restored(1, 1, weight_version=1, new_version=3)] == [job_id]
    back = queue.get(job_id)
    assert (back.state, back.undone_by, back.notes[-1]) == (
        "durable",
        None,
        "back: weight version 1 was restored",
    )
    assert queue.known_examples([hash_of("a")]) == {hash_of("a")}
    assert queue.restored(1, 1, weight_version=1, new_version=3) == [], "killed in between, it is done again"


def test_a_version_made_after_a_restore_does_not_hold_what_that_took_away(queue):
    first = train(queue, "a", 1)
    queue.restored(0, 1, weight_version=0, new_version=2)
    second = train(queue, "b", 3)
    queue.restored(1, 2, weight_version=1, new_version=4)
    assert [queue.get(one).state for one in (first, second)] == ["durable", "undone"]
    queue.restored(2, 2, weight_version=3, new_version=5)
    assert [queue.get(one).state for one in (first, second)] == ["undone", "durable"]


def test_on_any_way_back_and_forth_the_states_are_those_of_the_weights(queue):
    draw = random.Random(3)
    held, ids = frozenset[str](), list[str]()
    commits = {0: (0, held)}  # version -> its commit's seq, the jobs in its weights
    for version in range(1, 61):
        seq = len(ids)
        if draw.random() < 0.5:
            ids.append(train(queue, str(version), version))
            held |= {ids[-1]}
        else:
            back = draw.choice([*commits])
            held_seq, held = commits[back]
            queue.restored(held_seq, seq, weight_version=back, new_version=version)
        commits[version] = (len(ids), held)
        in_weights = {one for one in ids if queue.get(one).state == "durable"}
        assert in_weights == held
        assert all(queue.get(one).state == "undone" for one in set(ids) - held)
