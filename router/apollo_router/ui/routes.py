"""The page's own routes. Its files are open: whoever logs in has no key yet. They hold nothing secret."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
import time
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any, NamedTuple

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from apollo_ipc.errors import NotFound
from apollo_ipc.hold import is_held
from apollo_ipc.keys import keys_equal
from apollo_ipc.teaching.store import teacher_lock
from apollo_ipc.wire.requests import convert, parse_json
from apollo_router import session
from apollo_router.auth import KeyedRoute
from apollo_router.body import read_body
from apollo_router.errors import ErrorRoute, HttpError, json_response
from apollo_router.gateway import Gateway
from apollo_router.params import NoQuery, read_query
from apollo_router.ui.forecast import Forecast
from apollo_router.ui.stream import page_stream

MAX_LOGIN_BYTES = 4096
MAX_STREAMS = 32
QUALITY_GROUP = "apollo_ipc.quality"  # of entry points: state directory -> measurements, newest last
# Nothing is loaded from elsewhere, nothing is run that is no file of ours, and no text becomes markup.
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

router = APIRouter(route_class=KeyedRoute, prefix="/train/ui", tags=["apollo-ipc"])
open_router = APIRouter(route_class=ErrorRoute, prefix="/train/ui", tags=["apollo-ipc"])


class Login(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str


class StaticFile(NamedTuple):
    content: bytes
    media_type: str
    etag: str


@cache
def static_files() -> dict[str, StaticFile]:
    found = {}
    for file in files("apollo_router.ui").joinpath("static").iterdir():
        content = file.read_bytes()
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        found[file.name] = StaticFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def _file(request: Request, name: str) -> Response:
    if (file := static_files().get(name)) is None:
        raise NotFound(f"the page has no file {name!r}")
    headers = {**SECURITY, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


@open_router.get("")
async def page(request: Request) -> Response:
    return _file(request, "index.html")


@open_router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    return _file(request, name)


@open_router.post("/login")
async def login(request: Request) -> Response:
    """The train key in the body; the answer sets the session's cookie."""
    session.check_origin(request)
    train_key = request.app.state.apollo.train_key
    given = convert(parse_json(await read_body(request, MAX_LOGIN_BYTES)), Login).key.strip()
    if not keys_equal(given, train_key):
        raise HttpError(403, "wrong_train_key", "this is not the train key (`apollo-ipc key` shows it)")
    now = time.time()
    answer = json_response({"expires_at": int(now) + session.LIFETIME_S})
    return session.keep(answer, request, session.new_session(train_key, now))


@open_router.post("/logout")
async def logout(request: Request) -> Response:
    session.check_origin(request)
    answer = Response(status_code=204)
    answer.delete_cookie(session.COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/session")
async def shown_session(request: Request) -> Response:
    """Whether somebody is logged in, and what the page has to know first."""
    read_query(request, NoQuery)
    gateway: Gateway = request.app.state.apollo
    told = {
        "expires_at": _end_of(request),
        "model": gateway.model_names[0] if gateway.model_names else None,
        "now": time.time(),
        "has_teacher": is_held(teacher_lock(gateway.config)),
        "train": {"lr": gateway.config.train.lr, "epochs": gateway.config.train.epochs},
    }
    return json_response(told)


@router.get("/events", response_class=StreamingResponse)
async def events(request: Request) -> Response:
    """Server-sent events: `beat` with what the worker does, `job` and `end` of the job that trains."""
    read_query(request, NoQuery)
    state = request.app.state
    state.apollo_pages = getattr(state, "apollo_pages", 0)
    if state.apollo_pages >= MAX_STREAMS:
        raise HttpError(503, "busy", f"{MAX_STREAMS} pages listen already; close one")

    async def stream():
        state.apollo_pages += 1
        try:
            async for piece in page_stream(state.apollo, _end_of(request)):
                yield piece
        finally:
            state.apollo_pages -= 1

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


@router.get("/quality")
async def quality(request: Request) -> Response:
    """What the quality monitor measured; nothing where it is not installed or has measured nothing."""
    read_query(request, NoQuery)
    gateway: Gateway = request.app.state.apollo
    return json_response({"measurements": await asyncio.to_thread(_measurements, gateway)})


@router.get("/plan")
async def plan(request: Request) -> Response:
    """The MemoryPlan of the served model; computed when it is first asked for."""
    read_query(request, NoQuery)
    state = request.app.state
    state.apollo_forecast = getattr(state, "apollo_forecast", None) or Forecast()
    return json_response(await state.apollo.until_gone(state.apollo_forecast.get(state.apollo), request))


def _measurements(gateway: Gateway) -> list[Any]:
    found: list[Any] = []
    for point in entry_points(group=QUALITY_GROUP):
        found += point.load()(gateway.config.state_dir)
    return found


def _end_of(request: Request) -> float | None:
    """When the session ends; None for a client with the key itself."""
    is_keyed = "authorization" in request.headers
    return None if is_keyed else session.check_session(request, request.app.state.apollo.train_key)
