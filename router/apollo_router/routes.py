"""The HTTP interface: every route of /train and /checkpoint.

Thin on purpose: a route checks what only HTTP knows, asks the worker over ZMQ and hands on what it answers.
Every failure is OpenAI's error object (apollo_router.errors); 503 means "again later", with Retry-After.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from apollo_ipc.errors import NotFound, NotReady, UserError
from apollo_ipc.wire import messages, replies
from apollo_ipc.wire.requests import PinBody, RestoreBody, SyncBody, convert, parse_json
from apollo_router.auth import KeyedRoute
from apollo_router.body import read_body
from apollo_router.errors import ErrorRoute, HttpError, error_response, json_response
from apollo_router.events import event_stream
from apollo_router.gateway import Gateway
from apollo_router.params import (
    FeedbackBody,
    JobsQuery,
    NoQuery,
    TrainQuery,
    read_idempotency_key,
    read_query,
)

MAX_SMALL_BODY_BYTES = 1024
MAX_FEEDBACK_BYTES = 64 * 1024
WORKER_AWAY_S = 60.0  # how long `?wait=true` waits for a worker that went away to come back
TRAINED_STATES = ("applied", "durable")

T = TypeVar("T")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # FastAPI runs an included router's lifespan inside the app's own (routing.py, _merge_lifespan_context).
    async with app.state.apollo.open(app):
        yield


router = APIRouter(route_class=KeyedRoute, lifespan=lifespan, tags=["apollo-ipc"])
open_router = APIRouter(route_class=ErrorRoute, tags=["apollo-ipc"])


def gateway_of(request: Request) -> Gateway:
    return request.app.state.apollo


@router.post("/train", status_code=202)
async def train(request: Request) -> Response:
    """Queues a job: 202 once it is on disk.

    With `?wait=true`: 200 with `loss_history` when the job is in the served weights; 422 with the code
    `job_failed`, `job_cancelled`, `job_quarantined` or `job_undone` and the `job` when it ended otherwise
    (not 5xx, since clients send those again by themselves); 202 when it has not ended within
    http.wait_timeout_s. A client that goes away meanwhile does not cancel the job. With `?dry_run=true`:
    200 with what would be trained; nothing is queued. `Idempotency-Key`: the same key and body give the same
    job, another body 422.
    """
    gateway = gateway_of(request)
    query = read_query(request, TrainQuery)
    key = read_idempotency_key(request) or uuid.uuid4().hex
    body = await read_body(request, gateway.config.http.max_body_bytes)
    if query.dry_run:
        seen = await gateway.client.request(messages.Preview("", body))
        return json_response(seen.preview)
    job = await _submit(gateway, body, key)
    if not query.wait:
        return json_response(_accepted(job), 202, _location(request, job))
    job = await gateway.until_gone(_end_of(gateway, job), request)
    return _waited(request, job)


async def _submit(gateway: Gateway, body: bytes, key: str) -> replies.JobInfo:
    """Raises, beside the worker's refusals, NotReady: whatever its code, sending the same again with the key
    of its header `Idempotency-Key` trains once."""
    submit = messages.Submit("", body, key)
    try:
        reply = await gateway.client.request(submit, timeout_s=gateway.config.http.wait_timeout_s)
    except NotReady as error:
        error.headers = {"Idempotency-Key": key}  # type: ignore[attr-defined]
        raise
    assert reply.job is not None
    return reply.job


def _accepted(job: replies.JobInfo) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "status": job.state,
        "num_examples": job.num_examples,
        "num_steps": job.num_steps,
        "num_skipped": job.num_skipped,
        "notes": job.notes,
    }


def _location(request: Request, job: replies.JobInfo) -> dict[str, str]:
    """As the client sees it: behind vLLM's --root-path too."""
    return {"Location": f"{request.scope.get('root_path', '').rstrip('/')}/train/jobs/{job.job_id}"}


def _waited(request: Request, job: replies.JobInfo) -> Response:
    if job.state in TRAINED_STATES:
        details = {
            "steps_done": job.steps_done,
            "loss_first": job.loss_first,
            "loss_last": job.loss_last,
            "loss_history": job.loss_history or [],
            "weight_version": job.weight_version,
        }
        return json_response({**_accepted(job), **details})
    if job.state in replies.ENDED_STATES:
        message = f"job {job.job_id} {job.state}: {job.why_ended or 'no reason given'}"
        return error_response(HttpError(422, f"job_{job.state}", message), job=job)
    return json_response(_accepted(job), 202, _location(request, job))


async def _end_of(gateway: Gateway, job: replies.JobInfo) -> replies.JobInfo:
    """The job when it has ended, or as it is after http.wait_timeout_s. Outlasts a restart of the worker.

    Raises NotReady, naming the job, where the worker stays away for WORKER_AWAY_S.
    """
    try:
        async with (
            asyncio.timeout(gateway.config.http.wait_timeout_s),
            aclosing(gateway.client.watch(job.job_id, silence_s=WORKER_AWAY_S)) as events,
        ):
            async for newest, _ in events:
                job = newest
    except TimeoutError:
        pass  # the caller sees by its state that the job has not ended
    except NotReady as error:
        raise NotReady(f"job {job.job_id} was accepted, but: {error.message}", code=error.code) from None
    return job


@router.get("/train/status")
async def status(request: Request) -> Response:
    """The worker's whole state. 503 while there is no worker."""
    read_query(request, NoQuery)
    gateway = gateway_of(request)
    reply = await gateway.client.request(messages.GetStatus(""))
    seen = msgspec.to_builtins(reply.status)
    return json_response({"worker": "up", "router_vllm_boot_id": gateway.served.boot_id, **seen})


@router.get("/train/jobs")
async def jobs(request: Request) -> Response:
    """The newest jobs: `?limit=` (1 to 1000, 50 by default), `?state=`, `?before=` (a job's `seq`)."""
    query = read_query(request, JobsQuery)
    asked = messages.ListJobs("", query.limit, query.state, query.before)
    reply = await gateway_of(request).client.request(asked)
    return json_response({"object": "list", "data": reply.jobs})


@router.get("/train/jobs/{job_id}")
async def job(request: Request, job_id: str) -> Response:
    read_query(request, NoQuery)
    reply = await gateway_of(request).client.request(messages.GetJob("", job_id))
    return json_response(reply.job)


@router.delete("/train/jobs/{job_id}")
async def cancel(request: Request, job_id: str) -> Response:
    """Cancels a queued job, or a running one after its present step. 409 where it has ended."""
    read_query(request, NoQuery)
    reply = await gateway_of(request).client.request(messages.CancelJob("", job_id))
    return json_response(reply.job)


@router.post("/train/jobs/{job_id}/pause")
async def pause(request: Request, job_id: str) -> Response:
    """It is trained no further, after its present step where it runs; the jobs behind it wait. 409 where it
    has ended."""
    read_query(request, NoQuery)
    reply = await gateway_of(request).client.request(messages.PauseJob("", job_id))
    return json_response(reply.job)


@router.post("/train/jobs/{job_id}/resume")
async def resume(request: Request, job_id: str) -> Response:
    """A paused job goes on; one that is not paused stays as it is. 409 where it has ended."""
    read_query(request, NoQuery)
    reply = await gateway_of(request).client.request(messages.ResumeJob("", job_id))
    return json_response(reply.job)


@router.get("/train/jobs/{job_id}/events", response_class=StreamingResponse)
async def events(request: Request, job_id: str) -> Response:
    """Server-sent events: `job` with each change, `end` with the last, comment lines in between."""
    read_query(request, NoQuery)
    gateway = gateway_of(request)
    # An unknown job or an absent worker is an HTTP error: seen before the stream begins.
    await gateway.client.request(messages.GetJob("", job_id))
    return StreamingResponse(
        event_stream(gateway, gateway.client.watch(job_id)),
        media_type="text/event-stream",
        # X-Accel-Buffering: nginx would otherwise hold events back.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.post("/feedback", status_code=202)
async def feedback(request: Request) -> Response:
    """What people thought of a recorded completion: a rating, or the answer that it should have been. 404
    where it was not recorded (any more), 409 where nothing is."""
    body = await _read_body(request, FeedbackBody, MAX_FEEDBACK_BYTES)
    spool = gateway_of(request).spool
    if spool is None:
        message = "nothing is recorded here: start with `apollo-ipc serve --learn-from-traffic DIR`"
        raise HttpError(409, "traffic_off", message)
    if (body.rating is None) == (body.correction is None):
        raise UserError("exactly one of rating and correction is needed", field="rating")
    if body.correction is not None and not body.correction.strip():
        raise UserError("it is empty", field="correction")
    record = await asyncio.to_thread(spool.find, body.completion_id)
    if record is None:
        raise NotFound(f"no completion {body.completion_id!r} was recorded", field="completion_id")
    said = {"rating": body.rating, "correction": body.correction}
    record["feedback"] = {name: value for name, value in said.items() if value is not None}
    await asyncio.to_thread(spool.write, record)
    return json_response({"completion_id": body.completion_id, "status": "recorded"}, 202)


@router.post("/checkpoint")
async def checkpoint(request: Request) -> Response:
    """Syncs the model directory now; answers when it is durable. The body may be empty, `{}` or SyncBody."""
    read_query(request, NoQuery)
    body = (await read_body(request, MAX_SMALL_BODY_BYTES)).strip()
    kind = convert(parse_json(body), SyncBody).kind if body else "full"
    reply = await _ask_patiently(request, messages.SyncCheckpoint("", kind))
    return json_response(reply.sync)


@router.post("/checkpoint/restore")
async def restore(request: Request) -> Response:
    """Writes an older version back, on disk and into the served weights, as a new version. 409 while a job
    trains. A client that goes away meanwhile does not stop it."""
    version = (await _read_body(request, RestoreBody)).version
    reply = await _ask_patiently(request, messages.RestoreVersion("", version))
    return json_response(reply.restore)


@router.post("/checkpoint/pin")
async def pin(request: Request) -> Response:
    """Has a version stay restorable however many syncs follow, instead of the one before; null: none."""
    version = (await _read_body(request, PinBody)).version
    reply = await _ask_patiently(request, messages.PinVersion("", version))
    return json_response(reply.pin)


@router.get("/checkpoint/history")
async def history(request: Request) -> Response:
    """The versions that can be restored, oldest first."""
    read_query(request, NoQuery)
    reply = await gateway_of(request).client.request(messages.GetHistory(""))
    return json_response(reply.history)


async def _read_body(request: Request, into: type[T], max_bytes: int = MAX_SMALL_BODY_BYTES) -> T:
    read_query(request, NoQuery)
    return convert(parse_json(await read_body(request, max_bytes)), into)


async def _ask_patiently(request: Request, message: Any) -> messages.Reply:
    """For what may take as long as http.wait_timeout_s."""
    gateway = gateway_of(request)
    asked = gateway.client.request(message, timeout_s=gateway.config.http.wait_timeout_s)
    return await gateway.until_gone(asked, request)


@open_router.get("/train/health")
async def health(request: Request) -> Response:
    """200 only while the worker is attached to *this* vLLM, else 503 with the reason. Needs no key: load
    balancers and `apollo-ipc serve` ask, and it tells nothing but versions and ids of processes' starts."""
    gateway = gateway_of(request)
    await asyncio.to_thread(gateway.served.refresh)
    client, served = gateway.client, gateway.served
    if served.boot_id is None:
        raise NotReady(served.reason)
    if not client.is_alive or client.heartbeat is None:
        raise NotReady("the training worker does not answer (is it running? see `apollo-ipc status`)")
    beat = client.heartbeat
    if not beat.attached:
        raise NotReady(f"the training worker is not attached to vLLM yet: {beat.progress.activity}")
    if beat.vllm_boot_id != served.boot_id:
        raise NotReady("the training worker is attached to another vLLM")
    return json_response(
        {
            "status": "ok",
            "vllm_boot_id": served.boot_id,
            "worker_boot_id": beat.worker_boot_id,
            "weight_version": beat.weight_version,
            "activity": beat.progress.activity,
        }
    )


router.include_router(open_router)
