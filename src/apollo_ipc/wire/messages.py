"""Every message on the ZMQ socket between the worker (ROUTER, binds) and its clients (DEALER, connect).

msgpack maps tagged with the type's name under "type". New fields go last and have defaults; a field's type
never changes. `decode_*` survives whatever bytes arrive: anything but a known message raises BadMessage.

    client                                   worker
      Hello ------------------------------->          at connect, then every HELLO_INTERVAL_S
            <------------------------------- Heartbeat  every HEARTBEAT_INTERVAL_S to clients that said Hello
      Submit/Get.../Cancel/Sync ----------->
            <------------------------------- Ack        at once, before any work
            <------------------------------- Reply      when done (Failure inside, if it failed)
      Watch ------------------------------->
            <------------------------------- JobEvent   until the job has ended
            <------------------------------- DropCache  to one router, after the weights changed
      CacheDropped ------------------------>
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import (
    ErrorInfo,
    History,
    JobInfo,
    JobState,
    PinResult,
    Previewed,
    Progress,
    RestoreResult,
    Status,
    SyncResult,
)
from apollo_ipc.wire.requests import SyncKind

PROTOCOL_VERSION = 2
HEARTBEAT_INTERVAL_S = 0.25
HELLO_INTERVAL_S = 1.0
PEER_TIMEOUT_S = 5.0  # a client that has not said Hello for this long is forgotten
ACK_TIMEOUT_S = 0.8
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]  # what SQLite takes
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # MAXMSGSIZE on both ends; libzmq drops a larger one without a word


class BadMessage(ApolloError):
    code = "bad_message"


# --- client -> worker ---


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From every client, at connect and then each HELLO_INTERVAL_S."""

    protocol: int
    role: Literal["router", "cli"]
    pid: int
    vllm_boot_id: str | None = None  # routers: the vLLM they live in, once its manifest is written


class Submit(msgspec.Struct, frozen=True, tag=True):
    """From router and CLI: train on this. Replied to with JobInfo after the queue's commit.

    body: as `POST /train` takes it, not decoded yet: that takes a second for the largest, with the
    interpreter's lock held, and neither vLLM's event loop nor the Ack shall wait for it.
    """

    request_id: str
    body: bytes
    idempotency_key: str | None = None


class Preview(msgspec.Struct, frozen=True, tag=True):
    """From router: what would be trained? Replied to with Previewed; nothing is queued."""

    request_id: str
    body: bytes


class GetStatus(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class ListJobs(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    limit: Int64 = 50
    state: JobState | None = None
    before_seq: Int64 | None = None  # only older ones


class GetJob(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    job_id: str


class CancelJob(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    job_id: str


class PauseJob(msgspec.Struct, frozen=True, tag=True):
    """From router: train it no further for now; the jobs behind it wait. Replied to with JobInfo."""

    request_id: str
    job_id: str


class ResumeJob(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    job_id: str


class SyncCheckpoint(msgspec.Struct, frozen=True, tag=True):
    """Replied to with SyncResult when the checkpoint is durable."""

    request_id: str
    kind: SyncKind = "full"


class RestoreVersion(msgspec.Struct, frozen=True, tag=True):
    """From router and CLI: write this older version back, on disk and into the live weights. Replied to with
    RestoreResult; refused while a job trains."""

    request_id: str
    weight_version: Int64


class PinVersion(msgspec.Struct, frozen=True, tag=True):
    """From router and CLI: keep this version restorable, instead of the one before; None: none. Replied to
    with PinResult."""

    request_id: str
    weight_version: Int64 | None


class GetHistory(msgspec.Struct, frozen=True, tag=True):
    """Replied to with History."""

    request_id: str


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Answered by JobEvents with this request_id, the first at once; the last one has `ended`."""

    request_id: str
    job_id: str


class Unwatch(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class CacheDropped(msgspec.Struct, frozen=True, tag=True):
    """From the router that got DropCache: no request that starts now reuses KV of an older version.
    is_waiting: not yet, for a prompt that the drop before had begin again; another answer follows."""

    weight_version: int
    ok: bool
    error: str | None = None
    is_waiting: bool = False


FromClient = (
    Hello
    | Submit
    | Preview
    | GetStatus
    | ListJobs
    | GetJob
    | CancelJob
    | PauseJob
    | ResumeJob
    | SyncCheckpoint
    | RestoreVersion
    | PinVersion
    | GetHistory
    | Watch
    | Unwatch
    | CacheDropped
)

# --- worker -> client ---


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """To every client that said Hello within PEER_TIMEOUT_S."""

    protocol: int
    worker_boot_id: str
    vllm_boot_id: str | None
    attached: bool
    weight_version: int
    progress: Progress


class Ack(msgspec.Struct, frozen=True, tag=True):
    """The request has arrived; its Reply follows."""

    request_id: str


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Exactly one of the fields beside request_id is set."""

    request_id: str
    job: JobInfo | None = None
    jobs: list[JobInfo] | None = None
    status: Status | None = None
    sync: SyncResult | None = None
    error: ErrorInfo | None = None
    restore: RestoreResult | None = None
    pin: PinResult | None = None
    history: History | None = None
    preview: list[Previewed] | None = None


class JobEvent(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    job: JobInfo
    ended: bool


class DropCache(msgspec.Struct, frozen=True, tag=True):
    """To one router: the weights are now at this version; drop the KV that older ones computed. Asked again,
    of one router after another, until a CacheDropped confirms it."""

    weight_version: int


FromWorker = Heartbeat | Ack | Reply | JobEvent | DropCache

_encoder = msgspec.msgpack.Encoder()
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Any) -> bytes:
    """Raises UserError where the message is larger than what the other end would take."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        from apollo_ipc.errors import UserError

        raise UserError(
            f"{len(data)} bytes is too large for one message (limit {MAX_MESSAGE_BYTES}); send several jobs",
            code="too_large",
        )
    return data


def decode_from_client(data: bytes) -> FromClient:
    return _decode(_from_client, data)


def decode_from_worker(data: bytes) -> FromWorker:
    return _decode(_from_worker, data)


def _decode(decoder: Any, data: bytes) -> Any:
    try:
        return decoder.decode(data)
    # RecursionError: deep nesting; MemoryError and OverflowError: lengths that the bytes only claim.
    except (msgspec.DecodeError, RecursionError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        raise BadMessage(f"{type(error).__name__}: {error}") from None
