"""A job of the worker as OpenAI's clients see it: the job, its events, its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from apollo_ipc.config import Train
from apollo_ipc.errors import UserError
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import convert
from apollo_router.fine_tuning.create import CreateJob, resolved
from apollo_router.fine_tuning.store import StoredFile, StoredJob

ORGANIZATION = "apollo-ipc"
_STATUS = {
    "queued": "queued",
    "running": "running",
    "applied": "succeeded",
    "durable": "succeeded",
    "failed": "failed",
    "quarantined": "failed",
    "undone": "failed",
    "cancelled": "cancelled",
}

T = TypeVar("T")


def status_of(stored: StoredJob, info: JobInfo | None) -> str:
    """info: None where the worker has not accepted it yet, or has refused it."""
    if info is None:
        return "failed" if stored.error is not None else "validating_files"
    if info.paused_at is not None:
        return "paused"
    return _STATUS[info.state]


def job_object(stored: StoredJob, info: JobInfo | None, model: str, defaults: Train) -> dict[str, Any]:
    """model: the name under which the weights are served."""
    create = convert(stored.request, CreateJob)
    method = "dpo" if create.is_dpo else "supervised"
    status, numbers = status_of(stored, info), resolved(create, defaults)
    ended_at = info.ended_at if info is not None else None
    return {
        "id": stored.id,
        "object": "fine_tuning.job",
        "created_at": int(stored.created_at),
        "error": _error(stored, info, status),
        "estimated_finish": None,
        "fine_tuned_model": model if status == "succeeded" else None,
        "finished_at": None if ended_at is None else int(ended_at),
        "hyperparameters": {name: value for name, value in numbers.items() if name != "beta"},
        "integrations": [],
        "metadata": create.metadata,
        "method": {"type": method, method: {"hyperparameters": numbers}},
        "model": create.model,
        "organization_id": ORGANIZATION,
        "result_files": [],
        "seed": create.seed or 0,
        "status": status,
        "suffix": create.suffix,
        "trained_tokens": None,
        "training_file": create.training_file,
        "validation_file": create.validation_file,
    }


def _error(stored: StoredJob, info: JobInfo | None, status: str) -> dict[str, Any] | None:
    if status != "failed":
        return None
    if info is None:
        return stored.error
    return {"code": f"job_{info.state}", "message": info.why_ended or "", "param": None}


def events(stored: StoredJob, info: JobInfo | None) -> list[dict[str, Any]]:
    """The newest first. info: with its loss_history. A step has the time of the job's start: none is kept."""
    found: list[dict[str, Any]] = []

    def say(message: str, at: float | None, level: str = "info", **more: Any) -> None:
        found.append(
            {
                "id": f"ftevent-{stored.id.removeprefix('ftjob-')}-{len(found)}",
                "object": "fine_tuning.job.event",
                "created_at": int(stored.created_at if at is None else at),
                "level": level,
                "message": message,
                "type": "message",
                **more,
            }
        )

    say(f"Created fine-tuning job: {stored.id}", stored.created_at)
    if stored.error is not None:
        say(str(stored.error["message"]), None, "error")
    if info is None:
        return found[::-1]
    say(f"The worker has taken it as {info.job_id}: {info.num_steps} steps", info.created_at)
    for note in info.notes:
        say(note, info.started_at)
    if info.started_at is not None:
        say("Fine-tuning job started", info.started_at)
    for step, loss in enumerate(info.loss_history or [], 1):
        is_number = loss is not None and math.isfinite(loss)
        text = f"training loss={loss:.4f}" if is_number else "the training loss was no number"
        data = {"step": step, "total_steps": info.num_steps, "train_loss": loss if is_number else None}
        say(f"Step {step}/{info.num_steps}: {text}", info.started_at, type="metrics", data=data)
    if info.paused_at is not None:
        say("Paused: the jobs behind it wait until it is resumed or cancelled", info.paused_at)
    if info.state in ("applied", "durable"):
        say("The job has successfully completed: the served weights hold it", info.ended_at)
    elif info.ended_at is not None:
        why = f": {info.why_ended}" if info.why_ended else ""
        say(f"The job ended: {info.state}{why}", info.ended_at, "error")
    return found[::-1]


def checkpoints(stored: StoredJob, info: JobInfo | None, model: str) -> list[dict[str, Any]]:
    """The weights on disk, once they hold the job: there is one copy, and it is the served one."""
    if info is None or info.state != "durable":
        return []
    return [
        {
            "id": f"ftckpt-{stored.id.removeprefix('ftjob-')}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(info.ended_at or info.created_at),
            "fine_tuned_model_checkpoint": model,
            "fine_tuning_job_id": stored.id,
            "metrics": {"step": info.steps_done, "train_loss": info.loss_last},
            "step_number": info.steps_done,
        }
    ]


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": "fine-tune",
        "status": "processed",
    }


def page(items: list[T], limit: int, after: str | None, id_of: Callable[[T], str]) -> tuple[list[T], bool]:
    """The `limit` items that follow the one with the id `after`, and whether more do. Raises UserError."""
    start = 0
    if after is not None:
        start = next((i + 1 for i, item in enumerate(items) if id_of(item) == after), 0)
        if start == 0:
            raise UserError(f"no item has the id {after!r}", field="after")
    return items[start : start + limit], start + limit < len(items)


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def has_metadata(stored: StoredJob, wanted: Mapping[str, str]) -> bool:
    held = stored.request.get("metadata") or {}
    return all(held.get(name) == value for name, value in wanted.items())
