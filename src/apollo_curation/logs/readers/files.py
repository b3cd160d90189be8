"""Which files hold records, in a stable order, and what is in them as a stream of bytes."""

from __future__ import annotations

import gzip
import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from apollo_curation.logs.readers import documents, lines
from apollo_curation.logs.readers.lines import Entry
from apollo_ipc.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".traj")
DOCUMENTS = (".json", ".traj")  # may be one record, or an array of them
COMPRESSED = (".gz", ".zst")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def find_files(
    paths: Iterable[Path], *, must_exist: bool = True, passed_over: Counter[str] | None = None
) -> list[Path]:
    """The files among `paths`, and those in their directories, each file once, by name.

    Of directories, also of deeper ones: *.jsonl, *.ndjson, *.json, *.traj and these with .gz or .zst; nothing
    hidden. Links are followed, but no directory is entered twice. passed_over: gets the endings of the other
    files. Raises UserError for a path that is not there.
    """
    seen: set[tuple[int, int]] = set()
    others = Counter[str]() if passed_over is None else passed_over
    return [file for path in paths for file in _walk(path, seen, must_exist, others)]


def _walk(
    path: Path, seen: set[tuple[int, int]], must_exist: bool, passed_over: Counter[str]
) -> Iterator[Path]:
    try:
        info = path.stat()
        names = sorted(os.listdir(path)) if stat.S_ISDIR(info.st_mode) else None
    except OSError as error:
        if must_exist:
            raise UserError(f"cannot read {path}: {error.strerror}; name a file or a directory") from None
        return
    if (info.st_dev, info.st_ino) in seen:
        return
    seen.add((info.st_dev, info.st_ino))
    if names is None:
        yield path
        return
    for name in names:
        if name.startswith("."):
            continue
        inner = path / name
        if inner.is_dir() or (has_records(name) and inner.is_file()):
            yield from _walk(inner, seen, False, passed_over)
        else:
            passed_over[os.path.splitext(name)[1] or "no ending"] += 1


def has_records(name: str) -> bool:
    return uncompressed_name(name).endswith(SUFFIXES)


def uncompressed_name(name: str) -> str:
    return name[: -len(os.path.splitext(name)[1])] if name.endswith(COMPRESSED) else name


def source_name(path: Path) -> str:
    """The path as text that every encoder takes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def stem(path: str) -> str:
    """The topic of records that name none."""
    return os.path.splitext(uncompressed_name(os.path.basename(path)))[0]


def open_stream(path: Path) -> io.BufferedReader:
    """The file's bytes, uncompressed. Raises OSError; reading also EOFError, zlib.error and ZstdError."""
    raw: Any
    if path.name.endswith(".gz"):
        raw = gzip.GzipFile(path, "rb")
    elif path.name.endswith(".zst"):
        import zstandard

        file = path.open("rb")
        raw = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
    else:
        raw = path.open("rb", buffering=0)
    return io.BufferedReader(raw, documents.HEAD_BYTES)


def is_utf_16(head: bytes) -> bool:
    """By its mark, or by the zero byte that every ASCII character has there."""
    return head.startswith(UTF_16) or (len(head) > 1 and (head[0] == 0) != (head[1] == 0))


def entries(
    name: str, stream: io.BufferedReader, head: bytes, max_bytes: int, *, number: int = 0, offset: int = 0
) -> Iterator[Entry]:
    """What the file `name` holds from where `stream` stands, behind `number` entries and `offset` bytes.

    head: its first bytes, by which the form of a *.json is recognised.
    """
    form = documents.form_of(head) if uncompressed_name(name).endswith(DOCUMENTS) else "lines"
    if form == "lines":
        return lines.lines(stream, max_bytes, number=number, offset=offset)
    if form == "array":
        return documents.elements(stream, max_bytes, number=number, offset=offset)
    return documents.record(stream, max_bytes) if not offset else iter(())
