"""Transcripts and agent logs in whatever form they have, as conversations: streamed, never fatal.

Each format's adapter is one file; the format is recognised for each record by itself (formats.py), and for
lines that only together are a conversation, by the first of them (sessions.py).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from apollo_curation.logs.conversation import Broken, Conversation, Origin
from apollo_curation.logs.readers.documents import HEAD_BYTES
from apollo_curation.logs.readers.files import entries, find_files, is_utf_16, open_stream, source_name
from apollo_curation.logs.readers.sessions import File
from apollo_curation.logs.strip import Prune

READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


def read(
    paths: Iterable[Path],
    *,
    max_record_bytes: int,
    prune: Prune | None = None,
    passed_over: Counter[str] | None = None,
) -> Iterator[Conversation | Broken]:
    """Every record of the files and directories `paths`, in a stable order, each with its source.

    max_record_bytes: a longer one is passed over in pieces and named; so much and no more is held in memory.
    prune: see strip.pruner; passed_over: see files.find_files. Raises UserError, at once, for a path that is
    not there; nothing while reading.
    """
    files = find_files(paths, passed_over=passed_over)
    return (record for file in files for record in read_file(file, max_record_bytes, prune))


def read_file(
    path: Path, max_record_bytes: int, prune: Prune | None = None
) -> Iterator[Conversation | Broken]:
    name, number, offset = source_name(path), 0, 0
    file = File(name, max_record_bytes, prune)
    try:
        with open_stream(path) as stream:
            head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
            if is_utf_16(head):
                yield utf_16(name)
                return
            for entry in entries(path.name, stream, head, max_record_bytes):
                number, offset = entry.number, entry.end
                yield from file.take(entry)
    except READ_ERRORS as error:
        yield cannot_read(name, number, offset, error)
    yield from file.end()


def utf_16(name: str) -> Broken:
    """The one answer to a whole file."""
    advice = "`iconv -f UTF-16 -t UTF-8 FILE` converts it"
    return Broken(Origin(name, 1, 0), "utf_16", f"the file is UTF-16, and was not read; {advice}")


def cannot_read(name: str, number: int, offset: int, error: Exception) -> Broken:
    text = getattr(error, "strerror", None) or str(error)
    return Broken(Origin(name, number + 1, offset), "cannot_read", f"cannot read on: {text}")
