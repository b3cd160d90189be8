"""A *.json file in entries of bounded size: JSONL after all, one record, or an array of records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BufferedReader, BytesIO
from typing import Any, Literal

import msgspec

from apollo_curation.logs.readers.lines import CHUNK_BYTES, Entry

Form = Literal["lines", "record", "array"]
HEAD_BYTES = 1 << 16

_START = re.compile(rb"[^\s,]")
# A whole string in one step where it ends within the chunk, else its quotation mark alone.
_BARE = re.compile(rb'"(?:[^"\\]+|\\.)*+"|["\[\]{},]', re.DOTALL)
_NESTED = re.compile(rb'"(?:[^"\\]+|\\.)*+"|["\[\]{}]', re.DOTALL)
_INSIDE = re.compile(rb'["\\]')
_MESSAGE = re.compile(rb'\[\s*\{\s*"(?:role|from|content|value)"')
BOM = b"\xef\xbb\xbf"


def form_of(head: bytes) -> Form:
    """What the file is, by its first HEAD_BYTES (all of them, where it is shorter)."""
    head = head.removeprefix(BOM).lstrip()
    line, newline, rest = head.partition(b"\n")
    value = decoded(line)
    if isinstance(value, list) and not is_message_list(value) and not rest.strip():
        return "array"
    if value is not None or (not newline and head.startswith(b"{")):
        return "lines"
    if head.startswith(b"{"):
        return "record"
    if not head.startswith(b"["):
        return "lines"
    first = next(elements(BufferedReader(BytesIO(head)), len(head)), None)  # pyright: ignore[reportArgumentType]
    if first is not None and first.is_whole:
        return "record" if is_message_list([decoded(first.data or b"")]) else "array"
    return "record" if _MESSAGE.match(head) else "array"


def is_message_list(value: list[Any]) -> bool:
    """Whether it is a bare list of messages, and so one record."""
    first = value[0] if value else None
    return isinstance(first, dict) and not first.keys().isdisjoint({"role", "from"})


def decoded(data: bytes) -> Any:
    """The JSON value, None where there is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def record(stream: BufferedReader, max_bytes: int) -> Iterator[Entry]:
    """The whole stream as one entry. is_whole: whether it is complete JSON."""
    data = stream.read(max_bytes + 1)
    if len(data) <= max_bytes:
        if data.removeprefix(BOM).strip():
            yield Entry(1, 0, len(data), data, decoded(data.removeprefix(BOM)) is not None)
        return
    num_bytes = len(data)
    while rest := stream.read(CHUNK_BYTES):
        num_bytes += len(rest)
    yield Entry(1, 0, num_bytes, None, True)


def elements(stream: BufferedReader, max_bytes: int, *, number: int = 0, offset: int = 0) -> Iterator[Entry]:
    """The elements of the array that `stream` holds, from where it stands: at its beginning, or behind the
    element `number`, which ends at `offset`. What follows the array is one more entry."""
    is_open = offset > 0  # the array's bracket was passed
    is_over = False
    depth, in_string, is_escaped = 0, False, False
    kept, start, num_kept = bytearray(), -1, 0
    while chunk := stream.read(CHUNK_BYTES):
        at = 0
        if not is_open:
            at = chunk.index(b"[") + 1
            is_open = True
        while at < len(chunk):
            if start < 0:
                found = _START.search(chunk, at)
                if found is None:
                    break
                at = found.start()
                if chunk[at] == 0x5D and not is_over:  # ]
                    is_over = True
                    at += 1
                    continue
                start, num_kept, number = offset + at, 0, number + 1
                kept.clear()
            begin = at
            at, depth, in_string, is_escaped, has_ended = (
                (len(chunk), depth, in_string, is_escaped, False)
                if is_over
                else _skip(chunk, at, depth, in_string, is_escaped)
            )
            num_kept += at - begin
            if num_kept <= max_bytes:
                kept += chunk[begin:at]
            if has_ended:
                yield Entry(number, start, num_kept, bytes(kept) if num_kept <= max_bytes else None, True)
                start = -1
        offset += len(chunk)
    if start >= 0:
        yield Entry(number, start, num_kept, bytes(kept) if num_kept <= max_bytes else None, is_over)


def _skip(
    chunk: bytes, at: int, depth: int, in_string: bool, is_escaped: bool
) -> tuple[int, int, bool, bool, bool]:
    """To the end of the element, or of the chunk: where that is, the state there, and whether the element has
    ended."""
    while at < len(chunk):
        if is_escaped:
            at, is_escaped = at + 1, False
            continue
        found = (_INSIDE if in_string else _NESTED if depth else _BARE).search(chunk, at)
        if found is None:
            return len(chunk), depth, in_string, False, False
        at = found.end()
        match found.group():
            case b'"':
                in_string = not in_string
            case b"\\":
                is_escaped = True
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]" if depth:
                depth -= 1
                if not depth:
                    return at, 0, False, False, True
            case token if not depth and len(token) == 1:  # the end of a bare value
                return at - 1, 0, False, False, True
    return at, depth, in_string, is_escaped, False
