"""OpenAI's files, fine-tuning jobs, models and chat below /train/v1, for clients with the train key.

`OpenAI(base_url=".../train/v1", api_key=TRAIN_KEY)`: below /v1 vLLM's --api-key would refuse that key. No
answer is 409, which the SDK takes for "send it again".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apollo_ipc.errors import Conflict, NotFound, UserError
from apollo_ipc.wire.messages import CancelJob, PauseJob, ResumeJob
from apollo_ipc.wire.requests import parse_json
from apollo_router.auth import KeyedRoute
from apollo_router.body import read_body
from apollo_router.errors import json_response
from apollo_router.fine_tuning import shown
from apollo_router.fine_tuning.create import read_create
from apollo_router.fine_tuning.delivery import JobDelivery, patiently
from apollo_router.fine_tuning.store import StoredJob
from apollo_router.fine_tuning.upload import FORM_BYTES, read_upload
from apollo_router.gateway import Gateway
from apollo_router.params import NoQuery, read_idempotency_key, read_query

MAX_CREATE_BYTES = 64 * 1024

T = TypeVar("T")


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 20
    after: str | None = None


class FilesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str = "fine-tune"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.apollo_delivery = delivery = JobDelivery(app.state.apollo)
    running = asyncio.create_task(delivery.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        delivery.close()


router = APIRouter(route_class=KeyedRoute, lifespan=lifespan, prefix="/train/v1", tags=["apollo-ipc"])


def delivery_of(request: Request) -> JobDelivery:
    return request.app.state.apollo_delivery


def is_retry(request: Request) -> bool:
    """The SDK numbers its retries of one call, and sends no idempotency key with them."""
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


# --- files ---


@router.post("/files")
async def upload(request: Request) -> Response:
    read_query(request, NoQuery)
    delivery = delivery_of(request)
    max_bytes = delivery.gateway.config.http.max_body_bytes
    body = await read_body(request, max_bytes + FORM_BYTES, "form")
    sent = await asyncio.to_thread(read_upload, request.headers["content-type"], body)
    digest = blake2b(sent.content + sent.filename.encode(), digest_size=32).digest()
    file = await asyncio.to_thread(
        (await delivery.store()).add_file,
        sent.filename,
        sent.content,
        digest,
        expires_s=sent.expires_s,
        is_retry=is_retry(request),
    )
    return json_response(shown.file_object(file))


@router.get("/files")
async def files(request: Request) -> Response:
    query = read_query(request, FilesQuery)
    found = await asyncio.to_thread((await delivery_of(request).store()).files)
    found = found if query.purpose == "fine-tune" else []
    found = found if query.order == "desc" else found[::-1]
    part, has_more = shown.page(found, query.limit, query.after, lambda file: file.id)
    return json_response(shown.listed([shown.file_object(file) for file in part], has_more))


@router.get("/files/{file_id}")
async def file(request: Request, file_id: str) -> Response:
    read_query(request, NoQuery)
    store = await delivery_of(request).store()
    return json_response(shown.file_object(await asyncio.to_thread(store.file, file_id)))


@router.get("/files/{file_id}/content")
async def content(request: Request, file_id: str) -> Response:
    read_query(request, NoQuery)
    store = await delivery_of(request).store()
    return Response(await asyncio.to_thread(store.content, file_id), media_type="application/octet-stream")


@router.delete("/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    """Its content leaves the disk. A job that the worker has taken keeps what it trains."""
    read_query(request, NoQuery)
    store = await delivery_of(request).store()
    await asyncio.to_thread(store.delete_file, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


# --- jobs ---


@router.post("/fine_tuning/jobs")
async def create(request: Request) -> Response:
    """Answers when the job is on the worker's disk: `queued`. Where the worker goes away just then, the job
    is `validating_files` and is given to it later. The same request again (an `Idempotency-Key`, or the SDK's
    own retry) is the same job."""
    read_query(request, NoQuery)
    key, delivery = read_idempotency_key(request), delivery_of(request)
    body = parse_json(await read_body(request, MAX_CREATE_BYTES))
    read_create(body, delivery.gateway.model_names)
    store = await delivery.store()
    digest = blake2b(msgspec.json.encode(body, order="sorted"), digest_size=32).digest()
    job = await asyncio.to_thread(store.admit, body, digest, client_key=key, is_retry=is_retry(request))
    return await _show(request, await _until_gone(request, delivery.deliver(job)))


@router.get("/fine_tuning/jobs")
async def jobs(request: Request) -> Response:
    """`?metadata[name]=value` as often as wanted, beside `limit` and `after`."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            wanted[name[len("metadata[") : -1]] = value
    query = read_query(request, Page, leave_out="metadata[")
    delivery = delivery_of(request)
    found = await asyncio.to_thread((await delivery.store()).jobs)
    found = [job for job in found if shown.has_metadata(job, wanted)]
    part, has_more = shown.page(found, query.limit, query.after, lambda job: job.id)
    infos = await _until_gone(request, asyncio.gather(*(delivery.info(job) for job in part)))
    gateway = delivery.gateway
    data = [
        shown.job_object(job, info, gateway.model_names[0], gateway.config.train)
        for job, info in zip(part, infos, strict=True)
    ]
    return json_response(shown.listed(data, has_more))


@router.get("/fine_tuning/jobs/{job_id}")
async def job(request: Request, job_id: str) -> Response:
    read_query(request, NoQuery)
    return await _show(request, await _job(request, job_id))


@router.post("/fine_tuning/jobs/{job_id}/{verb}")
async def control(request: Request, job_id: str, verb: str) -> Response:
    """`cancel`, `pause`, `resume`. 400 where the job has ended; what is so already stays so."""
    read_query(request, NoQuery)
    kinds = {"cancel": CancelJob, "pause": PauseJob, "resume": ResumeJob}
    if (kind := kinds.get(verb)) is None:
        raise NotFound(f"a job can be told to {', '.join(kinds)}, not {verb!r}")
    delivery, job = delivery_of(request), await _job(request, job_id)
    job = await _until_gone(request, delivery.deliver(job))
    if (worker_job := job.worker_job) is None:
        raise UserError("the worker has not taken this job yet: look at it again later", code="not_taken")
    gateway = delivery.gateway
    try:
        await _until_gone(request, patiently(lambda: gateway.client.request(kind("", worker_job))))
    except Conflict as error:
        info = await delivery.info(job)
        if verb != "cancel" or info is None or info.state != "cancelled":
            raise UserError(error.message, code=error.code) from None
    return await _show(request, job)


@router.get("/fine_tuning/jobs/{job_id}/events")
async def events(request: Request, job_id: str) -> Response:
    query = read_query(request, Page)
    job = await _job(request, job_id)
    found = shown.events(job, await _until_gone(request, delivery_of(request).info(job)))
    return json_response(shown.listed(*shown.page(found, query.limit, query.after, lambda one: one["id"])))


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
async def checkpoints(request: Request, job_id: str) -> Response:
    query = read_query(request, Page)
    job, gateway = await _job(request, job_id), delivery_of(request).gateway
    info = await _until_gone(request, delivery_of(request).info(job))
    found = shown.checkpoints(job, info, gateway.model_names[0])
    return json_response(shown.listed(*shown.page(found, query.limit, query.after, lambda one: one["id"])))


async def _job(request: Request, job_id: str) -> StoredJob:
    return await asyncio.to_thread((await delivery_of(request).store()).job, job_id)


async def _show(request: Request, job: StoredJob) -> Response:
    delivery = delivery_of(request)
    info = await _until_gone(request, delivery.info(job))
    gateway = delivery.gateway
    return json_response(shown.job_object(job, info, gateway.model_names[0], gateway.config.train))


async def _until_gone(request: Request, work: Awaitable[T]) -> T:
    gateway: Gateway = request.app.state.apollo
    return await gateway.until_gone(work)


# --- models and chat ---


@router.get("/models")
async def models(request: Request) -> Response:
    read_query(request, NoQuery)
    names = delivery_of(request).gateway.model_names
    return json_response({"object": "list", "data": [_model(name) for name in names]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    read_query(request, NoQuery)
    if name not in delivery_of(request).gateway.model_names:
        raise NotFound(f"no model {name!r} is served here", code="model_not_found")
    return json_response(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": shown.ORGANIZATION}


class _Forwarded(Response):
    """vLLM's own route of the same name answers, without its --api-key: this client has the train key."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = {**scope, "path": self._path, "raw_path": self._path.encode(), "root_path": ""}
        # The router, not the app: the key is asked for by the middleware around it.
        await scope["app"].router(inner, receive, send)


@router.post("/chat/completions")
async def chat(request: Request) -> Response:
    return _Forwarded("/v1/chat/completions")


@router.post("/completions")
async def completions(request: Request) -> Response:
    return _Forwarded("/v1/completions")
