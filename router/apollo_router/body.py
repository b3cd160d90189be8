"""Reading a request's body with a bound on memory and time. It is decoded elsewhere: in the worker."""

from __future__ import annotations

import asyncio
from typing import Literal

from starlette.requests import Request

from apollo_router.errors import HttpError

BODY_TIMEOUT_S = 120.0  # 32 MiB at 2.3 Mbit/s
PROTOBUF = "application/x-protobuf"

Wanted = Literal["json", "form", "protobuf"]


async def read_body(request: Request, max_bytes: int, wanted: Wanted = "json") -> bytes:
    """The body, never holding more than `max_bytes` of it. wanted: "form", a multipart one, or "protobuf", a
    message, which may be compressed (zstd).

    Raises HttpError: 413 as soon as the body is known to be larger (from Content-Length before the first byte
    is read), 415 where it is declared as something else than what is wanted, 408 where it takes longer than
    BODY_TIMEOUT_S. After a 413 uvicorn discards what is still sent, so that the client can read the answer.
    """
    _check_type(request, wanted)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and declared.isascii() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise HttpError(
            408,
            "body_timeout",
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s",
            headers={"Connection": "close"},
        ) from None
    return b"".join(chunks)


def _check_type(request: Request, wanted: Wanted) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if wanted == "protobuf":
        if kind != PROTOBUF:
            raise HttpError(415, "unsupported_media_type", f"send {PROTOBUF}", field="Content-Type")
        return
    if wanted == "form":
        if kind != "multipart/form-data":
            raise HttpError(
                415, "unsupported_media_type", "send a multipart/form-data form", field="Content-Type"
            )
    # Refusing form types also refuses what a web page may post across origins without a preflight.
    elif kind and kind != "application/json" and not kind.endswith("+json"):
        raise HttpError(
            415,
            "unsupported_media_type",
            f"the body must be JSON, not {kind} (curl: -H 'Content-Type: application/json')",
            field="Content-Type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HttpError(
            415, "unsupported_encoding", f"send the body as it is, not {encoding}", field="Content-Encoding"
        )


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, "body_too_large", f"the body is larger than {max_bytes} bytes; send several jobs")
