"""The routes of Tinker's API. What trains is a future that the runner answers in its order; what samples goes
straight to vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zstandard
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from apollo_ipc.errors import NotFound, UserError
from apollo_ipc.keys import keys_equal
from apollo_router.body import PROTOBUF, read_body
from apollo_router.errors import ErrorRoute, HttpError, json_response
from apollo_router.fine_tuning.delivery import patiently
from apollo_router.tinker.bodies import (
    CreateModel,
    CreateSamplingSession,
    LoadWeights,
    ModelId,
    OptimStep,
    RequestId,
    Sample,
    SaveForSampler,
    SaveWeights,
    SessionId,
    TinkerPath,
    read_json,
)
from apollo_router.tinker.runner import FULL_WEIGHTS
from apollo_router.tinker.schema import schema
from apollo_router.tinker.service import Service

HOLD_S = 30.0  # the SDK gives up an answer after 45 s
KEY_PREFIX = "tml-"


class TinkerRoute(ErrorRoute):
    """`X-API-Key: tml-<train key>`, as the SDK sends it."""

    def check(self, request: Request) -> None:
        given = request.headers.get("x-api-key", "")
        if not keys_equal(given, KEY_PREFIX + request.app.state.apollo.train_key):
            raise HttpError(
                401 if not given else 403,
                "wrong_train_key",
                "the API key is `tml-` and the train key behind it (`apollo-ipc key` shows that)",
            )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.apollo_tinker = service = Service(app)
    try:
        yield
    finally:
        await service.close()


router = APIRouter(
    route_class=TinkerRoute, lifespan=lifespan, prefix="/train/tinker/api/v1", tags=["apollo-ipc"]
)


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.apollo_tinker
    await service.open()
    return service


# --- what there is ---


@router.get("/healthz")
async def healthz(request: Request) -> Response:
    return json_response({"status": "ok"})


@router.post("/client/config")
async def client_config(request: Request) -> Response:
    schema()  # says where it is missing, at a client's first request
    return json_response(
        {"pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False, "proto_compress_fwdbwd": False}
    )


@router.get("/get_server_capabilities")
async def capabilities(request: Request) -> Response:
    service = await service_of(request)
    model = {"max_context_length": service.vllm.max_model_len, "trainable": True, "sampleable": True}
    names = service.gateway.model_names
    return json_response({"supported_models": [{"model_name": name, **model} for name in names]})


@router.post("/telemetry")
async def telemetry(request: Request) -> Response:
    """Is read by nobody."""
    await _body(request)
    return json_response({"status": "accepted"})


# --- sessions ---


@router.post("/create_session")
async def create_session(request: Request) -> Response:
    await _body(request)
    service = await service_of(request)
    session_id = await asyncio.to_thread(service.store.add_session)
    warning = (
        f"{FULL_WEIGHTS}. Who uses the model sees each optim_step, and its optimizer goes on from before"
    )
    return json_response({"type": "create_session", "session_id": session_id, "warning_message": warning})


@router.post("/session_heartbeat")
async def heartbeat(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), SessionId)
    if not await asyncio.to_thread(service.store.see_session, body.session_id):
        raise HttpError(410, "session_ended", f"session {body.session_id!r} has ended; make a ServiceClient")
    return json_response({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish")
async def finish(request: Request, session_id: str) -> Response:
    """Its lease is free."""
    await _body(request)
    service = await service_of(request)
    await asyncio.to_thread(service.store.end_session, session_id)
    return Response(status_code=204)


# --- training ---


@router.post("/create_model")
async def create_model(request: Request) -> Response:
    raw = await _body(request)
    body = read_json(raw, CreateModel)
    return await _ask(request, f"{body.session_id}:models", body.model_seq_id, "create_model", raw)


@router.post("/get_info")
async def get_info(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), ModelId)
    await asyncio.to_thread(service.store.model, body.model_id)
    name = service.gateway.model_names[0]
    data = {"model_name": name, "tokenizer_id": name}
    return json_response(
        {"type": "get_info", "model_id": body.model_id, "model_name": name, "model_data": data}
        | {"is_lora": False}
    )


@router.post("/forward_backward")
async def forward_backward(request: Request) -> Response:
    gateway = request.app.state.apollo
    raw = await read_body(request, gateway.config.http.max_body_bytes, "protobuf")
    if request.headers.get("content-encoding") == "zstd":
        raw = await asyncio.to_thread(_unpack, raw, gateway.config.http.max_body_bytes)
    message = schema().ForwardBackwardRequest()
    try:
        await asyncio.to_thread(message.ParseFromString, raw)
    except Exception:  # google.protobuf's DecodeError, which is not imported for this alone
        raise UserError("the body is no ForwardBackwardRequest", code="invalid_protobuf") from None
    kind = "forward" if message.forward_only else "forward_backward"
    return await _ask(request, message.model_id, message.seq_id, kind, raw, model_id=message.model_id)


@router.post("/optim_step")
async def optim_step(request: Request) -> Response:
    raw = await _body(request)
    body = read_json(raw, OptimStep)
    return await _ask(request, body.model_id, body.seq_id, "optim_step", raw, model_id=body.model_id)


@router.post("/save_weights")
async def save_weights(request: Request) -> Response:
    raw = await _body(request)
    body = read_json(raw, SaveWeights)
    return await _ask(request, body.model_id, body.seq_id, "save_weights", raw)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> Response:
    raw = await _body(request)
    body = read_json(raw, SaveForSampler)
    return await _ask(request, body.model_id, body.seq_id, "save_weights_for_sampler", raw)


@router.post("/load_weights")
async def load_weights(request: Request) -> Response:
    raw = await _body(request)
    body = read_json(raw, LoadWeights)
    if body.model_id is not None and body.seq_id is not None:
        return await _ask(request, body.model_id, body.seq_id, "load_weights", raw)
    if body.session_id is None or body.model_seq_id is None:
        raise UserError("it has model_id and seq_id, or session_id and model_seq_id", field="model_id")
    return await _ask(request, f"{body.session_id}:models", body.model_seq_id, "load_weights", raw)


@router.post("/weights_info")
async def weights_info(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), TinkerPath)
    await asyncio.to_thread(service.store.saved_version, body.tinker_path)
    return json_response({"base_model": service.gateway.model_names[0], "is_lora": False})


@router.get("/training_runs/{model_id}")
async def training_run(request: Request, model_id: str) -> Response:
    service = await service_of(request)
    row = await asyncio.to_thread(service.store.model, model_id)
    metadata = msgspec.json.decode(row["user_metadata"] or b"null")
    return json_response(service.training_run(model_id, row["created_at"], metadata))


# --- sampling ---


@router.post("/create_sampling_session")
async def create_sampling_session(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), CreateSamplingSession)
    sampler_id = await patiently(lambda: service.runner.create_sampler(body))
    return json_response({"type": "create_sampling_session", "sampling_session_id": sampler_id})


@router.get("/samplers/{sampler_id}")
async def sampler(request: Request, sampler_id: str) -> Response:
    service = await service_of(request)
    found = await asyncio.to_thread(service.store.sampler, sampler_id)
    return json_response({"sampler_id": found.id, "base_model": service.gateway.model_names[0]})


@router.post("/asample")
async def asample(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), Sample)
    await asyncio.to_thread(service.store.sampler, body.sampling_session_id)
    request_id = service.sample(body)
    ids = [f"{body.sampling_session_id}:{body.seq_id}:{i}" for i in range(body.num_samples)]
    return json_response({"request_id": request_id, "sample_sequence_ids": ids})


@router.post("/cancel_future")
async def cancel_future(request: Request) -> Response:
    service, body = await service_of(request), read_json(await _body(request), RequestId)
    service.cancel_sample(body.request_id)
    return Response(status_code=204)


# --- answers ---


@router.post("/retrieve_future")
async def retrieve_future(request: Request) -> Response:
    """Held until there is an answer, or for HOLD_S. 410: there is no such future (any more), ask anew."""
    service, body = await service_of(request), read_json(await _body(request), RequestId)
    found = service.gateway.until_gone(service.result_of(body.request_id, HOLD_S), request)
    match await found:
        case None:
            raise HttpError(410, "no_future", f"no future {body.request_id!r}")
        case ("waiting", _):
            told = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
            if service.runner.away is not None:
                told |= {"queue_state": "paused_capacity", "queue_state_reason": service.runner.away}
            return json_response(told)
        case ("protobuf", content):
            return Response(content, media_type=PROTOBUF)
        case (_, content):
            return Response(content, media_type="application/json")


@router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
async def not_served(request: Request, path: str) -> Response:
    raise NotFound(f"{path!r} of Tinker's API is not served here", code="not_served")


async def _ask(request: Request, scope: str, seq_id: int, kind: str, raw: bytes, **beside: Any) -> Response:
    service = await service_of(request)
    is_open = kind == "forward_backward"
    request_id = await asyncio.to_thread(service.store.ask, scope, seq_id, kind, raw, is_open=is_open)
    service.runner.wake()
    return json_response({"request_id": request_id, **beside})


async def _body(request: Request) -> bytes:
    return await read_body(request, request.app.state.apollo.config.http.max_body_bytes)


def _unpack(raw: bytes, max_bytes: int) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(raw, max_output_size=max_bytes)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is no zstd of at most {max_bytes} bytes: {error}") from None
