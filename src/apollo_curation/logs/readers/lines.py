"""A stream in entries of bounded size: its lines, each with its number and byte offset."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader

import msgspec

CHUNK_BYTES = 1 << 20


class Entry(msgspec.Struct, frozen=True):
    """number: from 1; offset, num_bytes: where it stands in the (uncompressed) stream, line end included;
    data: None where it is longer than allowed; is_whole: whether its end was seen, rather than the file's."""

    number: int
    offset: int
    num_bytes: int
    data: bytes | None
    is_whole: bool

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def lines(stream: BufferedReader, max_bytes: int, *, number: int = 0, offset: int = 0) -> Iterator[Entry]:
    """From where `stream` stands, which is behind `number` lines and `offset` bytes. Empty lines count, and
    are passed over. Never holds more than `max_bytes` and a chunk."""
    while data := stream.readline(max_bytes + 1):
        number += 1
        num_bytes = len(data)
        is_whole = data.endswith(b"\n")
        is_too_long = num_bytes > max_bytes and not is_whole
        while is_too_long and not is_whole and (rest := stream.readline(CHUNK_BYTES)):
            num_bytes += len(rest)
            is_whole = rest.endswith(b"\n")
        if is_too_long:
            yield Entry(number, offset, num_bytes, None, is_whole)
        elif data.strip():
            yield Entry(number, offset, num_bytes, data, is_whole)
        offset += num_bytes
