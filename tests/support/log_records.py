"""Records of a log, written and read back."""

from __future__ import annotations

import json
from pathlib import Path

from apollo_curation.logs.conversation import Broken, Conversation, find_problem
from apollo_curation.logs.readers import read
from apollo_curation.logs.strip import pruner
from apollo_curation.settings import StripRule
from apollo_ipc.wire.requests import Message

LIMIT = 1 << 20
CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
TURNS = [Message("user", "2 + 2?"), Message("assistant", "4")]
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}


def write(path: Path, *records, end="\n") -> Path:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + end.encode())
    return path


def read_all(*paths: Path, limit=LIMIT, prune=None) -> list[Conversation | Broken]:
    return list(read(paths, max_record_bytes=limit, prune=prune))


def read_one(tmp_path, record, **options) -> Conversation:
    [found] = read_all(write(tmp_path / "log.jsonl", record), **options)
    assert isinstance(found, Conversation), found
    assert find_problem(found.messages) is None
    return found


def read_broken(tmp_path, record, **options) -> Broken:
    [found] = read_all(write(tmp_path / "log.jsonl", record), **options)
    assert isinstance(found, Broken), found
    assert found.message
    return found


def user(content, **rest):
    return {"role": "user", "content": content, **rest}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def prune_by(*paths: str):
    return pruner([StripRule(json_path=path) for path in paths])
