"""Each moment is trained once, whoever dies: the process, the server, its queue."""

from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import pytest
from batch_fixtures import NUM_MOMENTS, config_in
from batch_parts import opened
from places import SUPPORT

from apollo_curation.chat_client import ModelAway, learner
from apollo_curation.train_client import TrainClient
from apollo_ipc.errors import NotReady

# --- killed ---


@pytest.mark.parametrize("scenario", ["plain", "refusal", "stop", "again", "held"])
def test_whatever_point_a_process_is_killed_at_each_moment_is_trained_once(server, tmp_path, scenario):
    hold = int(scenario == "held")
    if scenario == "refusal":
        server.refuse = "answer 1 of"
    child = subprocess.run(
        [sys.executable, SUPPORT / "batch_child.py", tmp_path, server.url, scenario],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    num_runs = int(child.stdout)
    assert num_runs > 15  # points there are: else the child has hung its traps up in the wrong place
    num_resumed = 0
    seen = set()
    base = config_in(tmp_path, server.url)
    client, model = TrainClient(base), learner(base)
    for number in range(num_runs + 1):
        config = config_in(tmp_path / str(number), server.url, hold=hold)
        with opened(config, client=client, model=model) as parts:
            num_resumed += len(parts.batches.resume())
            # Killed before anything was written, nothing has happened: a later train takes them.
            if approved := parts.moments.list("approved"):
                assert len(approved) == NUM_MOMENTS
                parts.batches.train("direct", approved)
            assert parts.batches.resume() == []
            assert not any(batch.is_open for batch in parts.batches.table.list())
            assert all(bool(batch.num_held) == bool(hold) for batch in parts.batches.table.list())
            states = parts.states()
        server.end_all()
        for i in range(NUM_MOMENTS):
            answer = f"answer {i} of run {number}"
            seen.add(states[answer])
            wanted = {"trained": 1, "dropped": 0, "failed": 0}[states[answer]]
            assert server.trained[answer] == wanted, f"killed at point {number}: {answer}"
    print(f"{num_runs} points, {num_resumed} batches resumed")
    client.close()
    model.close()
    assert num_resumed > 10
    ends = {"refusal": {"trained", "dropped"}, "stop": {"trained", "failed"}}
    assert seen == ends.get(scenario, {"trained"})


def test_a_kill_between_accepting_and_answering_is_one_job(server, parts):
    server.faults = ["drop after", "drop after", 503]
    batch = parts.batches.train("direct", parts.add("a", "b"))
    assert batch.state == "trained"
    assert server.trained == {"a": 1, "b": 1}
    assert [path for method, path in server.requests if method == "POST"] == ["/train"] * 4
    assert len(server.jobs) == 1


def test_a_server_that_restarts_while_a_job_runs_is_waited_for(server, parts):
    """ServerRefused connections while it is away, 503 while it comes up, and the same job after that."""

    def restart(job) -> None:
        if job.state == "queued":
            server.go_down()
            server.faults = [503, 503, "drop"]
            threading.Timer(0.2, server.come_up).start()

    batch = parts.batches.train("direct", parts.add("a", "b"), restart)
    assert (batch.state, batch.error, server.trained) == ("trained", None, {"a": 1, "b": 1})
    assert server.faults == []


def test_a_server_that_stays_away_leaves_the_batch_to_resume(server, tmp_path):
    config = config_in(tmp_path, server.url, patience_s=0.05)
    server.go_down()
    with opened(config) as parts:
        with pytest.raises(ModelAway):
            parts.batches.train("direct", parts.add("a"))
        assert parts.states() == {"a": "training"}
        with pytest.raises(ModelAway):
            parts.batches.resume()
    server.come_up()
    with opened(config) as parts:
        (batch,) = parts.batches.resume()
        assert batch.state == "trained"
        assert parts.states() == {"a": "trained"}
    assert server.trained == {"a": 1}


def test_a_lost_queue_gets_the_same_request_under_the_same_key_again(server, parts):
    def lose(job) -> None:
        if job.job_id == "job-1":
            server.lose_queue()

    batch = parts.batches.train("direct", parts.add("a"), lose)
    assert (batch.state, batch.job.job_id) == ("trained", "job-2")
    assert server.trained == {"a": 1}
    assert server.bodies[0] == server.bodies[1]
    assert list(server.keys) == [batch.batch_id]


def test_a_server_that_forgets_every_job_does_not_get_it_for_ever(server, parts):
    batch = parts.batches.train("direct", parts.add("a"), lambda job: server.lose_queue())
    assert (batch.state, batch.error) == ("failed", "the server forgot the job 3 times")
    assert parts.states() == {"a": "failed"}


def test_an_error_of_the_watcher_leaves_the_job_running_and_the_batch_open(server, parts):
    def fail(job) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parts.batches.train("direct", parts.add("a"), fail)
    assert parts.batches.table.list()[0].state == "open"
    assert [batch.state for batch in parts.batches.resume()] == ["trained"]
    assert server.trained == {"a": 1}


def test_batches_of_before_the_server_was_asked_for_their_states_are_gone_on_with(server, parts):
    def fail(job) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parts.batches.train("direct", parts.add("a"), fail)
    (batch,) = parts.batches.table.list()
    old = msgspec.to_builtins(batch) | {"state": "submitted", "job_id": "job-1", "num_examples": 1}
    with parts.store.transaction() as db:
        db.execute("UPDATE batches SET state = 'submitted', record = ?", (msgspec.json.encode(old),))
        db.execute(
            "INSERT INTO batches VALUES ('batch-0', 'refused', 0, 1, 0, ?, '')",
            (msgspec.json.encode(old | {"state": "refused"}),),
        )
    with opened(parts.config) as again:
        assert [one.state for one in again.batches.resume()] == ["trained"]
        assert len(again.batches.table.list()) == 1
    assert server.trained == {"a": 1}


# --- two processes ---


def test_a_batch_that_another_process_trains_is_not_taken_over(server, tmp_path):
    config = config_in(tmp_path, server.url)
    is_running, may_end, results = threading.Event(), threading.Event(), []

    def hold(job) -> None:
        is_running.set()
        assert may_end.wait(10)

    def first() -> None:
        with opened(config) as parts:
            results.append(parts.batches.train("direct", parts.add("a"), hold).state)

    thread = threading.Thread(target=first)
    thread.start()
    assert is_running.wait(10)
    with (
        opened(config, stop=lambda: True) as parts,
        pytest.raises(NotReady, match="is training; stopped waiting"),
    ):
        parts.batches.resume()
    resumed = []

    def second() -> None:
        with opened(config) as parts:
            resumed.append(parts.batches.resume())

    other = threading.Thread(target=second)
    other.start()
    other.join(0.1)
    assert other.is_alive()  # it waits
    may_end.set()
    thread.join(10)
    other.join(10)
    assert (results, resumed, server.trained) == (["trained"], [[]], {"a": 1})
