"""Files that hold logs: encodings, line ends, sizes, arrays, directories, damage."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import zstandard
from log_records import CHAT, LIMIT, prune_by, read_all, read_broken, user, write

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_curation.logs.readers import read
from apollo_curation.logs.readers.documents import elements
from apollo_ipc.errors import UserError


def test_lines_of_another_encoding_are_named_with_the_byte_among_lines_that_are_fine(tmp_path):
    latin = '{"messages": [{"role": "user", "content": "caf\xe9"}]}'.encode("latin-1")
    path = write(tmp_path / "log.jsonl", b"\xef\xbb\xbf" + json.dumps(CHAT).encode(), latin, CHAT)
    first, broken, last = read_all(path)
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    assert isinstance(broken, Broken)
    assert broken.reason == "not_utf8"
    at = path.read_bytes().index(b"\xe9")
    assert f"byte {at} of the file (0xe9)" in broken.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf_16_file_is_named_once(tmp_path, encoding):
    path = tmp_path / "log.jsonl"
    path.write_bytes((json.dumps(CHAT) + "\n").encode().decode().encode(encoding) * 50)
    [found] = read_all(path)
    assert isinstance(found, Broken)
    assert found.reason == "utf_16"
    assert "iconv" in found.message


def test_windows_line_ends_and_empty_lines_are_no_records(tmp_path):
    line = json.dumps(CHAT).encode()
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\r\n" + line + b"\r\n\r\n" + line)
    assert [(one.source.number, one.source.offset) for one in read_all(path)] == [(2, 2), (4, len(line) + 6)]


def test_a_line_of_200_mb_is_passed_over_in_bounded_memory(tmp_path):
    path = tmp_path / "log.jsonl"
    line = json.dumps(CHAT).encode() + b"\n"
    size = 200_000_000
    with path.open("wb") as file:
        file.write(line)
        file.truncate(len(line) + size)  # sparse: zeros that take no disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + line)
    tracemalloc.start()
    try:
        first, broken, last = read_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    assert isinstance(broken, Broken)
    assert broken.reason == "too_long"
    assert (broken.source.number, broken.source.offset) == (2, len(line))
    assert f"{size + 1:,} bytes" in broken.message
    assert peak < 8 * LIMIT


def test_a_record_of_the_allowed_size_is_read_and_one_byte_more_is_not(tmp_path):
    size = len(json.dumps(CHAT))
    assert isinstance(read_all(write(tmp_path / "a.jsonl", CHAT), limit=size)[0], Conversation)
    assert read_broken(tmp_path, CHAT, limit=size - 1).reason == "too_long"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_hold_one_record_or_an_array_of_them(tmp_path, indent):
    (tmp_path / "one.json").write_text(json.dumps(CHAT, indent=indent))
    (tmp_path / "bare.json").write_text(json.dumps(CHAT["messages"], indent=indent))
    (tmp_path / "many.json").write_text(json.dumps([CHAT, {"no": 1}, CHAT["messages"], CHAT], indent=indent))
    found = read_all(tmp_path)
    assert [Path(one.source.path).name for one in found] == ["bare.json", *["many.json"] * 4, "one.json"]
    assert [isinstance(one, Conversation) for one in found] == [True, True, False, True, True, True]
    assert [one.source.number for one in found[1:5]] == [1, 2, 3, 4]
    text = (tmp_path / "many.json").read_bytes()
    assert all(text[one.source.offset : one.source.offset + 1] in (b"{", b"[") for one in found[1:5])


def test_a_json_file_may_be_jsonl_after_all(tmp_path):
    assert len(read_all(write(tmp_path / "log.json", CHAT, b"{broken", CHAT))) == 3


def test_elements_of_an_array_are_cut_alike_however_the_stream_comes(monkeypatch, tmp_path):
    values = [{"a": 'x"]},{\\'}, [1, [2, {"b": "]"}]], {"c": "\\\\"}, 5, "t,]", {"d": "x" * 300}, {"e": {}}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values) + "  tail")
    whole = path.read_bytes()
    for chunk_bytes in (1, 2, 3, 7, 64, 10_000):
        monkeypatch.setattr("apollo_curation.logs.readers.documents.CHUNK_BYTES", chunk_bytes)
        if chunk_bytes == 1:
            monkeypatch.setattr("apollo_curation.logs.readers.documents.CHUNK_BYTES", 1)
        with path.open("rb") as stream:
            found = list(elements(stream, 100))
        assert [one.data and json.loads(one.data) for one in found[:-1]] == [
            None if "x" * 300 in json.dumps(value) else value for value in values
        ]
        assert all(
            one.data is None or (whole[one.offset : one.end] == one.data and one.is_whole) for one in found
        )
        assert found[-1].data == b"tail"
        for n in range(1, len(values)):
            with path.open("rb") as stream:
                stream.seek(found[n - 1].end)
                again = list(elements(stream, 100, number=n, offset=found[n - 1].end))
            assert again == found[n:]


def test_a_huge_element_of_an_array_is_passed_over(tmp_path):
    big = {"messages": [user("y" * 3 * LIMIT)]}
    (tmp_path / "a.json").write_text(json.dumps([CHAT, big, CHAT]))
    _, broken, last = read_all(tmp_path)
    assert isinstance(broken, Broken)
    assert (broken.reason, broken.source.number) == ("too_long", 2)
    assert isinstance(last, Conversation)


def test_directories_are_read_deeply_in_order_without_hidden_files_and_without_looping(tmp_path):
    root = tmp_path / "logs"
    for name in ("b.jsonl", "a/z.ndjson", "a/b/c.json", "c.jsonl.gz", "d.jsonl.zst"):
        write(root / name, CHAT)
    for name in (".hidden.jsonl", ".git/x.jsonl", "notes.txt", "b.jsonl.1"):
        write(root / name, CHAT)
    for name, compress in (("c.jsonl.gz", gzip.compress), ("d.jsonl.zst", zstandard.compress)):
        (root / name).write_bytes(compress((root / name).read_bytes()))
    (root / "a" / "loop").symlink_to(root)
    (root / "z-again.jsonl").symlink_to(root / "b.jsonl")
    (root / "gone.jsonl").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.jsonl")
    found = read_all(root, root / "b.jsonl")
    names = [os.path.relpath(one.source.path, root) for one in found]
    assert names == ["a/b/c.json", "a/z.ndjson", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst"]
    assert all(isinstance(one, Conversation) for one in found)
    assert [one.topic for one in found if isinstance(one, Conversation)] == ["c", "z", "b", "c", "d"]


def test_a_damaged_archive_and_an_unreadable_file_are_named_and_the_rest_is_read(tmp_path):
    whole = gzip.compress((json.dumps(CHAT) + "\n").encode() * 2000, mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "b.jsonl.zst").write_bytes(b"nothing of the kind")
    write(tmp_path / "c.jsonl", CHAT)
    found = read_all(tmp_path)
    broken = {Path(one.source.path).name: one.reason for one in found if isinstance(one, Broken)}
    assert broken["b.jsonl.zst"] == "cannot_read"
    assert broken["a.jsonl.gz"] == "cannot_read"
    assert Path(found[-1].source.path).name == "c.jsonl"


def test_a_file_name_that_is_no_utf8_gives_a_source_that_can_be_kept(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    try:
        path.write_text(json.dumps(CHAT))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    [found] = read_all(tmp_path)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Conversation) == found


def test_a_path_that_is_not_there_is_a_users_mistake_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read([tmp_path / "nowhere"], max_record_bytes=LIMIT)


def test_random_bytes_and_random_json_never_raise(tmp_path):
    import random

    rng = random.Random(5)
    seeds = [json.dumps(CHAT), json.dumps({"conversations": [{"from": "human", "value": "x"}]})]
    for seed in seeds:
        lines = []
        for _ in range(1500):
            data = bytearray(seed.encode())
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:0 antuser\x00\xff')
            lines.append(bytes(data).replace(b"\n", b" "))
        path = write(tmp_path / "log.jsonl", *lines)
        found = read_all(path, prune=prune_by("$..content", "$.tools"))
        assert len({one.reason for one in found if isinstance(one, Broken)}) >= 4
        path.rename(tmp_path / "log.json")
        read_all(tmp_path / "log.json")
