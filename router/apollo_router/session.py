"""A browser's session: a signed cookie in place of the train key, for an hour, for the page's own origin.

A browser sends cookies by itself, so a cookie alone never trains. SameSite keeps it from other sites; another
port of this host is the same site, though, so a request has to come from our origin (Sec-Fetch-Site, Origin),
and one that changes anything carries a header that no form and no image can send.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from apollo_router.errors import HttpError

COOKIE = "apollo_session"
LIFETIME_S = 3600
HEADER = "x-apollo-ui"
SAFE_METHODS = ("GET", "HEAD")


def new_session(train_key: str, now: float) -> str:
    """`EXPIRES.NONCE.SIGNATURE`. Another train key ends every session."""
    told = f"{int(now) + LIFETIME_S}.{secrets.token_urlsafe(12)}"
    return f"{told}.{_signature(train_key, told)}"


def expires_at(session: str, train_key: str, now: float) -> float | None:
    """None: it is none of ours, or over."""
    told, _, given = session.rpartition(".")
    if not hmac.compare_digest(given.encode(), _signature(train_key, told).encode()):
        return None
    end = int(told.partition(".")[0])
    return end if now < end else None


def check_session(request: Request, train_key: str) -> float:
    """When it ends. Raises HttpError: 401 where there is none (any more), 403 from elsewhere."""
    check_origin(request)
    end = expires_at(request.cookies.get(COOKIE, ""), train_key, time.time())
    if end is None:
        raise HttpError(401, "session_expired", "this session is over: log in again")
    return end


def check_origin(request: Request) -> None:
    """Raises HttpError unless the request comes from a page of this server."""
    headers = request.headers
    is_ours = headers.get("sec-fetch-site", "same-origin") == "same-origin"
    why = ""
    if request.method not in SAFE_METHODS:
        origin, host = urlsplit(headers.get("origin", "")).netloc, headers.get("host")
        if is_ours and origin and origin != host:
            why = f": the browser is at {origin}, the request names {host}; a proxy has to keep `Host`"
        is_ours = is_ours and origin == host and headers.get(HEADER) == "1"
    if not is_ours:
        raise HttpError(403, "wrong_origin", f"a session is for the page of this server only{why}")


def keep(response: Response, request: Request, session: str) -> Response:
    """The cookie goes with every path of this host: the page asks /train and /checkpoint."""
    response.set_cookie(
        COOKIE,
        session,
        max_age=LIFETIME_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


def _signature(train_key: str, told: str) -> str:
    key = hmac.digest(train_key.encode(), b"apollo-ipc session 1", hashlib.sha256)
    return hmac.new(key, told.encode(), hashlib.sha256).hexdigest()
