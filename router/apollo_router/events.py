"""Server-sent events of one job (WHATWG HTML, "Server-sent events")."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from anyio import CancelScope

from apollo_ipc.errors import ApolloError
from apollo_ipc.wire.replies import JobInfo
from apollo_router.errors import error_body
from apollo_router.gateway import Gateway

HEARTBEAT_S = 10.0  # a comment line this often: proxies close silent connections after 30-60 s


def encode_event(name: str, data: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


async def event_stream(
    gateway: Gateway, jobs: AsyncGenerator[tuple[JobInfo, bool], None], heartbeat_s: float = HEARTBEAT_S
) -> AsyncIterator[bytes]:
    """`event: job` for each change, `event: end` for the last one, `event: error` where the worker is lost.

    Between them a comment line every `heartbeat_s` of silence. Closes `jobs` at its end.
    """
    following = None
    async with aclosing(jobs):
        try:
            while True:
                following = following or asyncio.ensure_future(gateway.until_gone(anext(jobs)))
                # Not wait_for: its cancellation would lose the event that arrives just then.
                await asyncio.wait({following}, timeout=heartbeat_s)
                if not following.done():
                    yield b": waiting\n\n"
                    continue
                job, ended = following.result()
                following = None
                yield encode_event("end" if ended else "job", job)
                if ended:
                    return
        except ApolloError as error:
            yield encode_event("error", {"error": error_body(error)})
        finally:
            if following is not None and not following.done():
                following.cancel()
                # `jobs` cannot be closed while it is still running. Shielded: anyio, by which Starlette ends
                # a stream, cancels at each await again.
                with CancelScope(shield=True):
                    await asyncio.wait({following})
