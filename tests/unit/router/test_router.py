"""The HTTP routes, over a real socket, before a real service and queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from apollo_worker.front import answers
from fake_worker import end, start_worker, thread_states
from places import SUPPORT
from router_harness import (
    ONE,
    TRAIN_KEY,
    Server,
    error_of,
    share_weights,
)
from waiting import wait_for

from apollo_ipc.wire.replies import SyncResult

# --- the worker ---


def test_without_a_worker_every_answer_is_503_within_a_second(server):
    for method, path in [("POST", "/train"), ("GET", "/train/status"), ("POST", "/checkpoint")]:
        started = time.monotonic()
        response = server.http.request(method, path, json={} if path == "/checkpoint" else ONE)
        assert time.monotonic() - started < 1
        assert (response.status_code, error_of(response)["code"]) == (503, "not_delivered")
        assert int(response.headers["retry-after"]) > 0


def test_a_job_is_accepted_and_can_be_looked_at(server, worker):
    response = server.http.post("/train", json=ONE)
    job = response.json()
    assert response.status_code == 202
    assert job == {
        "job_id": job["job_id"],
        "status": "queued",
        "num_examples": 1,
        "num_steps": 1,
        "num_skipped": 0,
        "notes": ["a note"],
    }
    assert server.http.get(response.headers["location"]).json()["state"] == "queued"
    assert [one["job_id"] for one in server.http.get("/train/jobs?state=queued").json()["data"]] == [
        job["job_id"]
    ]
    status = server.http.get("/train/status").json()
    assert (status["worker"], status["num_queued"], status["weight_version"]) == ("up", 1, 0)
    missing = server.http.get("/train/jobs/none")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")


def test_the_earlier_clients_shape_is_accepted(server, worker):
    samples = [{"context_ids": [1, 2], "continuation_ids": [3]}, {"prompt": "a", "completion": "b"}]
    body = {"training_data": {"samples": samples, "config": {"learning_rate": 1e-5, "num_epochs": 2}}}
    response = server.http.post("/train", json=body)
    assert (response.status_code, response.json()["num_examples"]) == (202, 2)
    assert worker.queue.take().plan.lr == 1e-5


def test_a_body_goes_to_the_worker_as_it_came(server, worker, monkeypatch):
    # Decoded here, a large one would hold the interpreter's lock, and vLLM's event loop with it.
    came, decode = [], answers.parse_train_body
    monkeypatch.setattr(answers, "parse_train_body", lambda body: came.append(body) or decode(body))
    body = json.dumps({"examples": [{"prompt": "p" * 1000, "completion": "c"}] * 500}, indent=3).encode()
    sent = server.http.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert sent.json()["num_examples"] == 500
    assert came == [body]


def test_what_may_be_queued_is_said_with_the_key_under_which_it_trains_once(server, config):
    child = start_worker(config.runtime_dir)
    try:
        wait_for(lambda: server.http.get("/train/status").status_code == 200, 30)
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: set(thread_states(child.pid)) == {"T"}, 10)
        refused = server.http.post("/train", json=ONE)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_acknowledged")
        os.kill(child.pid, signal.SIGCONT)
        wait_for(lambda: server.http.get("/train/status").status_code == 200, 30)
        key = {"Idempotency-Key": refused.headers["idempotency-key"]}
        again = server.http.post("/train", json=ONE, headers=key)
        assert again.status_code == 202
        listed = server.http.get("/train/jobs").json()["data"]
        assert [job["job_id"] for job in listed] == [again.json()["job_id"]]
    finally:
        end(child)


def test_the_same_key_and_body_give_the_same_job_and_another_body_is_refused(server, worker):
    key = {"Idempotency-Key": "one"}
    first, again = (server.http.post("/train", json=ONE, headers=key).json() for _ in range(2))
    assert first["job_id"] == again["job_id"]
    other = server.http.post("/train", json=ONE | {"options": {"epochs": 2}}, headers=key)
    assert (other.status_code, error_of(other)["code"]) == (422, "conflict")
    for bad in ("", "x" * 256, "tab\there"):
        assert server.http.post("/train", json=ONE, headers={"Idempotency-Key": bad}).status_code == 400


def test_waiting_answers_with_the_losses_when_the_weights_are_served(server, worker, config):
    share_weights(config, "boot-a")
    worker.board.state.vllm_boot_id = "boot-a"
    server.http.get("/train/health")  # looks at the manifest at once
    time.sleep(1.2)  # the next Hello tells the worker
    training = worker.in_background(worker.train_one)
    response = server.http.post("/train?wait=true", json={"examples": ONE["examples"] * 3})
    training.join()
    answer = response.json()
    assert (response.status_code, answer["status"], answer["weight_version"]) == (200, "applied", 1)
    assert answer["loss_history"] == [2.0, 1.0, 2.0 / 3]
    assert server.engine.calls == [("reset_prefix_cache", True, False)]


@pytest.mark.parametrize("ends", ["failed", "cancelled"])
def test_waiting_for_a_job_that_is_not_trained_is_an_error_with_the_job(server, worker, ends):
    training = worker.in_background(worker.train_one, ends=ends, error="the loss is not finite")
    response = server.http.post("/train?wait=true", json=ONE)
    training.join()
    assert (response.status_code, error_of(response)["code"]) == (422, f"job_{ends}")
    assert "not finite" in error_of(response)["message"]
    assert response.json()["job"]["loss_history"] == [2.0]


def test_a_client_that_goes_away_while_it_waits_does_not_cancel_the_job(server, worker):
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/train?wait=true", json=ONE, timeout=0.5)
    worker.train_one()
    assert [job.state for job in worker.queue.list()] == ["applied"]


def test_waiting_ends_when_the_server_stops(config, worker):
    answers = []
    with Server() as server:
        client = server.client(TRAIN_KEY)
        asking = threading.Thread(target=lambda: answers.append(client.post("/train?wait=true", json=ONE)))
        asking.start()
        wait_for(lambda: worker.queue.count("queued") == 1)
    asking.join(5)
    assert answers[0].status_code == 503
    assert worker.queue.count("queued") == 1


def test_waiting_has_a_limit(config, worker, monkeypatch):
    monkeypatch.setenv("APOLLO_HTTP__WAIT_TIMEOUT_S", "0.5")
    with Server() as server:
        response = server.http.post("/train?wait=true", json=ONE)
    assert (response.status_code, response.json()["status"]) == (202, "queued")


def test_events_follow_a_job_to_its_end(server, worker):
    job_id = server.http.post("/train", json={"examples": ONE["examples"] * 3}).json()["job_id"]
    training = worker.in_background(worker.train_one, step_s=0.25)
    response = server.http.get(f"/train/jobs/{job_id}/events")
    training.join()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\ndata: ") for event in response.text.strip().split("\n\n")]
    assert {name for name, _ in events[:-1]} == {"event: job"}
    assert [json.loads(data)["steps_done"] for _, data in events][-2:] == [3, 3]
    last, data = events[-1]
    assert last == "event: end"
    assert json.loads(data)["loss_history"] == [2.0, 1.0, 2.0 / 3]
    assert server.http.get("/train/jobs/none/events").status_code == 404


def test_a_queued_job_is_cancelled_and_an_ended_one_is_not(server, worker):
    job_id = server.http.post("/train", json=ONE).json()["job_id"]
    assert server.http.delete(f"/train/jobs/{job_id}").json()["state"] == "cancelled"
    again = server.http.delete(f"/train/jobs/{job_id}")
    assert (again.status_code, error_of(again)["code"]) == (409, "job_ended")


def test_a_checkpoint_tells_what_it_wrote(server, worker):
    syncing = worker.in_background(worker.answer_sync)
    response = server.http.post("/checkpoint")
    syncing.join()
    answer = response.json()
    assert (answer["bytes_compared"], answer["bytes_written"], answer["duration_s"]) == (1000, 200, 0.5)
    refused = server.http.post("/checkpoint", json={"full": True})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "full")
    refused = server.http.post("/checkpoint", json={"kind": "half"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "kind")


@pytest.mark.parametrize(("body", "kind"), [(None, "full"), ({}, "full"), ({"kind": "delta"}, "delta")])
def test_a_checkpoint_may_be_asked_for_as_a_delta(server, worker, body, kind):
    asked = []

    def answer() -> None:
        asked.append(worker.board.asked.get(timeout=5))
        asked[0].done.set_result(SyncResult(3, 1.0, 10, 2, 1, 1000, 200, 0.5, kind=kind))

    syncing = worker.in_background(answer)
    assert server.http.post("/checkpoint", json=body).json()["kind"] == kind
    syncing.join()
    assert asked[0].request.kind == kind


def test_a_bug_in_the_worker_reaches_the_client_without_a_traceback(server, worker, caplog):
    worker.board.admit = lambda request: 1 // 0
    response = server.http.post("/train", json=ONE)
    assert (response.status_code, error_of(response)["type"]) == (500, "internal_error")
    assert "Traceback" not in response.text
    assert "Traceback" in caplog.text


def test_a_bug_in_the_router_is_an_error_of_our_own(server, monkeypatch):
    monkeypatch.setattr("apollo_router.routes.read_query", lambda *_: 1 // 0)
    response = server.http.get("/train/status")
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")


def test_several_api_servers_share_one_worker(config, worker):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import router_harness as h\n"
        "with h.Server() as server:\n  print(server.port, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(SUPPORT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    servers = [
        subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONUNBUFFERED": "1"}) for _ in range(2)
    ]
    try:
        urls = [f"http://127.0.0.1:{int(server.stdout.readline())}" for server in servers]
        headers = {"Authorization": f"Bearer {TRAIN_KEY}"}
        answers = [httpx.post(f"{url}/train", json=ONE, headers=headers) for url in urls * 2]
        assert len({answer.json()["job_id"] for answer in answers}) == 4
        keyed = [
            httpx.post(f"{url}/train", json=ONE, headers=headers | {"Idempotency-Key": "k"}) for url in urls
        ]
        assert len({answer.json()["job_id"] for answer in keyed}) == 1
    finally:
        for server in servers:
            server.send_signal(signal.SIGKILL)
            server.communicate()
