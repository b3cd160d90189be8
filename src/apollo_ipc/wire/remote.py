"""Exceptions across the wire: what the worker's `error_info` writes, the client's `error_from` reads."""

from __future__ import annotations

import traceback

from apollo_ipc import errors
from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import ErrorInfo


class RemoteError(ApolloError):
    """Something in the worker failed that is no error of our own; `traceback` is the worker's."""

    code = "worker_error"


def error_info(error: BaseException) -> ErrorInfo:
    """`error` as it crosses the wire: a user's mistake without a traceback, anything unforeseen with it."""
    if isinstance(error, ApolloError):
        return ErrorInfo(
            type=type(error).__name__,
            message=error.message,
            code=error.code,
            http_status=error.http_status,
            field=error.field,
        )
    return ErrorInfo(
        type=type(error).__name__,
        message=str(error),
        code=RemoteError.code,
        traceback="".join(traceback.format_exception(error)),
    )


def error_from(info: ErrorInfo) -> ApolloError:
    """The exception that `info` tells of: one of apollo_ipc.errors by name, RemoteError for all others.

    It keeps message, code, field and http_status, and has an attribute `traceback` (the worker's, or None).
    """
    kind = getattr(errors, info.type, None)
    if isinstance(kind, type) and issubclass(kind, ApolloError):
        error = kind(info.message, field=info.field)
    else:
        error = RemoteError(f"{info.type}: {info.message}", field=info.field)
    error.code = info.code
    error.http_status = info.http_status
    error.traceback = info.traceback  # type: ignore[attr-defined]
    return error
