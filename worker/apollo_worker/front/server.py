"""The worker's end of the ZMQ socket, in a thread of its own: what arrives, who is there, what goes out.

Its asyncio loop does nothing that takes long. Requests are acknowledged by it at once and worked on by
front.answers in threads of their own.
Sends never wait: what a full or gone peer does not take is dropped, or sent again later where it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import zmq
import zmq.asyncio

from apollo_ipc.config import Config
from apollo_ipc.errors import ApolloError, NotReady
from apollo_ipc.wire.messages import (
    HEARTBEAT_INTERVAL_S,
    PROTOCOL_VERSION,
    Ack,
    BadMessage,
    CacheDropped,
    Heartbeat,
    Hello,
    JobEvent,
    Reply,
    Unwatch,
    Watch,
    decode_from_client,
    encode,
)
from apollo_ipc.wire.remote import error_info
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo
from apollo_worker.front.answers import Answers
from apollo_worker.front.endpoint import Endpoint
from apollo_worker.front.peers import Peers, Watches
from apollo_worker.front.publishing import Publisher
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import StatusBoard

logger = logging.getLogger(__name__)

EVENT_INTERVAL_S = 0.1  # at most this often to one watcher
MAX_IN_FLIGHT = 256  # requests acknowledged and not yet answered
START_TIMEOUT_S = 10.0
GOODBYE_S = 0.05


class Server:
    """`start` binds and returns; `stop` answers what is open with NotReady and closes.

    `publish`, `start_publishing` and `note_change` are for other threads; everything else happens in the
    server's own.
    """

    def __init__(self, config: Config, board: StatusBoard, queue: JobQueue):
        self.num_bad_messages = 0
        self._board = board
        self._queue = queue
        self._publish_distance_s = config.train.publish_distance_s
        self._answers = Answers(
            config, board, queue, lambda: (self.num_bad_messages, self._peers.num_routers)
        )
        self._endpoint = Endpoint(config.runtime_dir, config.socket_path)
        self._peers = Peers()
        self._watches = Watches()
        self._requests: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None

    # --- the main thread's side ---

    def start(self) -> None:
        """Raises AlreadyRunning (another worker serves this directory), ConfigError (path)."""
        self._endpoint.lock()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(started)), name="apollo-server", daemon=True
        )
        self._thread.start()
        try:
            started.result(START_TIMEOUT_S)
        except BaseException:
            self._endpoint.unlock()
            raise
        self._queue.on_change = self._on_change

    def stop(self) -> None:
        """Returns when the socket is closed and no thread of the server uses the queue any more."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._queue.on_change = None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._endpoint.unlock()  # last: closing the socket removes its file, which could be a successor's

    def publish(self, weight_version: int, timeout_s: float = 5.0) -> bool:
        """Has one live router of this vLLM drop its prefix cache. Call it after the last write of this
        version and after setting `board.state.weight_version`.

        True once a router confirmed. False when none is there (at once) or none confirmed in `timeout_s`:
        they are asked again, as soon as one is there.
        """
        return self.start_publishing(weight_version, timeout_s).result()

    def start_publishing(self, weight_version: int, timeout_s: float = 5.0) -> Future[bool]:
        """`publish` without waiting."""
        if self._thread is None or not self._thread.is_alive():
            stopped: Future[bool] = Future()
            stopped.set_result(False)
            return stopped
        publishing = self._publisher.publish(weight_version, timeout_s)
        return asyncio.run_coroutine_threadsafe(publishing, self._loop)

    def note_change(self, job_id: str) -> None:
        """This job has changed in the queue's file, here or in the trainer: its watchers are told."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody watches any more
            self._loop.call_soon_threadsafe(self._watches.note_change, job_id)

    def _on_change(self, job: JobInfo) -> None:
        """Called by the queue in whichever thread changed the job."""
        self.note_change(job.job_id)

    # --- the loop ---

    async def _serve(self, started: Future[None]) -> None:
        context = zmq.asyncio.Context()
        try:
            self._loop = asyncio.get_running_loop()
            self._stopped = asyncio.Event()
            self._publisher = Publisher(self._board, self._peers, self._send, self._publish_distance_s)
            self._socket = self._endpoint.bind(context)
        except BaseException as error:
            context.destroy(linger=0)
            started.set_exception(error)
            return
        started.set_result(None)
        work = (self._read, self._beat, self._push_events, self._publisher.keep_up)
        tasks = [asyncio.create_task(self._forever(step)) for step in work]
        await self._stopped.wait()
        for task in (*tasks, *self._requests):
            task.cancel()
        await asyncio.gather(*tasks, *self._requests, return_exceptions=True)
        await asyncio.sleep(GOODBYE_S)  # libzmq's thread writes out the last replies
        self._answers.stop()
        context.destroy(linger=0)

    async def _forever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception:
                # A bug in one message or one round must not silence the worker.
                logger.exception("%s failed; going on", step.__name__)
                await asyncio.sleep(EVENT_INTERVAL_S)

    async def _read(self) -> None:
        identity, *frames = await self._socket.recv_multipart()
        try:
            if len(frames) != 1:
                raise BadMessage(f"{len(frames)} frames where one was expected")
            message = decode_from_client(frames[0])
        except BadMessage as error:
            self.num_bad_messages += 1
            logger.warning("dropped a message: %s", str(error)[:200])
        else:
            self._handle(identity, message)
        # A socket that always has a message ready would never let the other tasks run.
        await asyncio.sleep(0)

    async def _beat(self) -> None:
        heartbeat = encode(self._heartbeat())
        for identity in self._peers.alive(time.monotonic()):
            self._send_data(identity, heartbeat)
        self._watches.keep_only(self._peers)
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    def _heartbeat(self) -> Heartbeat:
        board = self._board
        return Heartbeat(
            protocol=PROTOCOL_VERSION,
            worker_boot_id=board.worker_boot_id,
            vllm_boot_id=board.state.vllm_boot_id,
            attached=board.state.attached,
            weight_version=board.state.weight_version,
            progress=board.state.progress,
        )

    async def _push_events(self) -> None:
        """The jobs that changed, read once for all their watchers: whatever order the changes were told in,
        the newest state is what goes out."""
        for job_id in await self._watches.changed():
            job = await self._answers.job(job_id)
            if ended := job.state in ENDED_STATES:
                job = await self._answers.job(job_id, with_history=True)
            for identity, request_id in self._watches.of(job_id):
                if not self._send(identity, JobEvent(request_id, job, ended)):
                    self._watches.note_change(job_id)  # once more, until it is taken or the peer times out
                elif ended:
                    self._watches.remove(identity, request_id)
        await asyncio.sleep(EVENT_INTERVAL_S)

    # --- sending ---

    def _send(self, identity: bytes, message: Any) -> bool:
        return self._send_data(identity, encode(message))

    def _send_data(self, identity: bytes, data: bytes) -> bool:
        """Whether the peer's queue took it; never waits. A peer that has gone is forgotten."""
        # zmq.asyncio resolves a NOBLOCK send before it returns.
        error = self._socket.send_multipart([identity, data], zmq.NOBLOCK).exception()
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            self._peers.forget(identity)
        return error is None

    # --- what arrives ---

    def _handle(self, identity: bytes, message: Any) -> None:
        match message:
            case Hello():
                if message.protocol != PROTOCOL_VERSION:
                    refusal = self._peers.refuse(identity, message, time.monotonic())
                    self._send(identity, Reply("", error=error_info(refusal)))
                elif self._peers.greet(identity, message, time.monotonic()):
                    self._send(identity, self._heartbeat())  # the first: a client should not wait for it
            case CacheDropped():
                self._publisher.on_cache_dropped(identity, message)
            case Unwatch():
                self._watches.remove(identity, message.request_id)
            case _:
                self._send(identity, Ack(message.request_id))
                task = self._loop.create_task(self._answer(identity, message))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)

    async def _answer(self, identity: bytes, message: Any) -> None:
        """One request, whatever happens, gets one Reply (a Watch: only where it fails)."""
        try:
            if refusal := self._peers.refusal(identity):
                raise refusal
            if len(self._requests) > MAX_IN_FLIGHT:
                raise NotReady(f"{MAX_IN_FLIGHT} requests are being worked on; send it again", code="busy")
            reply = await self._work(identity, message)
            data = encode(reply) if reply is not None else None
        except asyncio.CancelledError:
            stopping = NotReady("the worker is stopping; send the request again", code="stopping")
            data = encode(Reply(message.request_id, error=error_info(stopping)))
        except Exception as error:
            if not isinstance(error, ApolloError):
                logger.exception("%s failed", type(message).__name__)
            data = encode(Reply(message.request_id, error=error_info(error)))
        if data is not None and not self._send_data(identity, data):
            logger.warning("a client did not take the reply to its %s", type(message).__name__)

    async def _work(self, identity: bytes, message: Any) -> Reply | None:
        if not isinstance(message, Watch):
            return await self._answers.reply_to(message)
        await self._answers.job(message.job_id)  # NotFound, if it is unknown
        self._watches.add(identity, message.request_id, message.job_id)
        return None
