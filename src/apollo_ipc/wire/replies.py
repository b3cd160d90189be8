"""What replies carry: jobs, the status, what a sync or a restore did. The messages themselves: messages.py.

New fields go last and have defaults; a field's type never changes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from apollo_ipc.wire.requests import SyncKind

JobState = Literal["queued", "running", "applied", "durable", "failed", "cancelled", "quarantined", "undone"]
ENDED_STATES = ("applied", "durable", "failed", "cancelled", "quarantined", "undone")


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
    paused_at: float | None = None  # not trained further until it is resumed; the jobs behind it wait
    loss: str = "cross_entropy"  # what its steps minimise; of another one loss_first, ... are no nats a token
    # Of each group of a grpo job, an answer each; 0 throughout: nothing was learned of it. Filled like
    # loss_history.
    advantages: list[list[float]] | None = None

    @property
    def why_ended(self) -> str | None:
        """In words, where its effect is not in the weights, or not all of it."""
        undone = None if self.undone_by is None else f"weight version {self.undone_by} was restored"
        return self.error or undone


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
    num_jobs_back: int  # jobs that an earlier restore had undone, and that it holds
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


class Tally(msgspec.Struct, frozen=True):
    """What the worker has done since its start: every one only grows. A new trainer goes on with it."""

    num_steps: int = 0
    num_bad_steps: int = 0  # not finite: not everything was written
    num_tokens: int = 0  # read by forward passes of training
    step_s: dict[str, float] = {}  # phase -> seconds: forward, backward (updates in it), record, publish
    num_syncs: int = 0
    num_sync_failures: int = 0
    sync_s: float = 0.0
    sync_waited_s: float = 0.0  # of sync_s: training stood still
    sync_bytes: int = 0  # written
    num_torn_steps: int = 0  # cut off, and mended or accepted


class Following(msgspec.Struct, frozen=True):
    """Of a server that follows another one's checkpoint. weight_version: the source's that is served here,
    None before the first; committed_at: when it was committed there; num_bytes: fetched since this process
    began; error: what keeps the newest away."""

    source: str
    weight_version: int | None = None
    committed_at: float | None = None
    num_bytes: int = 0
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
    tally: Tally = Tally()
    device_bytes: int = 0  # on a GPU, the most that training has reserved; what vLLM shares is not in it
    last_restore: RestoreResult | None = None  # since this trainer's start
    following: Following | None = None  # instead of training


class Status(TrainerState, kw_only=True):
    """TrainerState, and what the front knows."""

    worker_boot_id: str
    worker_pid: int
    num_queued: int
    num_bad_messages: int = 0
    num_routers: int = 0
    post_sync: PostSync | None = None
    trainer_error: str | None = None  # how the trainer before this one ended, until this one is steady
    num_jobs: dict[str, int] = {}  # by state; states that no job has are left out
    oldest_queued_at: float | None = None
    num_trainer_deaths: int = 0  # since the worker's start, like those below
    num_watchdog_kills: int = 0  # trainers that hung
    memory_bytes: dict[str, int] = {}  # process -> resident and its own: not the weights that it maps


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
