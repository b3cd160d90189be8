"""POST /teach and its relatives: teach jobs in the store of the state directory, which a teacher takes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from apollo_ipc.errors import UserError
from apollo_ipc.teaching.facts import facts_of, facts_of_document
from apollo_ipc.teaching.store import (
    ENDED_PHASES,
    TeachJob,
    TeachOptions,
    TeachRequest,
    TeachStore,
    request_about,
    store_path,
)
from apollo_ipc.wire.requests import convert, parse_json
from apollo_router.auth import KeyedRoute
from apollo_router.body import read_body
from apollo_router.errors import json_response
from apollo_router.gateway import Gateway
from apollo_router.params import NoQuery, read_idempotency_key, read_query

MAX_FACTS = 1000  # a job that is examined as a whole, not a corpus
MAX_BODY_BYTES = 4 * 1024 * 1024
POLL_S = 0.25
LessonIds = Annotated[list[str], Meta(min_length=1, max_length=MAX_FACTS)]

router = APIRouter(route_class=KeyedRoute, tags=["apollo-ipc"])


class WaitQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    wait: bool = False  # answer when the job has ended


class LimitQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50


class TeachBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """facts: sentences, {"statement"?, "question"?, "answer"?, "key"?} or {"messages"}; text: a document of
    which each sentence is a fact where a rule makes a question of it, or is to be one of the served model's
    (options.writer "model"). One of the two."""

    facts: Annotated[list[Any], Meta(max_length=MAX_FACTS)] | None = None
    text: str | None = None
    options: TeachOptions = TeachOptions()

    def request(self) -> TeachRequest:
        """Raises UserError with the path of the field."""
        if (self.facts is None) == (self.text is None):
            raise UserError("exactly one of facts and text is needed", field="facts")
        is_written = self.options.writer == "model"
        if self.facts is not None:
            named = ((f"facts[{i}]", one) for i, one in enumerate(self.facts))
            return TeachRequest(facts_of(named, is_written=is_written), self.options)
        facts, notes = facts_of_document(self.text or "", is_written=is_written)
        if len(facts) > MAX_FACTS:
            raise UserError(
                f"{len(facts)} facts; a job takes at most {MAX_FACTS}: send the text in parts", field="text"
            )
        return TeachRequest(facts, self.options, notes=notes)


class ExamineBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ids; None: all of them."""

    lessons: LessonIds | None = None


class ForgetBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lessons: LessonIds
    options: TeachOptions = TeachOptions()


@router.post("/teach", status_code=202)
async def teach(request: Request) -> Response:
    """Queues a teach job: 202 once it is on disk; `?wait=true`: 200 when it has ended. The same
    `Idempotency-Key` and body give the same job, taught once."""
    return await _admitted(request, lambda body, store: convert(body, TeachBody).request())


@router.post("/teach/lessons/forget", status_code=202)
async def forget(request: Request) -> Response:
    """Queues a job that trains the model back to what it said before these lessons, and ends with their going
    from the store. As POST /teach otherwise."""

    def wanted(body: dict[str, Any], store: TeachStore) -> TeachRequest:
        sent = convert(body, ForgetBody)
        return request_about(store.lessons_of(sent.lessons), "forget", sent.options)

    return await _admitted(request, wanted)


@router.post("/teach/lessons/examine", status_code=202)
async def examine(request: Request) -> Response:
    """Queues a job that asks whether lessons still hold, and trains nothing. As POST /teach otherwise."""

    def wanted(body: dict[str, Any], store: TeachStore) -> TeachRequest:
        sent = convert(body, ExamineBody)
        lessons = store.lessons() if sent.lessons is None else store.lessons_of(sent.lessons)
        if not lessons:
            raise UserError("nothing was taught yet", field="lessons")
        return request_about(lessons, "examine")

    return await _admitted(request, wanted)


async def _admitted(
    request: Request, wanted: Callable[[dict[str, Any], TeachStore], TeachRequest]
) -> Response:
    query, key = read_query(request, WaitQuery), read_idempotency_key(request)
    gateway: Gateway = request.app.state.apollo
    body = await read_body(request, min(MAX_BODY_BYTES, gateway.config.http.max_body_bytes))
    digest = blake2b(request.url.path.encode() + b"\0" + body, digest_size=32).digest()
    store = await _store(request)

    def admit() -> TeachJob:
        if key is not None and (found := store.of_key(key, digest)) is not None:
            return found  # its lessons may be gone by now
        return store.admit(wanted(_read(body), store), digest, client_key=key)

    job = await asyncio.to_thread(admit)
    if query.wait:
        job = await gateway.until_gone(_end_of(store, job, gateway.config.http.wait_timeout_s), request)
    is_over = query.wait and job.phase in ENDED_PHASES
    root = request.scope.get("root_path", "").rstrip("/")
    where = {} if is_over else {"Location": f"{root}/teach/jobs/{job.id}"}
    return json_response(job.shown(), 200 if is_over else 202, where)


@router.get("/teach/jobs")
async def jobs(request: Request) -> Response:
    """The newest first."""
    query, store = read_query(request, LimitQuery), await _store(request)
    found = await asyncio.to_thread(store.jobs, query.limit)
    return json_response({"object": "list", "data": [job.shown() for job in found]})


@router.get("/teach/jobs/{teach_id}")
async def job(request: Request, teach_id: str) -> Response:
    read_query(request, NoQuery)
    store = await _store(request)
    return json_response((await asyncio.to_thread(store.job, teach_id)).shown())


@router.delete("/teach/jobs/{teach_id}")
async def cancel(request: Request, teach_id: str) -> Response:
    """Cancelled before its next phase; what it has trained is taken back. 409 where it has ended."""
    read_query(request, NoQuery)
    store = await _store(request)
    return json_response((await asyncio.to_thread(store.cancel, teach_id)).shown())


@router.get("/teach/lessons")
async def lessons(request: Request) -> Response:
    """What was taught, in its order, and whether it held when it was last asked."""
    read_query(request, NoQuery)
    store = await _store(request)
    return json_response({"object": "list", "data": await asyncio.to_thread(store.lessons)})


def _read(body: bytes) -> dict[str, Any]:
    data = parse_json(body)
    if not isinstance(data, dict):
        raise UserError('send an object like {"facts": ["The spare badge is in the cocoa tin."]}')
    return data


async def _store(request: Request) -> TeachStore:
    """Opened by the first request: whoever never teaches has no such file."""
    state = request.app.state
    if getattr(state, "apollo_teaching", None) is None:
        path = store_path(state.apollo.config)
        made = await asyncio.to_thread(TeachStore, path)
        if getattr(state, "apollo_teaching", None) is None:
            state.apollo_teaching = made
        else:
            made.close()
    return state.apollo_teaching


async def _end_of(store: TeachStore, job: TeachJob, timeout_s: float) -> TeachJob:
    """The job when it has ended, or as it is after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while job.phase not in ENDED_PHASES and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        job = await asyncio.to_thread(store.job, job.id)
    return job
