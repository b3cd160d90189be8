"""Watching traffic: what is recorded of chat completions, what never is, and that serving does not notice."""

from __future__ import annotations

import json
import os
import stat
import threading
import time

import httpx
import pytest
from apollo_router.spool import FILE_BYTES, Spool
from apollo_router.traffic import joined
from router_harness import FakeEngine, Server, error_of
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from waiting import wait_for

PRIVATE = "a-key-that-is-never-recorded"
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


@pytest.fixture
def spool_dir(config, monkeypatch, tmp_path):
    monkeypatch.setenv("APOLLO_TRAFFIC__DIRECTORY", str(tmp_path / "traffic"))
    monkeypatch.setenv("APOLLO_TRAFFIC__UNRECORDED_KEY", PRIVATE)
    return tmp_path / "traffic"


@pytest.fixture
def chat(spool_dir):
    """A server whose chats are answered as their last message says."""
    server = Server(FakeEngine())
    server.app.post("/v1/chat/completions")(answer)
    with server:
        yield server


async def answer(request: Request):
    body = await request.json()
    told = json.loads(body["messages"][-1]["content"]) if body.get("told") else {"content": "fine"}
    number = body.get("number", 0)
    if body.get("fails"):
        return JSONResponse({"error": {"message": "no"}}, 400)
    message = {"role": "assistant", "content": None, **told}
    choice = {"index": 0, "message": message, "finish_reason": body.get("finish", "stop")}
    if body.get("stream"):
        return StreamingResponse(pieces(number, message, body), media_type="text/event-stream")
    return JSONResponse({"id": f"chatcmpl-{number}", "created": 5, "choices": [choice]})


async def pieces(number, message, body):
    deltas = [{"role": "assistant"}, *({"content": one} for one in message.get("content") or "")]
    for i, call in enumerate(message.get("tool_calls") or []):
        start = {
            "index": i,
            "id": call["id"],
            "function": {"name": call["function"]["name"], "arguments": ""},
        }
        rest = [{"index": i, "function": {"arguments": one}} for one in call["function"]["arguments"]]
        deltas += [{"tool_calls": [one]} for one in (start, *rest)]
    for delta in deltas:
        event = {"id": f"chatcmpl-{number}", "created": 5, "choices": [{"index": 0, "delta": delta}]}
        yield f"data: {json.dumps(event)}\n\n"
        if body.get("breaks"):
            return
    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
    yield f"data: {json.dumps({'id': f'chatcmpl-{number}', 'choices': [last]})}\n\ndata: [DONE]\n\n"


def ask(server, *texts, key=None, headers=None, **more) -> httpx.Response:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    sent = ({"Authorization": f"Bearer {key}"} if key else {}) | (headers or {})
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    return httpx.post(url, json={"messages": messages, **more}, headers=sent, timeout=20)


def recorded(server, directory) -> list[dict]:
    """What is there when the server has stopped."""
    server.uvicorn.should_exit = True
    server.thread.join(10)
    lines = [line for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_recorded_as_openai_writes_it(chat, spool_dir, stream):
    told = json.dumps({"content": "It is 2.", "tool_calls": [CALL]})
    assert (
        ask(chat, told, told=True, stream=stream, number=7, tools=[{"type": "function"}]).status_code == 200
    )
    [record] = recorded(chat, spool_dir)
    assert record == {
        "completion_id": "chatcmpl-7",
        "created": 5,
        "messages": [
            {"role": "user", "content": told},
            {"role": "assistant", "content": "It is 2.", "tool_calls": [CALL]},
        ],
        "tools": [{"type": "function"}],
    }
    [file] = spool_dir.iterdir()
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(spool_dir.stat().st_mode)) == (0o600, 0o700)


def test_a_conversation_that_goes_on_is_one_record_with_what_came_next(chat, spool_dir):
    ask(chat, "a", number=1)
    ask(chat, "another", number=2)
    ask(chat, "a", "fine", "no, that is wrong", number=3)
    found = {record["completion_id"]: record["messages"] for record in recorded(chat, spool_dir)}
    assert set(found) == {"chatcmpl-2", "chatcmpl-3"}
    assert [one["content"] for one in found["chatcmpl-3"]] == ["a", "fine", "no, that is wrong", "fine"]


@pytest.mark.parametrize(
    "request_",
    [
        {"headers": {"X-Apollo-Learn": "no"}},
        {"key": PRIVATE},
        {"fails": True},
        {"stream": True, "breaks": True},
    ],
    ids=["opted out", "private key", "refused", "broken off"],
)
def test_what_is_never_recorded(chat, spool_dir, request_):
    ask(chat, "secret", **request_)
    ask(chat, "open", key="another-key", number=9)
    assert [record["completion_id"] for record in recorded(chat, spool_dir)] == ["chatcmpl-9"]


def test_an_answer_that_was_cut_off_is_kept_and_never_learned(chat, spool_dir):
    ask(chat, "a", finish="length")
    assert recorded(chat, spool_dir)[0]["messages"][-1]["weight"] == 0


def test_images_are_named_without_their_data(chat, spool_dir):
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:xyz"}}]
    url = f"http://127.0.0.1:{chat.port}/v1/chat/completions"
    httpx.post(url, json={"messages": [{"role": "user", "content": parts}]})
    said = recorded(chat, spool_dir)[0]["messages"][0]["content"]
    assert said == [{"type": "text", "text": "what?"}, {"type": "image_url"}]


def test_without_the_option_nothing_is_recorded(config, tmp_path):
    server = Server(FakeEngine())
    server.app.post("/v1/chat/completions")(answer)
    with server:
        assert ask(server, "a").status_code == 200
        response = server.http.post("/feedback", json={"completion_id": "chatcmpl-0", "rating": "up"})
        assert (response.status_code, error_of(response)["code"]) == (409, "traffic_off")
    assert not list(tmp_path.iterdir())


def test_feedback_is_recorded_with_the_whole_context_also_after_a_restart(chat, spool_dir):
    ask(chat, "a", "b", "c", number=4)
    wait_for(lambda: rate(chat, 4, rating="down").status_code == 202)
    assert rate(chat, 5, rating="down").status_code == 404
    recorded(chat, spool_dir)
    server = Server(FakeEngine())
    with server:
        assert rate(server, 4, correction="It is d.").status_code == 202
    records = [json.loads(line) for file in spool_dir.iterdir() for line in file.read_text().splitlines()]
    told = [record for record in records if "feedback" in record]
    assert [record["feedback"] for record in sorted(told, key=str)] == [
        {"rating": "down"} if "rating" in record["feedback"] else {"correction": "It is d."}
        for record in sorted(told, key=str)
    ]
    assert len(told) == 2
    assert all([one["content"] for one in record["messages"]] == ["a", "b", "c", "fine"] for record in told)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"completion_id": "x"}, "rating"),
        ({"completion_id": "x", "rating": "up", "correction": "y"}, "rating"),
        ({"completion_id": "x", "rating": "great"}, "rating"),
        ({"completion_id": "x", "correction": "  "}, "correction"),
    ],
)
def test_feedback_that_says_nothing_or_two_things_is_refused_at_its_field(chat, body, field):
    response = chat.http.post("/feedback", json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, field)


def test_feedback_needs_the_train_key(chat):
    with chat.client(None) as anyone:
        assert anyone.post("/feedback", json={"completion_id": "x", "rating": "up"}).status_code == 401


def rate(server, number: int, **said) -> httpx.Response:
    return server.http.post("/feedback", json={"completion_id": f"chatcmpl-{number}", **said})


class Said:
    def __init__(self, number: int, size: int = 10):
        self.number, self.size = number, size

    def record(self):
        messages = [{"role": "user", "content": f"{self.number} " + "x" * self.size}]
        return {
            "completion_id": str(self.number),
            "messages": [*messages, {"role": "assistant", "content": "y"}],
        }


def test_the_spool_stays_below_its_cap_and_the_oldest_go(tmp_path):
    spool = Spool(tmp_path / "s", 3 * FILE_BYTES, hold_s=0.0)
    spool.open()
    for number in range(20):
        spool.take(Said(number, FILE_BYTES // 4))
        wait_for(spool._waiting.empty)
    spool.close()
    files = sorted(spool.directory.iterdir())
    assert sum(file.stat().st_size for file in files) <= 3 * FILE_BYTES + FILE_BYTES // 4
    assert spool.find("19") is not None
    assert spool.find("0") is None


def test_a_writer_that_is_behind_costs_a_record_and_never_waits(tmp_path):
    held, spool = threading.Event(), Spool(tmp_path / "s", 1 << 30)

    class Slow(Said):
        def record(self):
            held.wait(10)
            return super().record()

    spool.open()
    started = time.monotonic()
    for number in range(2000):
        spool.take(Slow(number))
    assert time.monotonic() - started < 1
    assert spool.num_missed > 1000
    held.set()
    spool.close()


def test_a_record_that_cannot_be_read_costs_itself_only(tmp_path):
    class Odd(Said):
        def record(self):
            return {"messages": [5], "completion_id": None}

    spool = Spool(tmp_path / "s", 1 << 30)
    spool.open()
    spool.take(Odd(0))
    spool.take(Said(1))
    spool.close()
    assert spool.find("1") is not None


def test_an_error_within_a_stream_is_no_answer():
    assert joined(b'data: {"id": "a", "choices": []}\n\ndata: {"error": {"message": "x"}}\n\n') is None


def test_the_layer_costs_little(config, spool_dir):
    """Beside the same server without it, in turns: a tenth of a request's time and 2 ms at most."""
    took: dict[bool, list[float]] = {True: [], False: []}
    servers = {}
    for is_watched in took:
        os.environ["APOLLO_TRAFFIC__DIRECTORY"] = str(spool_dir) if is_watched else ""
        servers[is_watched] = Server(FakeEngine())
        servers[is_watched].app.post("/v1/chat/completions")(answer)
    with servers[True], servers[False]:
        for number in range(60):
            for is_watched, server in servers.items():
                started = time.perf_counter()
                ask(server, f"{number} " + "x" * 20_000)
                took[is_watched].append(time.perf_counter() - started)
    watched, plain = (sorted(took[one])[len(took[one]) // 2] for one in (True, False))
    assert watched < 1.1 * plain + 0.002
