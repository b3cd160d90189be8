"""Reading transcripts: each format, each way to be broken, files and directories, bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import typer
import zstandard
from typer.testing import CliRunner

from apollo_ipc.cli import curate_input
from apollo_ipc.curation.conversation import Broken, Conversation, find_problem
from apollo_ipc.curation.readers import read
from apollo_ipc.curation.readers.documents import elements
from apollo_ipc.curation.settings import StripRule
from apollo_ipc.curation.strip import pruner
from apollo_ipc.errors import UserError
from apollo_ipc.requests import Message

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


def test_openai_messages_are_read_with_tools_parts_and_thoughts(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be short", "timestamp": 3},
        user(parts, id="msg-1"),
        assistant(None, tool_calls=[{**CALL, "index": 0}], reasoning_content="hm"),
        {"role": "tool", "content": "4", "tool_call_id": "a"},
        assistant("four", weight=0),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = read_one(tmp_path, {"messages": messages, "tools": tools, "model": "x", "created": 1})
    assert found.messages == [
        Message("developer", "be short"),
        Message("user", "a\nb"),
        Message("assistant", "", tool_calls=[CALL], reasoning_content="hm"),
        Message("tool", "4", tool_call_id="a"),
        Message("assistant", "four", weight=0),
    ]
    assert found.tools == tools
    assert (found.source.number, found.source.offset) == (1, 0)


def test_a_bare_list_of_messages_is_a_record(tmp_path):
    assert read_one(tmp_path, CHAT["messages"]).messages == TURNS


def test_a_refusal_of_openai_is_the_answer(tmp_path):
    found = read_one(tmp_path, {"messages": [user("x"), assistant(None, refusal="I cannot")]})
    assert found.messages[1].content == "I cannot"


def test_a_legacy_function_call_becomes_a_tool_call_with_its_result(tmp_path):
    call = {"name": "add", "arguments": "{}"}
    turns = [user("x"), assistant(None, function_call=call)]
    turns += [{"role": "function", "name": "add", "content": "4"}, assistant("4")]
    messages = read_one(tmp_path, {"messages": turns}).messages
    assert messages[1].tool_calls == [{"type": "function", "id": "call_1", "function": call}]
    assert messages[2] == Message("tool", "4", name="add", tool_call_id="call_1")


def test_a_conversation_may_end_in_a_tool_call(tmp_path):
    found = read_one(tmp_path, {"messages": [user("x"), assistant("", tool_calls=[CALL])]})
    assert found.messages[-1].tool_calls == [CALL]


def test_sharegpt_is_read_with_calls_and_observations(tmp_path):
    call = '{"name": "add", "arguments": {"x": 2}}'
    turns = [("system", "s"), ("human", "q"), ("function_call", call), ("observation", "4"), ("gpt", "four")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": "[]"}
    messages = read_one(tmp_path, record).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2].tool_calls == [
        {"type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}
    ]


def test_sharegpt_calls_inside_an_answer_are_found_when_results_follow(tmp_path):
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    value = f"Both.\n{call}\n{call}"
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    turns = [("human", "q"), ("gpt", value), ("tool", results), ("gpt", "done")]
    messages = read_one(
        tmp_path, {"conversations": [{"from": who, "value": text} for who, text in turns]}
    ).messages
    assert messages[1].content == "Both."
    assert len(messages[1].tool_calls or []) == 2
    assert [message.content for message in messages[2:]] == ["1", "2", "done"]


def test_anthropic_blocks_become_tool_calls_and_tool_messages(tmp_path):
    use = [{"type": "tool_use", "id": name, "name": "get", "input": {"k": name}} for name in "ab"]
    failed = {"type": "tool_result", "tool_use_id": "b", "content": "gone", "is_error": True}
    record = {
        "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "get", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            user("x"),
            assistant([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "let me"}, *use]),
            user(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "a",
                        "content": [{"type": "text", "text": "1"}],
                    },
                    failed,
                    {"type": "text", "text": "quick please"},
                ]
            ),
            assistant("one"),
            user("thanks"),
            user("really"),
        ],
    }
    found = read_one(tmp_path, record)
    calls = [
        {"type": "function", "id": name, "function": {"name": "get", "arguments": f'{{"k": "{name}"}}'}}
        for name in "ab"
    ]
    assert found.messages == [
        Message("system", "be kind"),
        Message("user", "x"),
        Message("assistant", "let me", tool_calls=calls, reasoning_content="hm"),
        Message("tool", "1", tool_call_id="a"),
        Message("tool", "Error: gone", tool_call_id="b"),
        Message("user", "quick please"),
        Message("assistant", "one"),
        Message("user", "thanks\nreally"),
    ]
    assert found.tools == [
        {
            "type": "function",
            "function": {"name": "get", "description": "d", "parameters": {"type": "object"}},
        }
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{not json", "not_json"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "not_json"),
        (b'{"messages": [], "x": 1e999}', "not_json"),
        (b'{"messages": "\\ud800"}', "not_json"),
        (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
        (b"17", "unknown_format"),
        (b"[1, 2]", "unknown_format"),
        ({"prompt": "a", "completion": "b"}, "unknown_format"),
        ({"messages": []}, "empty"),
        ({"messages": "hello"}, "wrong_type"),
        ({"messages": ["hello"]}, "wrong_type"),
        ({"messages": [user(3)]}, "wrong_type"),
        ({"messages": [{"content": "x"}]}, "wrong_type"),
        ({"messages": [user("x"), assistant("", tool_calls=["f"])]}, "wrong_type"),
        ({"messages": [user("x"), assistant("", tool_calls=[{"id": "a"}])]}, "wrong_type"),
        ({"messages": [user("x"), assistant("", tool_calls=[CALL, CALL])]}, "duplicate_id"),
        ({**CHAT, "tools": {"n": 1}}, "wrong_type"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "not_text"),
        ({"messages": [user([{"type": "input_audio"}])]}, "not_text"),
        ({"messages": [user("a"), user("b")]}, "not_a_conversation"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}]}, "not_a_conversation"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "not_a_conversation"),
        ({"conversations": [{"from": "gpt", "value": "I begin"}]}, "not_a_conversation"),
        ({"conversations": [{"from": "human", "value": None}]}, "wrong_type"),
        (
            {"system": "s", "messages": [user([{"type": "image", "source": {}}])]},
            "not_text",
        ),
    ],
)
def test_a_broken_record_is_named_and_the_next_one_is_read(tmp_path, record, reason):
    broken, good = read_all(write(tmp_path / "log.jsonl", record, CHAT))
    assert isinstance(broken, Broken)
    assert (broken.reason, broken.source.number) == (reason, 1)
    assert broken.message
    assert isinstance(good, Conversation)
    assert good.source.number == 2


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
        monkeypatch.setattr("apollo_ipc.curation.readers.documents.CHUNK_BYTES", chunk_bytes)
        if chunk_bytes == 1:
            monkeypatch.setattr("apollo_ipc.curation.readers.documents.CHUNK_BYTES", 1)
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


@pytest.mark.parametrize(
    ("more", "topic"),
    [
        ({"topic": "cooking"}, "cooking"),
        ({"project": "apollo"}, "apollo"),
        ({"tags": ["x", "y"]}, "x"),
        ({"metadata": {"topic": "deep"}}, "deep"),
        ({"topic": 3, "tags": []}, "log"),
    ],
)
def test_the_topic_is_what_the_record_says_else_the_files_name(tmp_path, more, topic):
    assert read_one(tmp_path, {**CHAT, **more}).topic == topic


def prune_by(*paths: str):
    return pruner([StripRule(json_path=path) for path in paths])


def test_a_json_path_takes_parts_of_the_record_and_what_depended_on_them(tmp_path):
    turns = [
        user("x"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "recall", "content": "a memory", "tool_call_id": "a"},
        assistant("y"),
    ]
    record = {"messages": turns, "memory": {"secret": 1}}
    rules = ("$.memory", "$.messages[?@.name == 'recall']")
    found = read_one(tmp_path, record, prune=prune_by(*rules))
    assert found.messages == [Message("user", "x"), Message("assistant", "y")]
    assert len(found.removed) == 3  # the memory, the recalled message, the call
    assert read_one(tmp_path, CHAT, prune=prune_by(*rules)).removed == []


@pytest.mark.parametrize(
    ("path", "roles"),
    [
        ("$.messages[1]", ["assistant", "user", "assistant"]),
        ("$.messages[1].content", ["assistant", "user", "assistant"]),
        ("$.messages[0].content", ["user", "assistant"]),
        ("$.messages[0, 2]", []),
        ("$.messages[?@.role == 'user']", []),
        ("$.messages[0].tool_calls[0]", ["user", "assistant", "user", "assistant"]),
    ],
)
def test_whatever_a_json_path_takes_the_rest_is_a_conversation_or_broken(tmp_path, path, roles):
    record = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    [found] = read_all(write(tmp_path / "log.jsonl", record), prune=prune_by(path))
    if isinstance(found, Broken):
        assert (found.reason, roles) == ("empty", [])
    elif path.endswith("[1]") or path.endswith("[1].content"):
        assert [message.content for message in found.messages] == ["c", "d"]
    else:
        assert [message.role for message in found.messages] == roles


def test_a_tool_call_taken_by_a_json_path_takes_its_result_along(tmp_path):
    turns = [user("x"), assistant("let me see", tool_calls=[CALL])]
    turns += [{"role": "tool", "content": "4", "tool_call_id": "a"}, assistant("y")]
    found = read_one(tmp_path, {"messages": turns}, prune=prune_by("$.messages[*].tool_calls"))
    assert [message.content for message in found.messages] == ["x", "y"]


def test_messages_of_a_role_of_ones_own_and_late_instructions_are_taken_out_before_reading(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        user("a"),
        {"role": "memory", "content": "m"},
        assistant("b"),
        {"role": "system", "content": "late"},
    ]
    rules = [StripRule(role="memory"), StripRule(role="system")]
    found = read_one(tmp_path, {"messages": turns}, prune=pruner(rules))
    # The leading one is left to strip.strip, which shows it in its preview.
    assert [message.content for message in found.messages] == ["s", "a", "b"]
    assert len(found.removed) == 2


@pytest.mark.parametrize("path", ["$.messages[", "$.a[?", "no path at all ]"])
def test_a_json_path_that_cannot_be_read_is_a_users_mistake(path):
    with pytest.raises(UserError, match="JSON path"):
        prune_by(path)


@pytest.mark.parametrize("path", ["$", "$.messages[?match(@.content, '(')]", "$.messages[?@.content < 3]"])
def test_a_json_path_never_raises_at_a_record(tmp_path, path):
    [found] = read_all(write(tmp_path / "log.jsonl", CHAT), prune=prune_by(path))
    if path == "$":
        assert isinstance(found, Broken)
        assert found.reason == "rule_failed"


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


app = typer.Typer()
app.command()(curate_input.read)
app.command()(curate_input.strip)


@pytest.fixture
def logs(tmp_path):
    chat = [{"role": "system", "content": "be terse and kind"}, *CHAT["messages"]]
    return write(tmp_path / "logs" / "log.jsonl", {"messages": chat}, b"{broken", CHAT).parent


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def test_the_read_command_counts_and_names_broken_records(logs):
    done = run("read", logs)
    assert "2 conversations" in done.output
    assert f"{logs / 'log.jsonl'}:2: not JSON" in done.output
    answer = json.loads(run("read", logs, "--json").stdout)
    assert answer["broken"] == {"not_json": 1}
    assert answer["num_messages"] == 5


def test_without_paths_and_sources_the_command_says_what_to_do(monkeypatch):
    monkeypatch.delenv("APOLLO_CONFIG", raising=False)
    done = run("read")
    assert isinstance(done.exception, UserError)
    assert "sources" in done.exception.message


def test_the_strip_command_takes_its_sources_from_the_configuration_and_writes_what_is_left(logs, tmp_path):
    config = tmp_path / "apollo.toml"
    config.write_text(f'[curation]\nsources = ["{logs}"]\nstrip = [{{role = "system"}}]\n')
    out = tmp_path / "out.jsonl"
    done = run("strip", "--config", config, "--preview", "1", "--out", out)
    assert done.exit_code == 0, done.output
    assert "-be terse and kind" in done.output
    assert "2 conversations, 1 changed, 0 refused" in done.output
    assert "\x1b[" not in done.output
    assert [json.loads(line) for line in out.read_text().splitlines()] == [CHAT, CHAT]
    answer = json.loads(run("strip", "--config", config, "--json").stdout)
    assert answer["report"]["rules"][0]["num_tokens"] == 4
    assert answer["report"]["is_estimate"] is True
    assert answer["num_broken"] == 1


def test_the_strip_command_does_not_write_over_what_it_reads(logs):
    before = (logs / "log.jsonl").read_bytes()
    done = run("strip", logs, "--out", logs / "log.jsonl")
    assert isinstance(done.exception, UserError)
    assert (logs / "log.jsonl").read_bytes() == before


def test_reading_imports_nothing_heavy():
    code = "import sys, apollo_ipc.curation.readers, apollo_ipc.cli.curate_input; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "vllm"} & set(loaded.split())
