"""Query parameters, headers and small bodies, checked strictly: a misspelt `wait` must not be ignored."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request

from apollo_ipc.errors import UserError
from apollo_ipc.wire.replies import JobState
from apollo_ipc.wire.requests import explain

MAX_KEY_CHARS = 255

T = TypeVar("T", bound=msgspec.Struct)


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class TrainQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    wait: bool = False  # answer when the job has ended
    dry_run: bool = False  # answer with what would be trained; queue nothing


class JobsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50
    state: JobState | None = None
    before: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None  # the `seq` of a job: only older ones


class FeedbackBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /feedback`: exactly one of rating and correction, which is a better answer."""

    completion_id: str
    rating: Literal["up", "down"] | None = None
    correction: str | None = None


def read_query(request: Request, into: type[T], leave_out: str | None = None) -> T:
    """The query string as `into`, but for names that begin with `leave_out`. Raises UserError naming the
    parameter, and the nearest known one."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if leave_out is not None and name.startswith(leave_out):
            continue
        if name in given:
            raise UserError(f"query parameter {name!r} is given twice", field=name)
        given[name] = value
    try:
        return msgspec.convert(given, into, strict=False)  # not strict: "true" and "10" are text here
    except msgspec.ValidationError as error:
        if not into.__struct_fields__:
            raise UserError("this route takes no query parameters", field=next(iter(given))) from None
        explained = explain(error, given, into)
        # Every value is text before it is converted: "got `str`" would only confuse.
        message = f"query parameter {explained.field}: {explained.message.removesuffix(', got `str`')}"
        raise UserError(message, field=explained.field) from None


def read_idempotency_key(request: Request) -> str | None:
    """Raises UserError unless the header is absent or 1 to 255 printable ASCII characters."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise UserError(
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters",
            field="Idempotency-Key",
            code="invalid_idempotency_key",
        )
    return key
