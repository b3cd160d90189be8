"""Every message between the worker's two processes, and the socket pair that they travel over.

    front                                    trainer (its child)
      Start ------------------------------>          first, once
            <------------------------------ State    after changes, at least every STATE_INTERVAL_S
            <------------------------------ JobChanged
            <------------------------------ ModelFacts  at each attach
            <------------------------------ Publish
      Published -------------------------->
      Ask -------------------------------->
            <------------------------------ Answered | Refused
      Wake, Stop ------------------------->

Four bytes of length, then a msgpack map tagged with the type's name. Neither end ever waits for the other:
a thread of its own writes, and what waits for it is bounded. End of file: the other process has ended.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from apollo_ipc.config import Config
from apollo_ipc.wire.messages import RestoreVersion, SyncCheckpoint
from apollo_ipc.wire.replies import ErrorInfo, RestoreResult, SyncResult, TrainerState

logger = logging.getLogger(__name__)

MAX_LINK_BYTES = 16 * 1024 * 1024  # ModelFacts of a model with 100,000 matrices
MAX_WAITING = 1000  # messages that the other end has not taken yet; more are dropped
STATE_INTERVAL_S = 1.0  # the trainer's heartbeat: a State, changed or not
ENDED = "ended"  # the activity of a trainer whose `attach_error` says what ends it
UPDATE_INTERVAL_S = 0.05  # States and JobChanged go out at most this often

# --- front -> trainer ---


class Start(msgspec.Struct, frozen=True, tag=True):
    """First of all. state: what the trainer before this one last said; the new one goes on from it."""

    config: Config
    state: TrainerState


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Look at the queue: a job was submitted or cancelled."""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """What a client wants done between two steps. Replied to by Answered or Refused with this id."""

    id: int
    request: SyncCheckpoint | RestoreVersion


class Published(msgspec.Struct, frozen=True, tag=True):
    """Answer to Publish. ok: a router has confirmed that it dropped its prefix cache."""

    weight_version: int
    ok: bool


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Finish the step, write the last checkpoint, end."""


FromFront = Start | Wake | Ask | Published | Stop

# --- trainer -> front ---


class State(msgspec.Struct, frozen=True, tag=True):
    """The trainer's state, after changes and at least every STATE_INTERVAL_S."""

    state: TrainerState


class ModelFacts(msgspec.Struct, frozen=True, tag=True):
    """What the front needs to tokenise and admit requests, also after vLLM or the trainer has gone.

    smaller_dims: name of each 2-D parameter -> its smaller dimension.
    """

    model_dir: str
    vocab_size: int
    max_tokens: int
    smaller_dims: dict[str, int]


class JobChanged(msgspec.Struct, frozen=True, tag=True):
    """The trainer has changed this job in the queue's file; its watchers want to know."""

    job_id: str


class Publish(msgspec.Struct, frozen=True, tag=True):
    """The weights are at this version: have a router drop its prefix cache. Answered by Published."""

    weight_version: int


class Answered(msgspec.Struct, frozen=True, tag=True):
    """One of the two is set."""

    id: int
    sync: SyncResult | None = None
    restore: RestoreResult | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    id: int
    error: ErrorInfo


FromTrainer = State | ModelFacts | JobChanged | Publish | Answered | Refused

_encoder = msgspec.msgpack.Encoder()


class Link:
    """One end of the socket pair.

    accepts: the union of types that may arrive. `receive` is for one thread; `send` and `note` for any.
    """

    def __init__(self, connection: socket.socket, accepts: Any):
        self.num_bad_messages = 0
        self.is_closed = threading.Event()
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(accepts)
        self._waiting: list[Any] = []
        self._updates: dict[Any, Callable[[], Any]] = {}  # what it is of -> makes the newest message
        self._news = threading.Condition()
        self._sent_at = 0.0
        self._is_finishing = False
        self._heartbeat: tuple[Any, Callable[[], Any]] | None = None
        self._writer = threading.Thread(target=self._write, name="apollo-link", daemon=True)
        self._writer.start()

    def send(self, message: Any) -> bool:
        """Never waits. False: the link is closed, or too much waits for an end that takes nothing."""
        with self._news:
            if self.is_closed.is_set() or len(self._waiting) >= MAX_WAITING:
                return False
            self._waiting.append(message)
            self._news.notify()
        return True

    def note(self, key: Any, make: Callable[[], Any]) -> None:
        """Sends `make()` soon, and before any later `send`: one message for many notes of the same key."""
        with self._news:
            self._updates[key] = make
            self._news.notify()

    def beat(self, key: Any, make: Callable[[], Any]) -> None:
        """From now on as if noted at least every STATE_INTERVAL_S."""
        self._heartbeat = key, make
        self.note(key, make)

    def receive(self) -> Any:
        """Waits for the next message. Bytes that are none are dropped and counted. Raises EOFError, also for
        a length that no message has: nothing after it can be read."""
        while True:
            try:
                size = int.from_bytes(self._exactly(4), "big")
                if size > MAX_LINK_BYTES:
                    logger.error("a message of %d bytes on the link: closing it", size)
                    raise EOFError
                data = self._exactly(size)
            except EOFError:
                self.close()
                raise
            try:
                return self._decoder.decode(data)
            # The same as in apollo_ipc.wire.messages._decode, which says what each stands for.
            except (
                msgspec.DecodeError,
                RecursionError,
                MemoryError,
                OverflowError,
                UnicodeDecodeError,
            ) as error:
                self.num_bad_messages += 1
                logger.warning("dropped a message on the link: %s", str(error)[:200])

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._connection.recv(min(size - len(parts), 1024 * 1024))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _write(self) -> None:
        try:
            while not self.is_closed.is_set():
                messages, is_last = self._next()
                for message in messages:
                    self._connection.sendall(frame(message))
                if is_last:
                    return
        except OSError:
            pass
        finally:
            if not self._is_finishing:  # `finish` closes by itself, once the other end has everything
                self.close()

    def _next(self) -> tuple[list[Any], bool]:
        """What is to be sent now, waiting for it; and whether it is the last."""
        with self._news:
            while True:
                since_s = time.monotonic() - self._sent_at
                if self._heartbeat and since_s >= STATE_INTERVAL_S:
                    self._updates.setdefault(*self._heartbeat)
                if self._waiting or self._is_finishing or self.is_closed.is_set():
                    break
                if self._updates and since_s >= UPDATE_INTERVAL_S:
                    break
                if self._updates:
                    self._news.wait(UPDATE_INTERVAL_S - since_s)
                else:
                    self._news.wait(STATE_INTERVAL_S - since_s if self._heartbeat else None)
            messages = [*(make() for make in self._updates.values()), *self._waiting]
            self._updates, self._waiting = {}, []
            self._sent_at = time.monotonic()
            return messages, self._is_finishing

    def finish(self, timeout_s: float) -> None:
        """Closes once everything is with the other end, or after `timeout_s`."""
        with self._news:
            self._is_finishing = True
            self._news.notify()
        self._writer.join(timeout_s)
        self.close()

    def close(self) -> None:
        """Wakes both threads of this end, and tells the other end's reader."""
        self.is_closed.set()
        with suppress(OSError):  # closed by the other end already
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._news:
            self._news.notify()


def frame(message: Any) -> bytes:
    data = _encoder.encode(message)
    assert len(data) <= MAX_LINK_BYTES, f"a {type(message).__name__} of {len(data)} bytes"
    return len(data).to_bytes(4, "big") + data


def make_pair() -> tuple[socket.socket, socket.socket]:
    """(the front's end, the trainer's end). Neither is inherited unless asked."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
