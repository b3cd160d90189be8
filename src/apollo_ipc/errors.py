"""The project's own errors: each says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApolloError(Exception):
    """Base of every error that a user may see.

    code: a short stable name for programs (`invalid_example`, `not_attached`, ...).
    field: path of the bad field in what the user sent, e.g. `examples[0].messages`, or None.
    http_status: the status with which the router answers.
    exit_code: the CLI's and the worker's exit status.
    """

    code = "error"
    http_status = 500
    exit_code = 1

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.field = field
        if code is not None:
            self.code = code


class UserError(ApolloError):
    """What was sent is wrong; sending it again unchanged will fail again."""

    code = "invalid_request"
    http_status = 400
    exit_code = 2


class ConfigError(UserError):
    """A configuration file, environment variable or flag is wrong."""

    code = "invalid_config"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


class AlreadyRunning(ApolloError):
    """Another worker holds this runtime directory's lock."""

    code = "already_running"
    exit_code = 75  # EX_TEMPFAIL


class NotReady(ApolloError):
    """The worker or vLLM is not there yet, or not any more: the same request may succeed later."""

    code = "not_ready"
    http_status = 503
    exit_code = 69  # EX_UNAVAILABLE


class NotFound(UserError):
    code = "not_found"
    http_status = 404


class Conflict(UserError):
    """The idempotency key was used with another body, or the job is past the point of the request."""

    code = "conflict"
    http_status = 422


class AttachError(ApolloError):
    """The served weights cannot be mapped; `refused` names every parameter that stands in the way."""

    code = "cannot_attach"
    http_status = 503

    def __init__(self, message: str, *, refused: Iterable[str] = (), field: str | None = None):
        super().__init__(message, field=field)
        self.refused = list(refused)


class CheckpointError(ApolloError):
    code = "checkpoint_failed"


def nearest(name: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the known name nearest to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
