"""Seeds of dreams: reflections, lessons and memories, from text files, JSONL, and directories of both.

Text (.md, .markdown, .txt): one seed a paragraph, or a list item; a file of at most WHOLE_FILE_CHARS without
headings and lists is one seed as a whole. A Markdown heading is the topic of what follows it.
JSONL (.jsonl, .ndjson): {"text" or "lesson" or "memory": "...", "topic"?: "..."}; other fields do not count.
A dream program of somebody else's writes such lines with the situation in them, which is then dreamt first:
{"lesson": "...", "messages": [{"role", "content"}, ...], "good"?: "what a good response does"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import msgspec

from apollo_curation.logs.conversation import Broken, Origin, find_problem, text_hash
from apollo_curation.logs.readers.documents import BOM
from apollo_curation.logs.readers.files import source_name
from apollo_curation.logs.readers.formats import read_chats
from apollo_curation.logs.readers.lines import lines
from apollo_curation.logs.readers.records import decode
from apollo_curation.logs.readers.text import Unreadable
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

WHOLE_FILE_CHARS = 400
MAX_SEED_CHARS = 4000  # a dreamer is told one thing at a time
TEXT_SUFFIXES = (".md", ".markdown", ".txt")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_FIELDS = ("text", "lesson", "memory")

_HEADING = re.compile(r" {0,3}#{1,6}\s+(.+?)\s*#*\s*$")
_ITEM = re.compile(r"([-*+]|\d{1,4}[.)])\s+(?=\S)")
_WORD = re.compile(r"\w")


class Seed(msgspec.Struct, frozen=True):
    """seed_id: equal for equal texts (and situations), whatever their white space, so that what changes is a
    new seed. at: when its file was changed last, in seconds since the epoch. situation: to begin with, ends
    with the person; good: what a good response to it does."""

    seed_id: str
    text: str
    topic: str
    source: Origin
    at: float
    situation: list[Message] | None = None
    good: str = ""


def seed_id(text: str) -> str:
    return "s-" + text_hash(" ".join(text.split()))


def read_seeds(paths: Iterable[Path], *, max_record_bytes: int) -> Iterator[Seed | Broken]:
    """What the files hold, in their order; a text that stands twice is given once.

    max_record_bytes: of a line of JSONL, and of a text file as a whole. Raises UserError where a path that
    was named does not exist; whatever else is wrong is a Broken.
    """
    known = set()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or directory to take seeds from", field="--seeds")
        for file in _files(path):
            for found in _read_file(file, max_record_bytes):
                if isinstance(found, Seed):
                    if found.seed_id in known:
                        continue
                    known.add(found.seed_id)
                yield found


def newest_first(seeds: Iterable[Seed]) -> list[Seed]:
    """By the time of their files; within a file what stands further down was written later."""
    return sorted(seeds, key=lambda seed: (-seed.at, seed.source.path, -seed.source.offset))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = (file.relative_to(path) for file in path.rglob("*"))
    known = TEXT_SUFFIXES + JSONL_SUFFIXES
    shown = (name for name in inside if not any(part.startswith(".") for part in name.parts))
    return sorted(path / name for name in shown if name.suffix.lower() in known and (path / name).is_file())


def _read_file(path: Path, max_record_bytes: int) -> Iterator[Seed | Broken]:
    try:
        with path.open("rb") as file:
            at = path.stat().st_mtime
            if path.suffix.lower() in JSONL_SUFFIXES:
                yield from _read_jsonl(file, path, at, max_record_bytes)
            else:
                yield from _read_text(file, path, at, max_record_bytes)
    except OSError as error:
        yield Broken(Origin(source_name(path), 1, 0), "unreadable", f"cannot be read: {error.strerror}")


def _read_text(file: BinaryIO, path: Path, at: float, max_bytes: int) -> Iterator[Seed | Broken]:
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        yield Broken(
            Origin(source_name(path), 1, 0), "too_long", f"more than {max_bytes} bytes in one file of seeds"
        )
        return
    offset = len(BOM) if data.startswith(BOM) else 0
    blocks = list(_blocks(data[offset:], path.stem, offset))
    if not any(block.is_part for block in blocks) and len(data) <= WHOLE_FILE_CHARS and blocks:
        blocks = [_Block(blocks[0].offset, path.stem, data[offset:].splitlines(keepends=True), False)]
    number = 0
    for block in blocks:
        number += 1
        source = Origin(source_name(path), number, block.offset)
        try:
            text = b"".join(block.lines).decode()
        except UnicodeDecodeError as error:
            yield Broken(source, "encoding", f"not UTF-8 ({error.reason}); save the file as UTF-8")
            continue
        if _WORD.search(text) is None:  # a rule, a fence
            number -= 1
            continue
        yield _seed(text, block.topic, source, at)


class _Block:
    """Lines that belong together. is_part: a list item, or under a heading: a seed by itself."""

    def __init__(self, offset: int, topic: str, lines: list[bytes], is_part: bool):
        self.offset = offset
        self.topic = topic
        self.lines = lines
        self.is_part = is_part


def _blocks(data: bytes, topic: str, offset: int) -> Iterator[_Block]:
    """Paragraphs and list items; a block may hold bytes that are no UTF-8."""
    block: _Block | None = None
    is_headed = False
    for line in data.splitlines(keepends=True):
        text = line.decode(errors="replace")
        heading, item = _HEADING.match(text), _ITEM.match(text)
        if block and (heading or item or not text.strip()):
            yield block
            block = None
        if heading:
            topic, is_headed = heading[1], True
        elif item:
            marker = len(item[0].encode())
            block = _Block(offset, topic, [line[marker:]], True)
        elif block:
            block.lines.append(line)
        elif text.strip():
            block = _Block(offset, topic, [line], is_headed)
        offset += len(line)
    if block:
        yield block


def _read_jsonl(file: BufferedReader, path: Path, at: float, max_bytes: int) -> Iterator[Seed | Broken]:
    for entry in lines(file, max_bytes):
        source = Origin(source_name(path), entry.number, entry.offset)
        if entry.data is None:
            yield Broken(source, "too_long", f"a line of more than {max_bytes} bytes")
            continue
        try:
            yield _parse_line(entry.data, path.stem, source, at)
        except Unreadable as error:
            yield Broken(source, error.reason, str(error))
        except RecursionError:
            yield Broken(source, "too_deep", "nested too deeply")


def _parse_line(line: bytes, topic: str, source: Origin, at: float) -> Seed | Broken:
    """Raises Unreadable."""
    record = decode(line, source.offset)
    names = ", ".join(TEXT_FIELDS)
    if not isinstance(record, dict):
        raise Unreadable("not_a_seed", f"an object with one of {names} is needed")
    texts = [record[name] for name in TEXT_FIELDS if record.get(name) is not None]
    if not texts or not isinstance(texts[0], str):
        raise Unreadable("not_a_seed", f"one of {names} is needed, as a string")
    own_topic = record.get("topic")
    seed = _seed(texts[0], own_topic if isinstance(own_topic, str) and own_topic else topic, source, at)
    if "messages" not in record or isinstance(seed, Broken):
        return seed
    [chat] = read_chats(record)
    if chat.problem is not None:
        raise chat.problem
    situation = chat.messages
    problem = find_problem(situation) or ("there is none" if not situation else None)
    if problem is None and situation[0].role in ("system", "developer"):
        problem = "instructions in it would be learned; leave them out"
    if problem is None and situation[-1].role not in ("user", "tool"):
        problem = f"a situation ends with the user or a tool's result, not with the {situation[-1].role}"
    if problem is not None:
        raise Unreadable("not_a_situation", f"messages: {problem}")
    good = record.get("good")
    key = seed_id(seed.text + msgspec.json.encode(situation).decode())
    return msgspec.structs.replace(
        seed, seed_id=key, situation=situation, good=good if isinstance(good, str) else ""
    )


def _seed(text: str, topic: str, source: Origin, at: float) -> Seed | Broken:
    text = text.strip()
    if not text:
        return Broken(source, "empty", "there is no text in it")
    if len(text) > MAX_SEED_CHARS:
        problem = f"{len(text)} characters, more than {MAX_SEED_CHARS}: a seed is one lesson; split it"
        return Broken(source, "too_long", problem)
    return Seed(seed_id(text), text, topic, source, at)
