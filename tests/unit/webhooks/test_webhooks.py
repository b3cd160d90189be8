"""The outbox and its sender: at least once, in order within a subject, to the configured URL alone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from socket import create_server

import httpx
import pytest

from apollo_ipc.config import load_config
from apollo_ipc.errors import ConfigError
from apollo_ipc.keys import webhook_secret
from apollo_ipc.webhooks import sender
from apollo_ipc.webhooks.outbox import Outbox, OutboxDamaged, event, outbox_path
from apollo_ipc.webhooks.sender import GIVE_UP_S, Sender, headers, key_of, new_client
from apollo_ipc.webhooks.tell import tell

URL = "http://hooks.test/in"
KEY = b"k" * 32
T0 = 1_800_000_000.0


@pytest.fixture
def outbox(tmp_path):
    outbox = Outbox(tmp_path / "webhooks.sqlite", [URL])
    yield outbox
    outbox.close()


class Receiver:
    """Answers as `answer` says: a status, or an exception to raise; keeps what it took, in order."""

    def __init__(self, answer=lambda request: 204):
        self.answer, self.taken, self.seen = answer, [], []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(str(request.url))
        result = self.answer(request)
        if isinstance(result, Exception):
            raise result
        if 200 <= result < 300:
            told = json.loads(request.content)
            self.taken.append((told["data"]["subject"], told["data"]["n"]))
        return httpx.Response(result, headers={"location": "http://elsewhere.test/"})


class Clock:
    """Time that passes only where the sender would wait."""

    def __init__(self, outbox, receiver):
        self.now = T0
        client = httpx.AsyncClient(transport=httpx.MockTransport(receiver), follow_redirects=False)
        self.sender = Sender(outbox, URL, KEY, client)

    def run(self, seconds: float) -> None:
        async def go():
            end = self.now + seconds
            while self.now < end:
                self.now += await self.sender.step(self.now) or 0.001

        asyncio.run(go())


def add(outbox, subject, n, now=T0):
    outbox.add(event("job.done", subject, {"subject": subject, "n": n}, T0), now)


def test_a_signature_is_that_of_standard_webhooks():
    key = key_of("whsec_" + base64.b64encode(KEY).decode())
    sent = headers(key, "evt_1", 1_700_000_000, b'{"a": 1}')
    signed = b'evt_1.1700000000.{"a": 1}'
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert sent["webhook-signature"] == f"v1,{expected}"
    assert (sent["webhook-id"], sent["webhook-timestamp"]) == ("evt_1", "1700000000")


def test_a_receiver_that_is_down_for_a_minute_gets_every_event_once_in_order(outbox):
    down_until = T0 + 60
    receiver = Receiver(lambda _: 204 if clock.now >= down_until else httpx.ConnectError("refused"))
    clock = Clock(outbox, receiver)
    for n in range(3):
        for subject in ("a", "b"):
            add(outbox, subject, n)
    clock.run(59)
    assert receiver.taken == []
    assert len(receiver.seen) < 10, "it is not hammered"
    clock.run(130)
    assert receiver.taken == [(subject, n) for n in range(3) for subject in ("a", "b")]
    assert [one.sent_at is not None for one in outbox.deliveries()] == [True] * 6


def test_an_error_for_one_subject_holds_back_its_later_events_and_no_other_subject(outbox):
    def answer(request):
        data = json.loads(request.content)["data"]
        return 500 if data == {"subject": "a", "n": 0} and clock.now < T0 + 300 else 200

    receiver = Receiver(answer)
    clock = Clock(outbox, receiver)
    for subject, n in (("a", 0), ("b", 0), ("a", 1), ("b", 1)):
        add(outbox, subject, n)
    clock.run(10)
    assert receiver.taken == [("b", 0), ("b", 1)]
    clock.run(1000)
    assert receiver.taken[2:] == [("a", 0), ("a", 1)]


def test_an_event_that_nobody_takes_is_given_up_after_days_and_later_ones_go_on(outbox):
    receiver = Receiver(lambda request: 410 if json.loads(request.content)["data"]["n"] == 0 else 200)
    clock = Clock(outbox, receiver)
    add(outbox, "a", 0)
    add(outbox, "a", 1)
    while clock.now < T0 + GIVE_UP_S + 7200:
        clock.now += 600
        clock.run(1)
    assert receiver.taken == [("a", 1)]
    assert outbox.deliveries()[1].error == "HTTP 410"
    assert outbox.deliveries()[1].gave_up_at is not None
    assert outbox.deliveries()[1].attempts > 50


def test_a_redirect_is_an_error_and_is_not_followed(outbox):
    receiver = Receiver(lambda _: 302)
    add(outbox, "a", 0)
    Clock(outbox, receiver).run(1)
    assert receiver.seen == [URL]
    assert outbox.deliveries()[0].error == "HTTP 302"


def test_a_sender_that_is_killed_between_sending_and_noting_sends_again(outbox, monkeypatch):
    receiver = Receiver()
    clock = Clock(outbox, receiver)
    add(outbox, "a", 0)
    add(outbox, "a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "note_sent", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clock.run(1)
    Clock(outbox, receiver).run(1)
    assert receiver.taken == [("a", 0), ("a", 0), ("a", 1)]


def test_an_event_that_is_added_twice_is_sent_once(outbox):
    told = event("job.done", "a", {"subject": "a", "n": 0}, T0, "evt_same")
    assert outbox.add(told)
    assert not outbox.add(told)
    receiver = Receiver()
    Clock(outbox, receiver).run(1)
    assert receiver.taken == [("a", 0)]


def test_a_url_that_is_no_longer_configured_gets_nothing_and_is_forgotten(tmp_path):
    old = Outbox(tmp_path / "webhooks.sqlite", [URL, "http://old.test/"])
    add(old, "a", 0)
    old.close()
    outbox, receiver = Outbox(tmp_path / "webhooks.sqlite", [URL]), Receiver()
    Clock(outbox, receiver).run(1)
    assert receiver.seen == [URL]
    outbox.forget(T0 + 1)
    assert outbox.deliveries() == []
    outbox.close()


def test_what_waits_is_not_forgotten(outbox):
    add(outbox, "a", 0)
    outbox.forget(T0 + 1)
    assert len(outbox.deliveries()) == 1


def test_a_change_that_fails_leaves_neither_the_event_nor_the_mark(outbox):
    def change():
        with outbox.transaction():
            add(outbox, "a", 0)
            outbox.set_mark("read", 7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert (outbox.deliveries(), outbox.mark("read")) == ([], None)


# --- on real sockets ---


@contextmanager
def raw_server(talk):
    """`talk(connection)` for each connection, in a thread; yields the URL and the requests."""
    requests = []
    with create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    requests.append(connection.recv(65536))
                    with suppress(OSError):
                        talk(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/in", requests
        listening.shutdown(2)


def attempt(tmp_path, url):
    async def go():
        async with new_client() as client:
            await Sender(outbox, url, KEY, client).step(T0)

    outbox = Outbox(tmp_path / "webhooks.sqlite", [url])
    add(outbox, "a", 0)
    asyncio.run(go())
    found = outbox.deliveries()[0]
    outbox.close()
    return found


def test_an_answer_that_drips_in_for_ever_costs_one_attempt_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "ATTEMPT_S", 0.4)

    def drip(connection):
        for byte in b"HTTP/1.1 200 OK\r\nx-long: " + b"y" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    with raw_server(drip) as (url, _):
        found = attempt(tmp_path, url)
    assert found.error == "no answer within 0.4 s"
    assert found.sent_at is None


def test_the_body_of_an_answer_is_not_read(tmp_path):
    def endless(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
        while True:
            connection.sendall(b"y" * 65536)

    with raw_server(endless) as (url, requests):
        found = attempt(tmp_path, url)
    assert found.sent_at == T0
    assert b"webhook-signature: v1," in requests[0]


def test_a_proxy_of_the_environment_sees_nothing(tmp_path, monkeypatch):
    def taken(connection):
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with raw_server(taken) as (url, requests), raw_server(taken) as (proxy, seen_by_proxy):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert attempt(tmp_path, url).sent_at == T0
    assert (len(requests), seen_by_proxy) == (1, [])


# --- configuration ---


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (["ftp://a.test/"], r"webhooks.urls\[0\]: 'ftp://a.test/': not a URL"),
        (["https://a.test/", "https://"], r"webhooks.urls\[1\]: 'https://': not a URL"),
        (["https://u:p@a.test/"], r"webhooks.urls\[0\].*no user name"),
        (["https://a.test/#x"], r"webhooks.urls\[0\].*no fragment"),
        (["https://a.test:0/"], r"webhooks.urls\[0\].*not a URL"),
        (["https://a.test/ b"], r"webhooks.urls\[0\].*not a URL"),
        (["https://a.test/", "https://a.test/"], r"webhooks.urls\[1\].*given twice"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_at_its_place(urls, words):
    with pytest.raises(ConfigError, match=words):
        load_config(environ={}, overrides={"webhooks.urls": urls})


@pytest.mark.parametrize("secret", ["whsec_", "whsec_short", "plain", "whsec_" + "!" * 40, "whsec_é"])
def test_a_secret_of_another_form_is_refused(secret):
    with pytest.raises(ConfigError, match="whsec_ and base64 of 24 to 64"):
        key_of(secret)


def test_a_secret_is_made_once_and_is_its_owners(tmp_path):
    config = load_config(environ={}, overrides={"paths.state_dir": str(tmp_path / "state")})
    secret = webhook_secret(config)
    assert len(key_of(secret)) == 32
    assert webhook_secret(config) == secret
    assert (tmp_path / "state" / "webhook.secret").stat().st_mode & 0o777 == 0o600


def test_who_tells_is_never_harmed(tmp_path, caplog):
    state = {"paths.state_dir": str(tmp_path / "state")}
    silent = load_config(environ={}, overrides=state)
    tell(silent, "sync.failed", "checkpoint", {})
    assert not outbox_path(silent).exists()
    config = load_config(environ={}, overrides={**state, "webhooks.urls": [URL]})
    tell(config, "sync.failed", "checkpoint", {"error": "disk full"})
    outbox = Outbox(outbox_path(config), [URL])
    assert [one.type for one in outbox.deliveries()] == ["sync.failed"]
    outbox.close()
    outbox_path(config).write_bytes(b"no database at all, but long enough to be looked at" * 100)
    tell(config, "sync.failed", "checkpoint", {})
    assert "is not told" in caplog.text
    with pytest.raises(OutboxDamaged, match="move it away"):
        Outbox(outbox_path(config), [URL])


def test_a_newer_outbox_is_not_guessed_at(tmp_path):
    Outbox(tmp_path / "webhooks.sqlite", [URL]).close()
    with sqlite3.connect(tmp_path / "webhooks.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(OutboxDamaged, match="schema version 9"):
        Outbox(tmp_path / "webhooks.sqlite", [URL])
