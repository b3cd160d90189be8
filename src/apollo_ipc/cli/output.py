"""How jobs, status and errors look: words for a person, JSON for a program."""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from apollo_ipc.errors import ApolloError
from apollo_ipc.process.say import say
from apollo_ipc.wire.replies import JobInfo, PostSync, RestoreResult, Status, SyncResult

FAILED_STATES = ("failed", "cancelled", "quarantined", "undone")


def print_json(data: Any) -> None:
    """Anything that msgspec encodes, on standard output."""
    print(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())


def print_json_line(data: Any) -> None:
    """One line a value, flushed: for a reader that follows along."""
    print(msgspec.json.encode(data).decode(), flush=True)


def print_error(error: ApolloError) -> None:
    """One sentence on standard error, or with --json the object that HTTP answers too, on standard output."""
    if "--json" in sys.argv:
        print_json({"error": {"message": error.message, "param": error.field, "code": error.code}})
        return
    say(f"{error.field}: {error.message}" if error.field else error.message)
    for name in getattr(error, "refused", []):
        say(f"  {name}")
    # Only for what the worker did not foresee (apollo_ipc/wire/remote.py); never for a user's mistake.
    if remote := getattr(error, "traceback", None):
        say(f"the worker's traceback:\n{remote.rstrip()}")


def describe_job(job: JobInfo) -> str:
    parts = [f"job {job.job_id}: {job.state}", f"{job.num_examples} examples"]
    if job.num_skipped:
        parts.append(f"{job.num_skipped} of them skipped, trained before")
    parts.append(f"{job.steps_done} of {job.num_steps} steps")
    if losses := describe_loss(job):
        parts.append(f"loss {losses}")
    if job.weight_version is not None:
        parts.append(f"in weight version {job.weight_version}")
    if job.why_ended:
        parts.append(job.why_ended)
    return ", ".join(parts)


def describe_loss(job: JobInfo) -> str:
    if job.loss_last is None:
        return ""
    if job.loss_first is None or job.steps_done < 2:
        return f"{job.loss_last:.4g}"
    return f"{job.loss_first:.4g} -> {job.loss_last:.4g}"


def describe_sync(sync: SyncResult) -> str:
    return (
        f"weight version {sync.weight_version} is on disk"
        f"{' as a delta' if sync.kind == 'delta' else ''}: {sync.num_tensors_changed} of {sync.num_tensors} "
        f"tensors changed, {describe_bytes(sync.bytes_compared)} compared, "
        f"{describe_bytes(sync.bytes_written)} written, {sync.duration_s:.2g} s"
    )


def describe_restore(restore: RestoreResult) -> str:
    return (
        f"version {restore.restored_version} came back as version {restore.weight_version}, "
        f"{describe_undone(restore)}"
    )


def describe_undone(restore: RestoreResult) -> str:
    back = f", {restore.num_jobs_back} back" if restore.num_jobs_back else ""
    return f"{restore.num_jobs_undone} jobs undone{back}"


def describe_post_sync(run: PostSync) -> str:
    how = "runs" if run.ended_at is None else run.error or "has ended well"
    return f"the command for weight version {run.weight_version} {how}"


def describe_bytes(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def describe_ago(at: float) -> str:
    """`at` in seconds since the epoch."""
    seconds = max(0.0, time.time() - at)
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def jobs_table(jobs: list[JobInfo]) -> Table:
    whole = ("job", "state", "steps", "loss", "examples", "accepted")  # where room is short, the error folds
    table = Table(*(Column(name, no_wrap=True) for name in whole), "error", box=None, pad_edge=False)
    for job in jobs:
        table.add_row(
            job.job_id,
            job.state,
            f"{job.steps_done}/{job.num_steps}",
            describe_loss(job),
            str(job.num_examples),
            describe_ago(job.created_at),
            job.why_ended or "",
        )
    return table


def status_table(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    progress = status.progress
    doing = progress.activity
    if progress.job_id:
        doing += f", job {progress.job_id}, step {progress.steps_done} of {progress.num_steps}"
    if progress.loss is not None:
        doing += f", loss {progress.loss:.4g}"
    attached = f"vLLM {status.vllm_pid}" if status.attached else f"no: {status.attach_error or 'no vLLM yet'}"
    saved = describe_sync(status.last_sync) if status.last_sync else "nothing yet"
    if status.last_sync:
        saved += f", {describe_ago(status.last_sync.committed_at)}"
    if status.is_syncing:
        saved += "; one is being written"
    rows = {
        "worker": f"pid {status.worker_pid}, {doing}",
        "attached": attached,
        "model": status.model_path or "",
        "parameters": f"{status.num_parameters_mapped} of {status.num_parameters} mapped",
        "weights": f"version {status.weight_version} served, version {status.durable_version} on disk",
        "queued": str(status.num_queued),
        "last sync": saved,
        "sync error": status.sync_error,
        "last restore": describe_restore(status.last_restore) if status.last_restore else None,
        "trainer": status.trainer_error,
        "after the sync": describe_post_sync(status.post_sync) if status.post_sync else None,
        "optimizer": describe_bytes(status.optimizer_state_bytes) if status.optimizer_state_bytes else None,
    }
    for name, text in rows.items():
        if text is not None:
            table.add_row(name, text)
    for name in status.refused:
        table.add_row("refused", name)
    return table


def console(stderr: bool = False) -> Console:
    """As wide as the terminal, and wide enough for a line a row where there is none."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    return console
