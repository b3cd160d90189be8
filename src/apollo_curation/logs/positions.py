"""How far each followed file was read, and by what it is known again: its first and its last read bytes."""

from __future__ import annotations

import os
import uuid
from hashlib import blake2b
from io import BufferedReader

import msgspec

from apollo_curation.logs.readers.lines import CHUNK_BYTES
from apollo_curation.store import Store
from apollo_ipc.errors import Conflict

MARK_BYTES = 4096

SCHEMA = """
CREATE TABLE IF NOT EXISTS positions (
    path TEXT PRIMARY KEY,
    inode INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    number INTEGER NOT NULL,
    head TEXT NOT NULL,
    tail TEXT NOT NULL,
    reader TEXT NOT NULL
);
"""


class Position(msgspec.Struct, frozen=True):
    """path: absolute; offset, number: of the (uncompressed) bytes and entries that were read; head, tail:
    digests of the first and the last MARK_BYTES of those bytes, tail empty for a compressed file."""

    path: str
    inode: int
    offset: int
    number: int
    head: str
    tail: str


class Positions:
    """The table. Two processes that follow one file would read it twice: `save` refuses the second one."""

    def __init__(self, store: Store):
        self._store = store
        self._reader = uuid.uuid4().hex
        self._readers: dict[str, str] = {}  # who had saved what we read
        store.declare(SCHEMA)

    def load(self) -> dict[str, Position]:
        rows = self._store.query("SELECT * FROM positions")
        self._readers = {row["path"]: row["reader"] for row in rows}
        names = Position.__struct_fields__
        return {row["path"]: Position(*(row[name] for name in names)) for row in rows}

    def save(self, position: Position) -> None:
        """Raises Conflict where another process has read on in this file since `load`."""
        with self._store.transaction() as db:
            row = db.execute("SELECT reader FROM positions WHERE path = ?", (position.path,)).fetchone()
            if (row and row["reader"]) not in (self._reader, self._readers.get(position.path)):
                raise Conflict(
                    f"another process is following {position.path}; what it read is not read again. Let only "
                    "one run at a time"
                )
            values = (*msgspec.structs.astuple(position), self._reader)
            db.execute("INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def mark(file: int, name: str, inode: int, offset: int, number: int) -> Position:
    """The position in a plain file with the open descriptor `file`."""
    head = os.pread(file, min(MARK_BYTES, offset), 0)
    tail_start = max(0, offset - MARK_BYTES)
    tail = os.pread(file, offset - tail_start, tail_start)
    return Position(name, inode, offset, number, digest(head), digest(tail))


def fits(position: Position, file: int) -> bool:
    """Whether the plain file still begins with what was read."""
    found = mark(file, "", 0, position.offset, 0)
    return found.head == position.head and position.tail in ("", found.tail)


def skip_read(position: Position, stream: BufferedReader) -> bool:
    """Reads past what was read before; whether it was that. For a compressed file, from its beginning on."""
    head, tail, left = b"", b"", position.offset
    while left and (chunk := stream.read(min(CHUNK_BYTES, left))):
        head = head if len(head) >= MARK_BYTES else (head + chunk)[:MARK_BYTES]
        tail = (tail + chunk)[-MARK_BYTES:]
        left -= len(chunk)
    return not left and digest(head) == position.head and position.tail in ("", digest(tail))


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=12).hexdigest()
