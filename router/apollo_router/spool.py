"""What was heard, as JSON lines in a directory of ours: 0700, its files 0600, all together below a cap.

A conversation that goes on is one record: a record is held for HOLD_S, and a request that continues it takes
its place. Held records are written when the server stops; a crash loses those of the last minute.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import msgspec

from apollo_ipc.config import make_private_dir
from apollo_router.log import logger

HOLD_S = 60.0
MAX_HELD_BYTES = 64 * 1024 * 1024
MAX_WAITING = 256  # exchanges that nobody has decoded yet; more are not recorded
FILE_BYTES = 32 * 1024 * 1024  # from here on the next file is begun
CHUNK_BYTES = 1 << 20
TICK_S = 0.5


class Heard(Protocol):
    def record(self) -> dict[str, Any] | None: ...


class _Held(msgspec.Struct):
    data: bytes
    heard_at: float


class Spool:
    """max_bytes: of all files; the oldest go. `open` and `close` once each.

    Raises ConfigError where the directory is not ours.
    """

    def __init__(self, directory: Path, max_bytes: int, *, hold_s: float = HOLD_S):
        self.directory = make_private_dir(directory)
        self._max_bytes, self._hold_s = max_bytes, hold_s
        self._waiting: queue.Queue[Heard] = queue.Queue(MAX_WAITING)
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # by digest of all that was said
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._file: int | None = None
        self._num_bytes = 0  # of the file
        self.num_missed = 0
        self._thread = threading.Thread(target=self._run, name="apollo-traffic", daemon=True)

    def open(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """When everything that was heard is written."""
        self._stopping.set()
        self._thread.join(10)

    def take(self, heard: Heard) -> None:
        """Never waits: where the thread is behind, this one is missed, and counted."""
        try:
            self._waiting.put_nowait(heard)
        except queue.Full:
            self.num_missed += 1

    def find(self, completion_id: str) -> dict[str, Any] | None:
        """The conversation up to this completion, held or written. Reads files: not for the event loop."""
        mark = msgspec.json.encode({"completion_id": completion_id})[1:-1]
        with self._lock:
            held = [one.data for one in self._held.values()]
        for data in reversed(held):
            if data.startswith(b"{" + mark + b","):
                return msgspec.json.decode(data)
        for path in sorted(self.directory.glob("traffic-*.jsonl"), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                for line in _lines_with(path, b"{" + mark + b","):
                    return msgspec.json.decode(line)
        return None

    def write(self, record: dict[str, Any]) -> None:
        """At once, and durable. Raises OSError."""
        with self._lock:
            self._append(msgspec.json.encode(record))
            assert self._file is not None
            os.fsync(self._file)

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._waiting.empty()):
            try:
                with contextlib.suppress(queue.Empty):
                    self._hold(self._waiting.get(timeout=TICK_S))
                self._write_held(time.monotonic() - self._hold_s)
            except Exception:
                # A record that cannot be kept (a full disk, a body of another kind) costs itself only.
                logger.exception("traffic: an exchange was not recorded")
        with contextlib.suppress(OSError):
            self._write_held(float("inf"))
        if self._file is not None:
            os.close(self._file)

    def _hold(self, heard: Heard) -> None:
        record = heard.record()
        if record is None:
            return
        messages = record["messages"]
        digests = list(_digests(messages))
        data = msgspec.json.encode(record)
        with self._lock:
            for i in range(len(messages) - 2, -1, -1):
                if messages[i].get("role") == "assistant" and digests[i] in self._held:
                    del self._held[digests[i]]
                    break
            self._held[digests[-1]] = _Held(data, time.monotonic())

    def _write_held(self, before: float) -> None:
        with self._lock:
            while self._held:
                digest, oldest = next(iter(self._held.items()))
                is_full = sum(len(one.data) for one in self._held.values()) > MAX_HELD_BYTES
                if oldest.heard_at > before and not is_full:
                    break
                del self._held[digest]
                self._append(oldest.data)

    def _append(self, data: bytes) -> None:
        if self._file is None or self._num_bytes >= FILE_BYTES:
            self._begin_file()
        assert self._file is not None
        os.write(self._file, data + b"\n")
        self._num_bytes += len(data) + 1

    def _begin_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._forget_oldest()
        name = f"traffic-{time.time_ns():020d}-{os.getpid()}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self.directory / name, flags, 0o600)
        self._num_bytes = 0

    def _forget_oldest(self) -> None:
        """So many that a whole file more has room."""
        files = sorted(self.directory.glob("traffic-*.jsonl"))
        sizes = {path: path.stat().st_size for path in files}
        while sizes and sum(sizes.values()) > self._max_bytes - FILE_BYTES:
            oldest = next(iter(sizes))
            oldest.unlink(missing_ok=True)
            del sizes[oldest]


def _digests(messages: list[Any]) -> Iterator[bytes]:
    """Of each message and all before it: by what was said, since clients send answers back in other words of
    JSON (null for an empty content, calls without an index)."""
    digest = blake2b(digest_size=16)
    for message in messages:
        calls = [call.get("function") for call in message.get("tool_calls") or []]
        said = [message.get("role"), message.get("content") or "", calls]
        digest.update(msgspec.json.encode(said, order="sorted"))
        yield digest.digest()


def _lines_with(path: Path, start: bytes) -> Iterator[bytes]:
    """Lines that begin so. Read in pieces: the interpreter's lock is let go between them."""
    with path.open("rb", buffering=CHUNK_BYTES) as file:
        for line in file:
            if line.startswith(start):
                yield line
