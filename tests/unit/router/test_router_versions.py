"""Health, the caches that are dropped, and older versions."""

from __future__ import annotations

import os
import subprocess
import time

import httpx
import msgspec
import pytest
from router_harness import (
    ONE,
    FakeEngine,
    FakeWorker,
    Server,
    error_of,
    share_weights,
)
from synced_weights import Live, make_model
from waiting import wait_for

from apollo_ipc.checkpoint import begin
from apollo_ipc.errors import Conflict
from apollo_ipc.wire.replies import Previewed, RestoreResult

# --- health and caches ---


def test_health_is_200_only_while_the_worker_is_attached_to_this_vllm(server, config):
    def health() -> tuple[int, str]:
        response = httpx.get(f"http://127.0.0.1:{server.port}/train/health")  # no key
        if response.status_code == 200:
            return 200, response.json()["vllm_boot_id"]
        assert response.headers["retry-after"]
        return response.status_code, error_of(response)["message"]

    assert health() == (
        503,
        f"vLLM has not shared its weights in {config.runtime_dir} (started with --load-format apollo?)",
    )
    share_weights(config, "boot-a", pid=os.getppid())
    assert "another vLLM" in health()[1]
    share_weights(config, "boot-a")
    assert "does not answer" in health()[1]
    with FakeWorker(config) as worker:
        wait_for(lambda: "not attached" in health()[1])
        worker.board.state.vllm_boot_id, worker.board.state.attached = "boot-b", True
        wait_for(lambda: "another vLLM" in health()[1])
        worker.board.state.vllm_boot_id = "boot-a"
        wait_for(lambda: health() == (200, "boot-a"))
    wait_for(lambda: "does not answer" in health()[1])
    child = subprocess.Popen(["true"])
    share_weights(config, "boot-a", pid=child.pid)
    child.wait()
    assert "has ended" in health()[1]


def test_publishing_drops_the_prefix_cache_and_is_counted(config, worker):
    share_weights(config, "boot-a")
    worker.board.state.vllm_boot_id = "boot-a"
    with Server(FakeEngine(multimodal=True)) as server:
        worker.board.state.weight_version = 1
        wait_for(lambda: worker.server.publish(1, timeout_s=1.0))
        assert server.engine.calls[:2] == [("reset_prefix_cache", True, False), ("reset_encoder_cache",)]
        from prometheus_client import generate_latest

        time.sleep(1.2)  # the gauge is set once a second
        text = generate_latest().decode()
    assert "apollo_weight_version 1.0" in text
    assert "apollo_cache_drop_seconds_count" in text
    assert "apollo_train_requests_total" in text


def test_a_cache_that_vllm_keeps_is_not_reported_as_dropped(config, worker):
    share_weights(config, "boot-a")
    worker.board.state.vllm_boot_id, worker.board.state.attached = "boot-a", True
    with Server(FakeEngine(clears=False)) as server:
        worker.board.state.weight_version = 1
        wait_for(lambda: len(server.engine.calls) > 0)
        assert not worker.server.publish(1, timeout_s=1.0)


def test_no_request_is_preempted_where_there_is_no_prefix_cache(config, worker):
    share_weights(config, "boot-a")
    worker.board.state.vllm_boot_id = "boot-a"
    with Server(FakeEngine(prefix_caching=False)) as server:
        worker.board.state.weight_version = 1
        wait_for(lambda: worker.server.publish(1, timeout_s=1.0))
        assert server.engine.calls == []


# --- older versions ---


def answer(worker, result) -> None:
    asked = worker.board.asked.get(timeout=5)
    if isinstance(result, Exception):
        asked.done.set_exception(result)
    else:
        asked.done.set_result(result)


def test_a_restore_goes_to_the_trainer_and_answers_what_it_did(server, worker):
    done = RestoreResult(3, 9, 56, 2, 0, True, 1.2)
    thread = worker.in_background(answer, worker, done)
    response = server.http.post("/checkpoint/restore", json={"version": 3})
    thread.join(5)
    assert (response.status_code, response.json()) == (200, msgspec.to_builtins(done))


def test_a_restore_while_a_job_trains_is_409_with_a_code(server, worker):
    running = Conflict("a job is being trained; wait for its end or cancel it", code="job_running")
    running.http_status = 409
    worker.in_background(answer, worker, running)
    response = server.http.post("/checkpoint/restore", json={"version": 3})
    assert (response.status_code, error_of(response)["code"]) == (409, "job_running")


@pytest.mark.parametrize("route", ["restore", "pin"])
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, None, "missing required field `version`"),
        ({"version": "3"}, "version", "Expected `int"),
        ({"version": -1}, "version", ">= 0"),
        ({"version": 3, "live": True}, "live", "known here: version"),
        ([], None, "Expected `object`"),
    ],
)
def test_a_wrong_version_is_refused_with_the_field(server, worker, route, body, param, words):
    response = server.http.post(f"/checkpoint/{route}", json=body)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_a_version_is_pinned_and_shown_in_the_history(server, worker, tmp_path):
    live = Live(make_model(tmp_path / "model"))
    for path, body in (("pin", {"version": 1}), ("history", None)):
        response = server.http.request("POST" if body else "GET", f"/checkpoint/{path}", json=body)
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready"), "no model is known"
    worker.board.state.model_path = str(live.model_dir)
    response = server.http.get("/checkpoint/history")
    assert response.status_code == 400
    assert "nothing was synced here yet" in error_of(response)["message"]
    for _ in range(2):
        live.train()
        live.sync("full")
    pinned = server.http.post("/checkpoint/pin", json={"version": 1})
    assert pinned.json() == {"model_dir": str(live.model_dir), "pinned": 1, "pinned_before": None}
    shown = server.http.get("/checkpoint/history").json()
    assert shown["model_dir"] == str(live.model_dir)
    assert [(one["weight_version"], one["is_pinned"]) for one in shown["versions"]] == [
        *((0, False), (1, True), (2, False)),
    ]
    missing = server.http.post("/checkpoint/pin", json={"version": 9})
    assert (missing.status_code, error_of(missing)["param"]) == (400, "version")
    assert "there are: 0, 1, 2" in error_of(missing)["message"]
    freed = server.http.post("/checkpoint/pin", json={"version": None})
    assert freed.json()["pinned_before"] == 1


def test_a_pin_waits_for_a_sync_and_other_questions_do_not_wait_for_it(server, worker, tmp_path):
    live = Live(make_model(tmp_path / "model"))
    live.train()
    live.sync("full")
    worker.board.state.model_path = str(live.model_dir)
    with begin(live.model_dir):
        found = []
        thread = worker.in_background(
            lambda: found.append(server.http.post("/checkpoint/pin", json={"version": 1}))
        )
        time.sleep(0.2)
        started = time.monotonic()
        assert server.http.get("/checkpoint/history").status_code == 200
        assert time.monotonic() - started < 1
        assert not found
    thread.join(10)
    assert found[0].json()["pinned"] == 1


def test_a_worker_that_stops_does_not_wait_for_a_busy_checkpoint(config, server, tmp_path):
    live = Live(make_model(tmp_path / "model"))
    live.train()
    live.sync("full")
    found = []
    with begin(live.model_dir):
        with FakeWorker(config) as worker:
            worker.board.state.model_path = str(live.model_dir)
            thread = worker.in_background(
                lambda: found.append(server.http.post("/checkpoint/pin", json={"version": 1}))
            )
            time.sleep(0.3)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        thread.join(10)
    assert (found[0].status_code, error_of(found[0])["code"]) == (503, "stopping")


def test_a_dry_run_shows_what_would_be_trained_and_queues_nothing(server, worker):
    seen = Previewed(0, 1, [1, 2], [3], "a", "b")
    worker.board.preview = lambda request: [seen] * len(request.examples)
    response = server.http.post("/train?dry_run=true", json=ONE)
    assert response.status_code == 200
    assert response.json() == [msgspec.to_builtins(seen)]
    assert worker.queue.count("queued") == 0
