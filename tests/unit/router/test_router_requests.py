"""What the HTTP routes refuse: whoever may not train, and bodies, parameters and methods that are none."""

from __future__ import annotations

import itertools
import socket

import pytest
from apollo_router.plugin import ApolloEndpoints
from router_harness import (
    INFERENCE_KEY,
    MAX_BODY_BYTES,
    ONE,
    TRAIN_KEY,
    Server,
    error_of,
)

from apollo_ipc.errors import ConfigError

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
def test_a_wrong_body_is_refused_with_the_path_of_the_field(server, worker, body, param, says):
    response = server.http.post("/train", json=body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 30_000, b"\x80\x04K\x01."]
)
def test_what_is_not_json_is_refused(server, worker, body):
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


def test_a_version_that_no_file_can_hold_is_refused_by_name(server, worker):
    for path in ("/checkpoint/restore", "/checkpoint/pin"):
        error = error_of(server.http.post(path, json={"version": 10**40}))
        assert (error["code"], error["param"]) == ("invalid_request", "version")
    assert error_of(server.http.get("/train/jobs?before=" + "9" * 30))["param"] == "before"


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


@pytest.mark.parametrize("text", [rb"\ud800", rb"a\uDC00b", rb"\ud83d and \ude00"])
def test_half_of_a_surrogate_pair_is_named(server, worker, text):
    body = b'{"examples": [{"prompt": "a", "completion": "%s"}]}' % text
    response = server.http.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")
    assert "half of a surrogate pair" in error_of(response)["message"]


def test_a_cut_body_is_not_taken_for_one_with_half_a_pair(server, worker):
    body = rb'{"examples": [{"prompt": "\\ud800 \ud83d\ude00"'
    response = server.http.post("/train", content=body, headers={"Content-Type": "application/json"})
    assert "truncated" in error_of(response)["message"]


@pytest.mark.parametrize(("path", "body"), [("/train", ONE), ("/teach", {"text": "The tower has 9 steps."})])
def test_the_location_of_a_job_leads_through_the_root_path(server, worker, path, body):
    server.app.root_path = "/models/mine"
    try:
        location = server.http.post(path, json=body).headers["location"]
    finally:
        server.app.root_path = ""
    assert location.startswith(f"/models/mine{path}/jobs/")
    assert server.http.get(location.removeprefix("/models/mine")).status_code == 200


def test_a_long_list_of_jobs_is_paged_by_seq(server, worker):
    for _ in range(5):
        server.http.post("/train", json=ONE)
    seen, before = [], {}
    while page := server.http.get("/train/jobs", params={"limit": 2, **before}).json()["data"]:
        seen += [job["seq"] for job in page]
        before = {"before": page[-1]["seq"]}
    assert seen == [5, 4, 3, 2, 1]
    assert error_of(server.http.get("/train/jobs?before=0"))["param"] == "before"
