"""The HTTP routes, over a real socket, before a real service and queue."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from apollo_router.plugin import ApolloEndpoints
from router_harness import (
    INFERENCE_KEY,
    MAX_BODY_BYTES,
    ONE,
    TRAIN_KEY,
    FakeEngine,
    FakeWorker,
    Server,
    make_config,
    share_weights,
    wait_until,
)

from apollo_ipc.errors import ConfigError
from apollo_ipc.messages import SyncResult


@pytest.fixture
def config(monkeypatch):
    for name in ("RUNTIME_DIR", "STATE_DIR"):
        monkeypatch.setenv(f"APOLLO_PATHS__{name}", "")
    for name in ("TRAIN_KEY", "MAX_BODY_BYTES", "WAIT_TIMEOUT_S"):
        monkeypatch.setenv(f"APOLLO_HTTP__{name}", "1024")
    monkeypatch.delenv("APOLLO_HTTP__WAIT_TIMEOUT_S")
    config = make_config()
    yield config
    shutil.rmtree(config.runtime_dir.parent)


@pytest.fixture
def server(config):
    with Server() as server:
        yield server


@pytest.fixture
def worker(config):
    with FakeWorker(config) as worker:
        yield worker


ROUTES = [
    ("POST", "/train"),
    ("POST", "/train?wait=true"),
    ("GET", "/train/status"),
    ("GET", "/train/jobs"),
    ("GET", "/train/jobs/x"),
    ("DELETE", "/train/jobs/x"),
    ("GET", "/train/jobs/x/events"),
    ("POST", "/checkpoint"),
]

HEAD = f"POST /train HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TRAIN_KEY}\r\n"


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- who may train ---


def test_every_route_refuses_a_request_without_the_train_key(server):
    with server.client(None) as nobody, server.client(INFERENCE_KEY) as reader:
        for method, path in ROUTES:
            missing = nobody.request(method, path)
            assert (missing.status_code, error_of(missing)["code"]) == (401, "missing_train_key")
            assert missing.headers["www-authenticate"].startswith("Bearer")
            wrong = reader.request(method, path)
            assert (wrong.status_code, error_of(wrong)["code"]) == (403, "wrong_train_key")


def test_a_malformed_authorization_is_refused(server):
    values = ["", "Bearer", "Bearer ", f"Basic {TRAIN_KEY}", TRAIN_KEY, "Bearer ключ", "Bearer \x00"]
    for value in values:
        head = f"GET /train/status HTTP/1.1\r\nHost: x\r\nAuthorization: {value}\r\nConnection: close\r\n\r\n"
        answer = raw(server, head.encode())
        assert answer.split(b" ")[1] in (b"400", b"401", b"403"), value  # 400: not HTTP at all


def test_no_form_of_path_or_host_passes_the_key_check(server, worker):
    targets = [
        "//train/status",
        "/./train/status",
        "/v1/../train/status",
        "/train%2Fstatus",
        "/%74rain/status",
        "/train/status/",
        "/train/status?x",
        "/train/status;x",
        "/train//status",
        "http://other/train/status",
        "/TRAIN/STATUS",
    ]
    for target, host in itertools.product(targets, ["127.0.0.1", "a/health?", "x/train/health#", "[::1"]):
        answer = raw(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"307", b"400", b"401", b"404"), (target, host, answer)
        assert b"worker_boot_id" not in answer


def test_a_key_that_may_ask_cannot_also_be_the_train_key(config, monkeypatch):
    monkeypatch.setenv("APOLLO_HTTP__TRAIN_KEY", INFERENCE_KEY)
    with pytest.raises(ConfigError, match="api-key"), Server():
        pass


def test_a_factory_that_fails_says_so_loudly(monkeypatch, caplog):
    monkeypatch.setenv("APOLLO_HTTP__TRAIN_KEYS", "x")
    with caplog.at_level("CRITICAL"), pytest.raises(ConfigError):
        ApolloEndpoints()
    assert "/train WILL BE MISSING" in caplog.text
    assert "did you mean 'train_key'" in caplog.text


# --- what a body must be ---


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"exampels": []}, "exampels", "did you mean 'examples'?"),
        ({"examples": [{"messages": []}]}, "examples[0].messages", "empty"),
        ({"examples": [{"prompt": "a"}]}, "examples[0].completion", "missing"),
        (ONE | {"options": {"lr": -1}}, "options.lr", "> 0"),
        (ONE | {"options": {"epoch": 1}}, "options.epoch", "did you mean 'epochs'?"),
        ({"examples": []}, "examples", "length"),
        ({"training_data": {"samples": [{"prompt": "a"}]}}, "training_data.samples[0].completion", "missing"),
        ([], None, "send an object"),
    ],
)
def test_a_wrong_body_is_refused_with_the_path_of_the_field(server, body, param, says):
    response = server.http.post("/train", json=body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 30_000, b"\x80\x04K\x01."]
)
def test_what_is_not_json_is_refused(server, body):
    response = server.http.post("/train", content=body)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_a_form_is_refused_with_what_to_send_instead(server):
    response = server.http.post("/train", data={"a": "b"})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_a_body_over_the_cap_is_refused_and_memory_stays_flat(server):
    block = b"x" * MAX_BODY_BYTES
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): resets VmHWM
    before = peak_bytes()
    chunked = server.http.post("/train", content=(block for _ in range(100)))
    declared = server.http.post(
        "/train", content=(block for _ in range(100)), headers={"Content-Length": "104857600"}
    )
    for response in (chunked, declared):
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    # The cap, twice when it is joined, and the client's own block: far below the 100 MB that were sent.
    assert peak_bytes() - before < 20 * 1024 * 1024


def test_a_declared_size_over_the_cap_is_refused_before_the_body_is_sent(server):
    head = HEAD + "Content-Length: 99999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_arrive_times_out(server, monkeypatch):
    monkeypatch.setattr("apollo_router.body.BODY_TIMEOUT_S", 0.3)
    head = HEAD + "Content-Length: 99\r\n\r\n"
    assert raw(server, head.encode()).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("query", "param", "says"),
    [
        ("wait=maybe", "wait", "bool"),
        ("wiat=true", "wiat", "did you mean 'wait'?"),
        ("wait=true&wait=false", "wait", "twice"),
    ],
)
def test_a_wrong_query_parameter_is_refused(server, query, param, says):
    response = server.http.post(f"/train?{query}", json=ONE)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_a_limit_out_of_range_and_an_unknown_state_are_refused(server):
    for query in ("limit=0", "limit=x", "limit=1001", "state=done"):
        assert server.http.get(f"/train/jobs?{query}").status_code == 400


def test_a_method_that_a_route_does_not_know_is_an_error_of_our_own(server):
    response = server.http.put("/train", json=ONE)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["code"] == "method_not_allowed"


# --- the worker ---


def test_without_a_worker_every_answer_is_503_within_a_second(server):
    for method, path in [("POST", "/train"), ("GET", "/train/status"), ("POST", "/checkpoint")]:
        started = time.monotonic()
        response = server.http.request(method, path, json={} if path == "/checkpoint" else ONE)
        assert time.monotonic() - started < 1
        assert (response.status_code, error_of(response)["code"]) == (503, "worker_not_running")
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
    request = worker.queue.take().request
    assert (request.options.lr, request.options.epochs) == (1e-5, 2)


def test_a_large_body_is_accepted_off_the_event_loop(server, worker):
    body = {"examples": [{"prompt": "p" * 1000, "completion": "c"}] * 500}
    assert server.http.post("/train", json=body).json()["num_examples"] == 500


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
    worker.shared.vllm_boot_id = "boot-a"
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
        wait_until(lambda: worker.queue.count_queued() == 1)
    asking.join(5)
    assert answers[0].status_code == 503
    assert worker.queue.count_queued() == 1


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
        asked.append(worker.shared.asked.get(timeout=5))
        asked[0].done.set_result(SyncResult(3, 1.0, 10, 2, 1, 1000, 200, 0.5, kind=kind))

    syncing = worker.in_background(answer)
    assert server.http.post("/checkpoint", json=body).json()["kind"] == kind
    syncing.join()
    assert asked[0].request.kind == kind


def test_a_bug_in_the_worker_reaches_the_client_without_a_traceback(server, worker, caplog):
    worker.shared.admit = lambda request: 1 // 0
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
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
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
        wait_until(lambda: "not attached" in health()[1])
        worker.shared.vllm_boot_id, worker.shared.attached = "boot-b", True
        wait_until(lambda: "another vLLM" in health()[1])
        worker.shared.vllm_boot_id = "boot-a"
        wait_until(lambda: health() == (200, "boot-a"))
    wait_until(lambda: "does not answer" in health()[1])
    child = subprocess.Popen(["true"])
    share_weights(config, "boot-a", pid=child.pid)
    child.wait()
    assert "has ended" in health()[1]


def test_publishing_drops_the_prefix_cache_and_is_counted(config, worker):
    share_weights(config, "boot-a")
    worker.shared.vllm_boot_id = "boot-a"
    with Server(FakeEngine(multimodal=True)) as server:
        worker.shared.weight_version = 1
        wait_until(lambda: worker.service.publish(1, timeout_s=1.0))
        assert server.engine.calls[:2] == [("reset_prefix_cache", True, False), ("reset_encoder_cache",)]
        from prometheus_client import generate_latest

        time.sleep(1.2)  # the gauge is set once a second
        text = generate_latest().decode()
    assert "apollo_weight_version 1.0" in text
    assert "apollo_cache_drop_seconds_count" in text
    assert "apollo_train_requests_total" in text


def test_a_cache_that_vllm_keeps_is_not_reported_as_dropped(config, worker):
    share_weights(config, "boot-a")
    worker.shared.vllm_boot_id = "boot-a"
    with Server(FakeEngine(clears=False)) as server:
        worker.shared.weight_version = 1
        wait_until(lambda: len(server.engine.calls) > 0)
        assert not worker.service.publish(1, timeout_s=1.0)


def test_no_request_is_preempted_where_there_is_no_prefix_cache(config, worker):
    share_weights(config, "boot-a")
    worker.shared.vllm_boot_id = "boot-a"
    with Server(FakeEngine(prefix_caching=False)) as server:
        worker.shared.weight_version = 1
        wait_until(lambda: worker.service.publish(1, timeout_s=1.0))
        assert server.engine.calls == []


# --- helpers ---


def raw(server: Server, request: bytes) -> bytes:
    """All that the server answers to these bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def peak_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
