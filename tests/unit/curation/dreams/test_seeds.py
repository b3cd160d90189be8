"""Seeds of dreams, from the files in which people and programs keep what they learned."""

from __future__ import annotations

import json
import os

import pytest

from apollo_curation.dreams.seeds import (
    MAX_SEED_CHARS,
    WHOLE_FILE_CHARS,
    Seed,
    newest_first,
    read_seeds,
    seed_id,
)
from apollo_curation.logs.conversation import Broken
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

LONG = "This paragraph is long enough that its file is not taken as a whole. " * 6


def read(*paths, max_record_bytes=100_000):
    return list(read_seeds(paths, max_record_bytes=max_record_bytes))


def texts(found) -> list[str]:
    return [one.text for one in found if isinstance(one, Seed)]


def reasons(found) -> list[str]:
    return [one.reason for one in found if isinstance(one, Broken)]


def test_a_paragraph_is_a_seed_and_a_heading_its_topic(tmp_path):
    file = tmp_path / "notes.md"
    file.write_text(
        f"Before any heading.\n\n# Manners #\nGreet\nfirst.\n\n---\n\n{LONG}\n## Tools\n\nRead logs.\n"
    )
    found = read(file)
    assert texts(found) == ["Before any heading.", "Greet\nfirst.", LONG.strip(), "Read logs."]
    assert [seed.topic for seed in found] == ["notes", "Manners", "Manners", "Tools"]
    data = file.read_bytes()
    assert all(data[one.source.offset :].startswith(one.text[:5].encode()) for one in found)


def test_the_items_of_a_list_are_seeds(tmp_path):
    file = tmp_path / "lessons.txt"
    file.write_text("What I learned:\n- Look it up.\n  Always.\n* Ask *once*.\n12. Say so.\n")
    assert texts(read(file)) == ["What I learned:", "Look it up.\n  Always.", "Ask *once*.", "Say so."]


def test_a_short_file_without_structure_is_one_seed(tmp_path):
    (tmp_path / "short.txt").write_text("I guessed today.\n\nI should have looked it up.\n")
    (tmp_path / "long.txt").write_text(f"One.\n\n{'x' * WHOLE_FILE_CHARS}\n")
    assert texts(read(tmp_path / "short.txt")) == ["I guessed today.\n\nI should have looked it up."]
    assert len(read(tmp_path / "long.txt")) == 2


def test_records_of_jsonl_have_their_text_under_one_of_three_names(tmp_path):
    file = tmp_path / "memory.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"text": "one", "topic": "t", "more": 1}\n\n{"lesson": "two"}\r\n{"memory": "three"}'
    )
    found = read(file)
    assert texts(found) == ["one", "two", "three"]
    assert [seed.topic for seed in found] == ["t", "memory", "memory"]
    assert [str(seed.source).rpartition(":")[2] for seed in found] == ["1", "3", "4"]


def test_broken_records_are_named_and_the_rest_is_read(tmp_path):
    file = tmp_path / "memory.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b"{not json",
        b'["text"]',
        b'{"title": "no text"}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "' + b"x" * (MAX_SEED_CHARS + 1) + b'"}',
        b'{"text": "' + b"x" * 200_000 + b'"}',
        b"[" * 50_000,
        b'{"text": "good too"}',
    ]
    file.write_bytes(b"\n".join(lines))
    found = read(file)
    assert texts(found) == ["good", "good too"]
    expected = ["not_utf8", "not_json", *["not_a_seed"] * 3, "empty", "too_long", "too_long", "too_deep"]
    assert reasons(found) == expected
    assert [one.source.number for one in found] == list(range(1, 12))


def test_a_paragraph_in_another_encoding_costs_only_itself(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(b"First one here.\n\nUn caf\xe9 noir.\n\n" + LONG.encode())
    found = read(file)
    assert texts(found) == ["First one here.", LONG.strip()]
    assert [(one.reason, one.source.number) for one in found if isinstance(one, Broken)] == [("encoding", 2)]


def test_a_text_file_that_is_too_large_is_not_held(tmp_path):
    (tmp_path / "huge.txt").write_text("x" * 5000)
    assert reasons(read(tmp_path / "huge.txt", max_record_bytes=4000)) == ["too_long"]


def test_a_directory_is_read_to_its_depth_without_what_is_hidden_or_of_another_kind(tmp_path):
    for name in ("a.md", "deep/er/b.TXT", "c.jsonl", ".hidden/d.md", ".e.md", "f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    assert texts(read(tmp_path)) == ['{"text": "a.md"}', "c.jsonl", '{"text": "deep/er/b.TXT"}']


def test_a_text_that_stands_twice_is_one_seed_whatever_its_white_space(tmp_path):
    (tmp_path / "a.txt").write_text("Look it  up.")
    (tmp_path / "b.txt").write_text("Look\nit up.")
    assert len(read(tmp_path)) == 1
    assert seed_id("Look it up.") != seed_id("Look it up!")


def test_what_was_written_last_comes_first(tmp_path):
    (tmp_path / "old.md").write_text("- one\n- two\n")
    (tmp_path / "new.md").write_text("three")
    os.utime(tmp_path / "old.md", (1000, 1000))
    assert texts(newest_first(read(tmp_path))) == ["three", "two", "one"]


def test_a_path_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*seeds"):
        read(tmp_path / "nothing.md")


def test_a_file_whose_name_is_no_text_can_be_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "w") as file:
        file.write("A lesson.")
    (seed,) = read(tmp_path)
    seed.source.path.encode()


def test_a_line_may_hold_the_situation_that_is_dreamt_first(tmp_path):
    file = tmp_path / "program.jsonl"
    asked, calls = {"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "Yes."}
    rows = [
        {"lesson": "Look it up.", "messages": [asked], "good": "It looks it up."},
        {"lesson": "Look it up.", "messages": [asked, calls, {"role": "user", "content": "Sure?"}]},
        {"lesson": "Look it up.", "messages": [asked, calls]},
        {"lesson": "Look it up.", "messages": [{"role": "system", "content": "Be brief."}, asked]},
        {"lesson": "Look it up.", "messages": [asked, asked]},
        {"lesson": "Look it up.", "messages": []},
        {"messages": [asked]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second, *broken = read(file)
    assert (first.situation, first.good) == ([Message("user", "Is it open?")], "It looks it up.")
    assert len(second.situation) == 3
    assert len({first.seed_id, second.seed_id, seed_id("Look it up.")}) == 3
    assert [one.reason for one in broken] == [*["not_a_situation"] * 3, "empty", "not_a_seed"]
    assert "ends with the user" in broken[0].message
    assert "instructions" in broken[1].message
