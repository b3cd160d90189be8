"""What is new in files and directories since the last time, each record once, also across a crash.

follower = Follower(store, paths, max_record_bytes=...)
for batch in follower.batches():          # or .watch(poll_s, stop), which goes on
    with store.transaction():
        ...                               # what was made of batch.records
        follower.save(batch)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path

import msgspec

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_curation.logs.positions import MARK_BYTES, Position, Positions, digest, fits, mark, skip_read
from apollo_curation.logs.readers import READ_ERRORS, cannot_read, parse_entry, utf_16
from apollo_curation.logs.readers.documents import BOM, HEAD_BYTES, decoded
from apollo_curation.logs.readers.files import (
    COMPRESSED,
    entries,
    find_files,
    is_utf_16,
    open_stream,
    source_name,
    uncompressed_name,
)
from apollo_curation.logs.readers.lines import Entry
from apollo_curation.logs.strip import Prune
from apollo_curation.store import Store

BATCH_RECORDS = 64

Record = Conversation | Broken
State = tuple[int, int, int]  # of a file: inode, size, time of the last change in ns


class Batch(msgspec.Struct, frozen=True):
    """Records in order, and where each of their files stands behind them."""

    records: list[Record]
    positions: list[Position]


class Follower:
    """A line without its end is waited for. A file that was truncated or replaced is read from its beginning;
    one that was renamed, copied away or compressed by a rotation is read to its end under its new name.

    Paths may be missing at first. One Follower at a time for a Store: see Positions.save.
    """

    def __init__(
        self, store: Store, paths: Iterable[Path], *, max_record_bytes: int, prune: Prune | None = None
    ):
        self._paths = [Path(os.path.abspath(path)) for path in paths]
        self._max_record_bytes = max_record_bytes
        self._prune = prune
        self._store = store
        self._positions = Positions(store)
        self._now: dict[str, Position] = {}  # saved, and beyond that what this run has read
        # How files that were read to their end then were, and how far that is.
        self._ended: dict[str, tuple[State, int]] = {}
        self._unreadable: set[str] = set()  # named already

    def save(self, batch: Batch) -> None:
        """In the transaction that keeps what was made of the records. Raises Conflict."""
        with self._store.transaction():
            for position in batch.positions:
                self._positions.save(position)

    def batches(self, num_records: int = BATCH_RECORDS) -> Iterator[Batch]:
        """All that is new now, in batches of so many records at most, none of them empty."""
        self._now = self._positions.load()
        records: list[Record] = []
        positions: dict[str, Position] = {}
        num_bytes = 0
        for path in find_files(self._paths, must_exist=False):
            for record, position, size in self._follow(path):
                records.append(record)
                num_bytes += size
                if position is not None:
                    positions[position.path] = position
                if len(records) >= num_records or num_bytes >= self._max_record_bytes:
                    yield Batch(records, list(positions.values()))
                    records, positions, num_bytes = [], {}, 0
        if records:
            yield Batch(records, list(positions.values()))

    def watch(self, poll_s: float, stop: threading.Event) -> Iterator[Batch]:
        """Batches as they come, until `stop` is set; looks for more every `poll_s` seconds."""
        while not stop.is_set():
            for batch in self.batches():
                yield batch
                if stop.is_set():
                    return
            stop.wait(poll_s)

    def _follow(self, path: Path) -> Iterator[tuple[Record, Position | None, int]]:
        """New records of the file, after those that a rotation took out of it unread."""
        name = source_name(path)
        known = self._now.get(name)
        try:
            if known is not None and not self._still_fits(path, known):
                for moved in self._moved_from(path, known):
                    yield from self._read(moved)
                del self._now[name]
            if name not in self._now:
                self._recognise(path)
            yield from self._read(path)
        except READ_ERRORS as error:
            if isinstance(error, FileNotFoundError | EOFError):
                return  # removed meanwhile; a compressed file that is still written
            if name not in self._unreadable:
                self._unreadable.add(name)
                known = self._now.get(name)
                at = (known.number, known.offset) if known else (0, 0)
                yield cannot_read(name, *at, error), None, 0

    def _still_fits(self, path: Path, known: Position) -> bool:
        if self._has_ended(path, known):
            return True
        with open_stream(path) as stream:
            return _skip(path, stream, known)

    def _moved_from(self, path: Path, known: Position) -> list[Path]:
        """Files beside `path` that begin with what was read of it, from now on with that position."""
        moved = []
        for entry in sorted(os.scandir(path.parent), key=lambda entry: entry.name):
            is_named_alike = entry.name.startswith(path.name)
            if entry.name == path.name or not (is_named_alike or entry.inode() == known.inode):
                continue
            other = path.parent / entry.name
            try:
                if entry.is_file() and (self._knows(other, known) or self._take_over(other, known)):
                    moved.append(other)
            except READ_ERRORS:
                continue  # not ours, or gone again; it is not what was asked for
        return moved

    def _recognise(self, path: Path) -> None:
        """A file that has another name than when it was read goes on where that one was."""
        inode, plain = path.stat().st_ino, uncompressed_name(source_name(path))
        for known in list(self._now.values()):
            if (known.inode == inode or known.path == plain) and self._take_over(path, known):
                return

    def _knows(self, path: Path, at_least: Position) -> bool:
        own = self._now.get(source_name(path))
        return own is not None and own.offset >= at_least.offset and self._still_fits(path, own)

    def _take_over(self, path: Path, known: Position) -> bool:
        """Whether `path` now has the position `known`, kept at once: nothing was read by it."""
        name = source_name(path)
        with open_stream(path) as stream:
            if not _skip(path, stream, known):
                return False
        tail = "" if name.endswith(COMPRESSED) else known.tail
        taken = msgspec.structs.replace(known, path=name, inode=path.stat().st_ino, tail=tail)
        self._positions.save(taken)
        self._now[name] = taken
        return True

    def _read(self, path: Path) -> Iterator[tuple[Record, Position | None, int]]:
        """From the file's position in `_now` on, which moves along."""
        name, known, state = source_name(path), self._now.get(source_name(path)), _state(path)
        if self._has_ended(path, known):
            return
        head = _head(path)
        with open_stream(path) as stream:
            if is_utf_16(head):
                if known is None:
                    whole = Entry(1, 0, len(head), None, True)
                    yield utf_16(name), self._move(path, stream, head, whole), 0
                return
            if known is not None and not _skip(path, stream, known):
                return  # replaced within this moment
            number, offset = (known.number, known.offset) if known else (0, 0)
            found = entries(path.name, stream, head, self._max_record_bytes, number=number, offset=offset)
            for entry in found:
                if not entry.is_whole and not _is_complete(name, entry):
                    break
                record = parse_entry(name, entry, self._max_record_bytes, self._prune)
                yield record, self._move(path, stream, head, entry), len(entry.data or b"")
        ended = self._now.get(name)
        self._ended[name] = (state, ended.offset if ended else 0)

    def _has_ended(self, path: Path, known: Position | None) -> bool:
        """Whether the file is as it was when there was no more to read behind this position."""
        return self._ended.get(source_name(path)) == (_state(path), known.offset if known else 0)

    def _move(self, path: Path, stream: BufferedReader, head: bytes, entry: Entry) -> Position:
        name = source_name(path)
        if name.endswith(COMPRESSED):
            mark_head = digest(head[: min(MARK_BYTES, entry.end)])
            position = Position(name, path.stat().st_ino, entry.end, entry.number, mark_head, "")
        else:
            file = stream.fileno()
            position = mark(file, name, os.fstat(file).st_ino, entry.end, entry.number)
        self._now[name] = position
        return position


def _state(path: Path) -> State:
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def _head(path: Path) -> bytes:
    with open_stream(path) as stream:
        return stream.read(HEAD_BYTES)


def _skip(path: Path, stream: BufferedReader, known: Position) -> bool:
    """Puts `stream` behind what was read; whether the file still begins with that."""
    if path.name.endswith(COMPRESSED):
        return skip_read(known, stream)
    stream.seek(known.offset)
    return fits(known, stream.fileno())


def _is_complete(name: str, entry: Entry) -> bool:
    """Whether an entry that ends with its file is all there; a line of a plain log may still grow."""
    may_end_so = name.endswith(COMPRESSED) or name.endswith(".json")
    return may_end_so and entry.data is not None and decoded(entry.data.removeprefix(BOM)) is not None
