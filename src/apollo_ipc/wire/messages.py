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

from typing import Any, Literal

import msgspec

from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.requests import SyncKind

PROTOCOL_VERSION = 2
HEARTBEAT_INTERVAL_S = 0.25
HELLO_INTERVAL_S = 1.0
PEER_TIMEOUT_S = 5.0  # a client that has not said Hello for this long is forgotten
ACK_TIMEOUT_S = 0.8
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # MAXMSGSIZE on both ends; libzmq drops a larger one without a word

JobState = Literal["queued", "running", "applied", "durable", "failed", "cancelled", "quarantined", "undone"]
ENDED_STATES = ("applied", "durable", "failed", "cancelled", "quarantined", "undone")


class BadMessage(ApolloError):
    code = "bad_message"


# --- parts ---


class JobInfo(msgspec.Struct, frozen=True):
    """One job as every interface shows it."""

    job_id: str
    seq: int  # the order in which jobs were accepted; jobs train in this order
    state: JobState
    created_at: float  # seconds since the epoch, like every `_at`
    num_examples: int
    num_steps: int  # planned optimizer steps
    steps_done: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    weight_version: int | None = None  # the first version that holds the whole job
    num_skipped: int = 0  # duplicates that were not trained again
    idempotency_key: str | None = None
    error: str | None = None
    notes: list[str] = []  # e.g. which parameters fell back to Adam
    # Filled by GetJob and Watch's last event only. None: a loss that is no number, which JSON does not have.
    loss_history: list[float | None] | None = None
    undone_by: int | None = None  # the older weight version whose restore took the job's effect away


class Progress(msgspec.Struct, frozen=True):
    """What the trainer is doing right now; `activity_count` grows whenever it gets on."""

    activity: str  # "waiting for vLLM", "idle", "training", "syncing", ...
    activity_count: int
    job_id: str | None = None
    steps_done: int = 0
    num_steps: int = 0
    loss: float | None = None


class SyncResult(msgspec.Struct, frozen=True):
    """What one checkpoint sync did."""

    weight_version: int
    committed_at: float
    num_tensors: int
    num_tensors_changed: int
    num_shards_written: int
    bytes_compared: int
    bytes_written: int
    duration_s: float  # until it was durable
    kind: SyncKind = "full"
    training_waited_s: float = 0.0  # of duration_s: comparing and copying out
    bytes_changed: int = 0  # of the live tensors that were written
    delta_bytes: int = 0  # what stands for them in a delta
    max_abs_weight: float = 0.0  # the largest weight written, and whose it is
    max_abs_name: str | None = None


class RestoreResult(msgspec.Struct, frozen=True):
    """What writing an older version back did."""

    restored_version: int
    weight_version: int  # the new version, whose weights are those of restored_version
    num_tensors_changed: int
    num_jobs_undone: int  # jobs whose effect went with it; they are not trained again
    has_optimizer: bool  # the moments of that version came back; else they start anew
    duration_s: float


class VersionInfo(msgspec.Struct, frozen=True):
    """A version that can be restored."""

    weight_version: int
    serial: int  # of its commit; 0: as it was before the first sync
    committed_at: float
    kind: SyncKind
    has_optimizer: bool
    applied_seq: int  # of the last job in it
    restored_from: int | None
    is_present: bool
    is_pinned: bool


class History(msgspec.Struct, frozen=True):
    """Every version that can be restored, oldest first; history_bytes: on disk beside the present one."""

    model_dir: str
    history_bytes: int
    versions: list[VersionInfo]


class PinResult(msgspec.Struct, frozen=True):
    """Which version is pinned now, and which was; None: none."""

    model_dir: str
    pinned: int | None
    pinned_before: int | None


class PostSync(msgspec.Struct, frozen=True):
    """How the last run of the operator's command (checkpoint.post_sync_command) went, or goes."""

    weight_version: int
    started_at: float
    ended_at: float | None = None  # None: it runs
    error: str | None = None


class TrainerState(msgspec.Struct):
    """What the trainer says of itself: carried whole to the front, and from there into Status."""

    progress: Progress
    attached: bool = False
    attach_error: str | None = None
    vllm_boot_id: str | None = None  # None while not attached
    vllm_pid: int | None = None
    model_path: str | None = None
    weight_version: int = 0
    durable_version: int = 0
    num_parameters: int = 0
    num_parameters_mapped: int = 0
    optimizer_state_bytes: int = 0
    refused: list[str] = []
    last_sync: SyncResult | None = None
    is_syncing: bool = False  # a sync is being written, beside training
    sync_error: str | None = None


class Status(TrainerState, kw_only=True):
    """TrainerState, and what the front knows."""

    worker_boot_id: str
    worker_pid: int
    num_queued: int
    num_bad_messages: int = 0
    num_routers: int = 0
    post_sync: PostSync | None = None


class FieldError(msgspec.Struct, frozen=True):
    field: str | None
    message: str


class Previewed(msgspec.Struct, frozen=True, omit_defaults=True):
    """One learned turn (of messages) or the whole of an example as it would be trained; or why it would not.

    example, message: indices; context_ids: what vLLM gives the model; target_ids: what it would learn to say
    then; context, target: the same as text.
    """

    example: int
    message: int | None = None
    context_ids: list[int] | None = None
    target_ids: list[int] | None = None
    context: str | None = None
    target: str | None = None
    notes: list[str] = []
    error: FieldError | None = None


class ErrorInfo(msgspec.Struct, frozen=True):
    """A failure as it crosses the wire: the caller decides what to do with it."""

    type: str  # the exception's class
    message: str
    code: str = "error"
    http_status: int = 500
    field: str | None = None
    traceback: str | None = None


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
    limit: int = 50
    state: JobState | None = None


class GetJob(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    job_id: str


class CancelJob(msgspec.Struct, frozen=True, tag=True):
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
    weight_version: int


class PinVersion(msgspec.Struct, frozen=True, tag=True):
    """From router and CLI: keep this version restorable, instead of the one before; None: none. Replied to
    with PinResult."""

    request_id: str
    weight_version: int | None


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
    """From the router that got DropCache: no request that starts now reuses KV of an older version."""

    weight_version: int
    ok: bool
    error: str | None = None


FromClient = (
    Hello
    | Submit
    | Preview
    | GetStatus
    | ListJobs
    | GetJob
    | CancelJob
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
