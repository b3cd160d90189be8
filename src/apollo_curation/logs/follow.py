"""What is new in files and directories since the last time.

Moments are known by their content, so that reading a record twice adds nothing: how far each file was read
is kept only to spare the work. Where in doubt (a file was truncated, replaced or compressed) it is read anew.

    for batch in follower.batches():
        with store.transaction():
            ...                               # what was made of batch.records
            follower.save(batch)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_curation.logs.readers import READ_ERRORS, cannot_read, utf_16
from apollo_curation.logs.readers.documents import BOM, HEAD_BYTES, decoded
from apollo_curation.logs.readers.files import (
    COMPRESSED,
    DOCUMENTS,
    entries,
    find_files,
    is_utf_16,
    open_stream,
    source_name,
)
from apollo_curation.logs.readers.lines import Entry
from apollo_curation.logs.readers.sessions import File
from apollo_curation.logs.strip import pruner
from apollo_curation.settings import Curation
from apollo_curation.store import Store

BATCH_RECORDS = 64
MARK_BYTES = 4096

Record = Conversation | Broken

SCHEMA = """
CREATE TABLE IF NOT EXISTS read_files (
    path TEXT PRIMARY KEY,
    body BLOB NOT NULL
);
"""


class Place(msgspec.Struct, frozen=True):
    """How far a file was read, and how it was then. offset, number: of the bytes and entries that were read;
    mark: digest of the last MARK_BYTES of them, empty where reading cannot begin within the file."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    offset: int = 0
    number: int = 0
    mark: str = ""


class NewRecords(msgspec.Struct, frozen=True):
    """Records in order, and where each of their files stands behind them."""

    records: list[Record]
    places: list[Place]


class Follower:
    """A line that is no whole record yet is waited for. A session that grew is read from its beginning. Paths
    may be missing at first. from_beginning: the first look is at all there is, whatever was read before.

    passed_over: endings of files that the last look has found and not opened.
    """

    def __init__(
        self, store: Store, paths: Iterable[Path], settings: Curation, *, from_beginning: bool = False
    ):
        self._paths = [Path(os.path.abspath(path)) for path in paths]
        self._max_bytes = settings.max_record_bytes
        self._prune = pruner(settings.strip)
        self._store = store
        self._from_beginning = from_beginning
        self.passed_over: Counter[str] = Counter()
        self._unreadable: set[str] = set()  # named already
        store.declare(SCHEMA)

    def save(self, batch: NewRecords) -> None:
        """In the transaction that keeps what was made of the records."""
        rows = [(place.path, msgspec.json.encode(place)) for place in batch.places]
        with self._store.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO read_files VALUES (?, ?)", rows)

    def batches(self, num_records: int = BATCH_RECORDS) -> Iterator[NewRecords]:
        """All that is new now, in batches of so many records at most."""
        rows = self._store.query("SELECT body FROM read_files")
        known = [msgspec.json.decode(row["body"], type=Place) for row in rows]
        if self._from_beginning:
            known, self._from_beginning = [], False
        by_path = {place.path: place for place in known}
        by_inode = {place.inode: place for place in known}  # a file that was renamed
        records: list[Record] = []
        places: dict[str, Place] = {}
        num_bytes = 0
        self.passed_over = Counter()
        for path in find_files(self._paths, must_exist=False, passed_over=self.passed_over):
            for record, place, size in self._read(path, by_path, by_inode):
                records += [record] if record is not None else []
                num_bytes += size
                if place is not None:
                    places[place.path] = place
                if len(records) >= num_records or num_bytes >= self._max_bytes:
                    yield NewRecords(records, list(places.values()))
                    records, places, num_bytes = [], {}, 0
        if records or places:
            yield NewRecords(records, list(places.values()))

    def _read(
        self, path: Path, by_path: dict[str, Place], by_inode: dict[int, Place]
    ) -> Iterator[tuple[Record | None, Place | None, int]]:
        """Records with their sizes, and the place that holds when all before it were taken."""
        name = source_name(path)
        known, place = by_path.get(name), None
        try:
            info = path.stat()  # before it is read: what comes meanwhile is looked for again
            place = Place(name, info.st_ino, info.st_size, info.st_mtime_ns)
            if known is None or known.inode != place.inode:
                known = by_inode.get(place.inode)
            if known is not None and _state(known) == _state(place):
                if known.path != name:
                    yield None, msgspec.structs.replace(known, path=name), 0
                return
            with open_stream(path) as stream:
                head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
                if is_utf_16(head):
                    yield utf_16(name), place, 0
                    return
                is_resumed = known is not None and known.mark and _mark(path, known.offset) == known.mark
                number, offset = (known.number, known.offset) if known and is_resumed else (0, 0)
                if offset:
                    stream.seek(offset)
                file = File(name, self._max_bytes, self._prune)
                for entry in entries(path.name, stream, head, self._max_bytes, number=number, offset=offset):
                    if not entry.is_whole and not _is_complete(entry):
                        break
                    number, offset = entry.number, entry.end
                    for record in file.take(entry):
                        yield record, None, 0
                    yield None, None, len(entry.data or b"")
                for record in file.end():
                    yield record, None, 0
            is_read_anew = file.in_session or name.endswith((*COMPRESSED, *DOCUMENTS))
            mark = "" if is_read_anew else _mark(path, offset)
            yield None, msgspec.structs.replace(place, offset=offset, number=number, mark=mark), 0
        except READ_ERRORS as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                if name not in self._unreadable:  # it may be readable next time, unchanged
                    self._unreadable.add(name)
                    yield cannot_read(name, 0, 0, error), None, 0
            elif isinstance(error, EOFError):
                yield None, place, 0  # a compressed file that is still written
            elif place is not None:
                yield cannot_read(name, 0, 0, error), place, 0


def _state(place: Place) -> tuple[int, int, int]:
    return place.inode, place.size, place.mtime_ns


def _mark(path: Path, offset: int) -> str:
    """Digest of the bytes before `offset`; empty where there are none, or fewer."""
    start = max(0, offset - MARK_BYTES)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(offset - start)
    return blake2b(data, digest_size=12).hexdigest() if data and len(data) == offset - start else ""


def _is_complete(entry: Entry) -> bool:
    """Whether an entry that ends with its file is all there; a line of a plain log may still grow."""
    return entry.data is not None and isinstance(decoded(entry.data.removeprefix(BOM)), dict | list)
