"""Run by test_curation_batches: trains a batch again and again, each time killed (SIGKILL) one point later.

    python batch_child.py DIRECTORY URL SCENARIO

A point is any statement that goes to SQLite and any request to the server, before it is sent and after it was
answered. Run number N has the state directory DIRECTORY/N and is killed at point N; prints the number of the
run that no point was left for. SCENARIO: plain; refusal, stop: the server refuses an example, the watcher
stops the job; again: the batch was killed once before, and it is `resume` that is killed; held: the model's
own answers are asked, and stand beside.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import batch_fixtures as fixtures

from apollo_curation import chat_client as served_model
from apollo_curation import train_client as training
from apollo_curation.chat_client import ChatClient, learner
from apollo_curation.moments.moments import Moments
from apollo_curation.quality.held import what_is_held
from apollo_curation.store import Store, store_path
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches, StopTraining

FIRST_KILL = 25  # the request has been sent


class Points:
    def __init__(self, kill_at: int):
        self.left = kill_at

    def reach(self, *_: object) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def run(config, client: TrainClient, model: ChatClient, number: int, scenario: str) -> None:
    with Store(store_path(config)) as store:
        moments = Moments(store)
        batches = Batches(store, moments, client, config, replay=what_is_held(config, model))
        found = moments.list("approved")
        points = Points(number)
        store.db.set_trace_callback(points.reach)
        for http in (client._http, model._http):
            http.event_hooks = {"request": [points.reach], "response": [points.reach]}

        def stop_at_once(job) -> None:
            if scenario == "stop":
                raise StopTraining("it got worse")

        if found:
            batches.train("direct", found, stop_at_once)
        else:
            batches.resume(stop_at_once)


def main() -> None:
    directory, url, scenario = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    training.POLL_S = served_model.RETRY_S = 0.005
    base = fixtures.config_in(directory, url)
    client, model = TrainClient(base), learner(base)  # not connected yet; making one takes long
    for number in range(1000):
        config = fixtures.config_in(directory / str(number), url, hold=int(scenario == "held"))
        # What one server has trained of each run is told apart by the run's number.
        fixtures.add(config, *(f"answer {i} of run {number}" for i in range(fixtures.NUM_MOMENTS)))
        if scenario == "again":
            assert is_killed(config, client, model, FIRST_KILL, scenario)
        if not is_killed(config, client, model, number, scenario):
            print(number)
            return


def is_killed(config, client: TrainClient, model: ChatClient, kill_at: int, scenario: str) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            run(config, client, model, kill_at, scenario)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), f"killed at {kill_at}: status {status}"
    return status == signal.SIGKILL


if __name__ == "__main__":
    main()
