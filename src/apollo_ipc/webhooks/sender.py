"""Sends the outbox: each event to each URL, signed, again and again until it is taken. Standard Webhooks 1.0.

At least once, and in order within a subject; a receiver tells a repetition by its `webhook-id`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time

import httpx

from apollo_ipc.errors import ConfigError
from apollo_ipc.webhooks.outbox import Outbox, Waiting

log = logging.getLogger(__name__)

SECRET_PREFIX = "whsec_"
ATTEMPT_S = 15.0  # one attempt, all of it
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 3600.0  # after the first failure, doubled up to the last
AWAY_S = 60.0  # longest pause of a URL that cannot be reached
GIVE_UP_S = 3 * 86400.0
LOOK_S = 0.5


def key_of(secret: str) -> bytes:
    """Raises ConfigError unless it is `whsec_` and base64 of 24 to 64 bytes."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX).encode(), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or not 24 <= len(key) <= 64:
        raise ConfigError(
            f"a secret is {SECRET_PREFIX} and base64 of 24 to 64 random bytes", field="webhooks.secret"
        )
    return key


def signature(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    signed = b"%s.%d.%s" % (event_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def headers(key: bytes, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    return {
        "content-type": "application/json",
        "user-agent": "apollo-ipc",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(key, event_id, timestamp, body),
    }


def retry_s(attempts: int) -> float:
    """After so many attempts that failed."""
    return min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(attempts - 1, 20))


class Sender:
    """To one URL. A URL that answers with an error delays that event's subject; one that cannot be reached
    delays all."""

    def __init__(self, outbox: Outbox, url: str, key: bytes, client: httpx.AsyncClient):
        self._outbox, self.url, self._key, self._client = outbox, url, key, client
        self._num_away = 0  # attempts in a row that reached nobody

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                wait_s = await self.step(time.time())
            except Exception:
                # A disk that is full now need not stay so.
                log.exception("webhooks to %s: going on", self.url)
                wait_s = AWAY_S
            await asyncio.sleep(wait_s)

    async def step(self, now: float) -> float:
        """One attempt, if one is due; seconds until the next look."""
        if (waiting := self._outbox.due(self.url, now)) is None:
            return LOOK_S
        error, was_reached = await self._attempt(waiting, now)
        self._num_away = 0 if was_reached else self._num_away + 1
        if error is None:
            self._outbox.note_sent(waiting.seq, self.url, now)
            return 0.0
        is_over = now - waiting.created_at > GIVE_UP_S
        next_at = None if is_over else now + retry_s(waiting.attempts + 1)
        self._outbox.note_failed(waiting.seq, self.url, error, next_at, now)
        log.warning(
            "webhook %s to %s: %s%s", waiting.event_id, self.url, error, "; given up" if is_over else ""
        )
        return 0.0 if was_reached else min(AWAY_S, 2.0 ** min(self._num_away, 10))

    async def _attempt(self, waiting: Waiting, now: float) -> tuple[str | None, bool]:
        """(what went wrong, whether anybody answered)."""
        sent = headers(self._key, waiting.event_id, int(now), waiting.body)
        try:
            # The limit is on all of it: httpx' own begin anew with each byte that drips in.
            async with (
                asyncio.timeout(ATTEMPT_S),
                self._client.stream("POST", self.url, content=waiting.body, headers=sent) as response,
            ):
                status = response.status_code  # the body is nothing to us, and is not read
        except TimeoutError:
            return f"no answer within {ATTEMPT_S:g} s", False
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}", False
        return (None if 200 <= status < 300 else f"HTTP {status}"), True


def new_client() -> httpx.AsyncClient:
    """Redirects are not followed, and no proxy of the environment is used: the configured URL or nobody."""
    return httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=ATTEMPT_S)
