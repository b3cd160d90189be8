"""The client's end of the ZMQ socket: vLLM's router and the CLI talk to the worker through this.

One DEALER socket and one task that reads it. Nothing here waits for `recv()` with a timeout: pyzmq loses the
message when such a wait is cancelled; waits are on our own futures and events instead. Sends never wait
either: a message goes at once or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import zmq
import zmq.asyncio

from apollo_ipc.errors import ApolloError, ConfigError, NotReady
from apollo_ipc.wire.messages import (
    ACK_TIMEOUT_S,
    HELLO_INTERVAL_S,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Ack,
    BadMessage,
    DropCache,
    Heartbeat,
    Hello,
    JobEvent,
    Reply,
    Unwatch,
    Watch,
    decode_from_worker,
    encode,
)
from apollo_ipc.wire.remote import error_from
from apollo_ipc.wire.replies import JobInfo

logger = logging.getLogger(__name__)

ALIVE_WITHIN_S = 1.5  # six heartbeats
LOST_AFTER_S = 10.0  # an acknowledged request is given up when the worker has been silent for this long
WATCH_AGAIN_S = 2.0  # a watch that has heard nothing for this long asks again
MAX_WAITING_MESSAGES = 128  # per direction (HWM)
MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), without its final zero

TICK_S = 0.1
CONNECT_TICK_S = 0.01


def ipc_address(socket_path: Path) -> str:
    """The ZMQ address of `socket_path`. Raises ConfigError where the path is longer than unix(7) allows."""
    num_bytes = len(os.fsencode(socket_path))
    if num_bytes > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{socket_path}: {num_bytes} bytes is too long for a Unix socket "
            f"(limit {MAX_SOCKET_PATH_BYTES}); choose a shorter paths.runtime_dir",
            field="paths.runtime_dir",
        )
    return f"ipc://{socket_path}"


class _Request:
    def __init__(self) -> None:
        self.acked = asyncio.Event()
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()


class _Watch:
    """Only the newest event matters, so a slow consumer costs no memory."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.latest: JobEvent | None = None
        self.error: ApolloError | None = None


class WorkerClient:
    """`async with WorkerClient(path, "cli") as client: reply = await client.request(GetStatus(""))`.

    on_drop_cache: routers: called with the version of each DropCache; answered by `tell(CacheDropped(...))`.
    vllm_boot_id: routers: the vLLM they live in (None while unknown).

    Every method belongs to the event loop that entered the context. Raises ConfigError (path too long).
    """

    def __init__(
        self,
        socket_path: Path,
        role: Literal["router", "cli"],
        on_drop_cache: Callable[[int], None] | None = None,
        vllm_boot_id: Callable[[], str | None] | None = None,
    ):
        self.heartbeat: Heartbeat | None = None
        self.num_bad_messages = 0
        self._address = ipc_address(socket_path)
        self._role: Literal["router", "cli"] = role
        self._vllm_boot_id = vllm_boot_id or (lambda: None)
        self._heard_at: float | None = None  # time.monotonic() of the last heartbeat
        self._refusal: ApolloError | None = None  # the worker speaks another protocol version
        self._requests: dict[str, _Request] = {}
        self._watches: dict[str, _Watch] = {}
        self._on_drop_cache = on_drop_cache

    async def __aenter__(self) -> Self:
        self._said_hello = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # IMMEDIATE: a message waits in no queue for a worker that is not there, to train at some later time.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_WAITING_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, MAX_WAITING_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.connect(self._address)
        self._tasks = [asyncio.create_task(task) for task in (self._read(), self._say_hello())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    @property
    def heartbeat_age_s(self) -> float | None:
        """Seconds since the last heartbeat, None before the first."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    @property
    def is_alive(self) -> bool:
        age_s = self.heartbeat_age_s
        return age_s is not None and age_s < ALIVE_WITHIN_S

    @property
    def _boot_id(self) -> str | None:
        return self.heartbeat.worker_boot_id if self.heartbeat else None

    async def request(
        self, message: Any, *, ack_timeout_s: float = ACK_TIMEOUT_S, timeout_s: float = 60.0
    ) -> Reply:
        """Sends `message` (its request_id may be left empty) and waits for its Reply.

        Raises NotReady with code `not_delivered` when no worker took it within `ack_timeout_s`: nothing was
        done. With `not_acknowledged` (taken, no Ack), `worker_lost` (died or restarted after its Ack) and
        `reply_timeout` (after `timeout_s`) it may have been done all the same: a Submit is sent again with
        the same idempotency key. Raises whatever error the worker answered too (see `error_from`), and
        UserError where the message is too large.
        """
        if not message.request_id:
            message = msgspec.structs.replace(message, request_id=uuid.uuid4().hex)
        data = encode(message)
        started = time.monotonic()
        request = self._requests[message.request_id] = _Request()
        try:
            sent = await self._send_by(data, started + ack_timeout_s)
            if not sent:
                raise self._refusal or NotReady(
                    f"no worker answers on {self._address}; is it running? Start: apollo-ipc worker",
                    code="not_delivered",
                )
            left_s = max(0.0, started + ack_timeout_s - time.monotonic())
            if not await self._acked(request, left_s):
                raise self._refusal or NotReady(
                    f"the worker got the request, but did not confirm it within {ack_timeout_s:g} s: "
                    "it may have been done all the same",
                    code="not_acknowledged",
                )
            reply = await self._reply(request, started + timeout_s)
        finally:
            del self._requests[message.request_id]
        if reply.error is not None:
            raise error_from(reply.error)
        return reply

    async def _acked(self, request: _Request, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(request.acked.wait(), timeout_s)
            return True
        # Where the loop was blocked, the Ack may lie unread in the socket.
        await asyncio.sleep(CONNECT_TICK_S)
        return request.acked.is_set()

    async def _reply(self, request: _Request, deadline: float) -> Reply:
        acked_at = time.monotonic()
        boot_id = self._boot_id
        while not request.reply.done():
            now = time.monotonic()
            if now >= deadline:
                raise NotReady("the worker took the request but has not finished it", code="reply_timeout")
            boot_id = boot_id or self._boot_id  # its first heartbeat may come after the Ack
            if boot_id != self._boot_id or now - max(acked_at, self._heard_at or 0.0) > LOST_AFTER_S:
                raise NotReady(
                    "the worker died before it answered; send the request again", code="worker_lost"
                )
            await asyncio.wait({request.reply}, timeout=min(TICK_S, deadline - now))
        return request.reply.result()

    async def watch(
        self, job_id: str, *, silence_s: float = 30.0
    ) -> AsyncGenerator[tuple[JobInfo, bool], None]:
        """Yields (job, ended) now and after changes (about ten a second at most), until `ended` is true.

        A worker that restarts is asked again; one that sends nothing for `silence_s` raises NotReady. Other
        errors as in `request`; NotFound where there is no such job.
        """
        message = Watch(uuid.uuid4().hex, job_id)
        watch = self._watches[message.request_id] = _Watch()
        started = time.monotonic()
        asked_at: float | None = None
        asked_boot_id: str | None = None
        try:
            while True:
                now = time.monotonic()
                if self._refusal is not None:
                    raise self._refusal
                if now - max(started, self._heard_at or 0.0) > silence_s:
                    raise NotReady(
                        f"nothing heard from the worker for {silence_s:g} s; is it running? "
                        "Start: apollo-ipc worker",
                        code="worker_lost",
                    )
                # Asking again also mends a watch that the worker forgot while this process was suspended.
                stale = asked_at is None or now - asked_at > WATCH_AGAIN_S or asked_boot_id != self._boot_id
                if stale and self._send(encode(message)):
                    asked_at, asked_boot_id = now, self._boot_id
                with suppress(TimeoutError):
                    await asyncio.wait_for(watch.changed.wait(), TICK_S)
                watch.changed.clear()
                if watch.error is not None:
                    raise watch.error
                if (event := watch.latest) is not None:
                    watch.latest, asked_at = None, time.monotonic()
                    yield event.job, event.ended
                    if event.ended:
                        return
        finally:
            del self._watches[message.request_id]
            self._send(encode(Unwatch(message.request_id)))

    # --- sending ---

    def tell(self, message: Any) -> bool:
        """Sends what gets no reply. Whether a connected worker's queue took it; never waits."""
        return self._send(encode(message))

    def _send(self, data: bytes) -> bool:
        """Whether a connected worker's queue took it; never waits."""
        if self._socket.closed:
            return False
        # zmq.asyncio resolves a NOBLOCK send before it returns.
        sending: Any = self._socket.send(data, zmq.NOBLOCK)
        return sending.exception() is None

    async def _send_by(self, data: bytes, deadline: float) -> bool:
        while not (self._said_hello.is_set() and self._send(data)):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(CONNECT_TICK_S)
        return True

    async def _say_hello(self) -> None:
        while True:
            hello = Hello(
                protocol=PROTOCOL_VERSION,
                role=self._role,
                pid=os.getpid(),
                vllm_boot_id=self._vllm_boot_id(),
            )
            if self._send(encode(hello)):
                self._said_hello.set()
                await asyncio.sleep(HELLO_INTERVAL_S)
            else:
                await asyncio.sleep(CONNECT_TICK_S)

    # --- receiving ---

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                self._handle(decode_from_worker(frames[-1]))
            except BadMessage as error:
                self.num_bad_messages += 1
                logger.warning("dropped a message from the worker: %s", error)
            except Exception:
                logger.exception("a message from the worker could not be handled; going on")

    def _handle(self, message: Any) -> None:
        match message:
            case Heartbeat():
                self.heartbeat, self._heard_at, self._refusal = message, time.monotonic(), None
            case Ack():
                if request := self._requests.get(message.request_id):
                    request.acked.set()
            case Reply():
                self._on_reply(message)
            case JobEvent():
                if watch := self._watches.get(message.request_id):
                    watch.latest = message
                    watch.changed.set()
            case DropCache():
                if self._on_drop_cache is not None:
                    self._on_drop_cache(message.weight_version)
            case _:
                pass

    def _on_reply(self, reply: Reply) -> None:
        if not reply.request_id and reply.error is not None:
            self._refusal = error_from(reply.error)
        elif request := self._requests.get(reply.request_id):
            request.acked.set()
            if not request.reply.done():
                request.reply.set_result(reply)
        elif (watch := self._watches.get(reply.request_id)) and reply.error is not None:
            watch.error = error_from(reply.error)
            watch.changed.set()


def call(socket_path: Path, message: Any, timeout_s: float = 60.0) -> Reply:
    """One request from a program without an event loop; raises as `WorkerClient.request` does."""

    async def ask() -> Reply:
        async with WorkerClient(socket_path, "cli") as client:
            return await client.request(message, timeout_s=timeout_s)

    return asyncio.run(ask())
