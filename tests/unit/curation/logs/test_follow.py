"""Following logs: each record once, across appends, crashes, truncation, rotation and rewriting."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import zstandard

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_curation.logs.follow import Follower
from apollo_curation.store import Store
from apollo_ipc.errors import Conflict

LIMIT = 1 << 20


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state" / "curation.sqlite") as store:
        store.declare("CREATE TABLE IF NOT EXISTS made (text TEXT);\n")
        yield store


@pytest.fixture
def logs(tmp_path) -> Path:
    path = tmp_path / "logs"
    path.mkdir()
    return path


def chat(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]})


def append(path: Path, *texts: str) -> None:
    with path.open("a") as file:
        file.write("".join(chat(text) + "\n" for text in texts))


def follow(store, *paths: Path, **options) -> Follower:
    return Follower(store, paths, max_record_bytes=LIMIT, **options)


def text_of(record) -> str:
    return record.reason if isinstance(record, Broken) else record.messages[0].content


def take(follower: Follower, num_records: int = 64) -> list[str]:
    """What is new, saved batch by batch."""
    texts = []
    for batch in follower.batches(num_records):
        assert 0 < len(batch.records) <= num_records
        follower.save(batch)
        texts += [text_of(record) for record in batch.records]
    return texts


def test_only_what_is_new_is_read_also_by_the_next_process(store, logs):
    append(logs / "a.jsonl", "1", "2")
    follower = follow(store, logs)
    assert take(follower) == ["1", "2"]
    assert take(follower) == []
    append(logs / "a.jsonl", "3")
    append(logs / "sub.jsonl", "4")
    assert take(follower) == ["3", "4"]
    append(logs / "a.jsonl", "5")
    assert take(follow(store, logs)) == ["5"]


def test_sources_stay_right_after_reading_on(store, logs):
    append(logs / "a.jsonl", "1")
    take(follow(store, logs))
    size = (logs / "a.jsonl").stat().st_size
    append(logs / "a.jsonl", "2")
    [batch] = follow(store, logs).batches()
    source = batch.records[0].source
    assert (source.path, source.number, source.offset) == (str(logs / "a.jsonl"), 2, size)


def test_a_last_line_without_its_end_is_waited_for(store, logs):
    line = chat("1")
    (logs / "a.jsonl").write_text(line[:20])
    follower = follow(store, logs)
    assert take(follower) == []
    (logs / "a.jsonl").write_text(line)
    assert take(follower) == []
    append(logs / "a.jsonl")
    (logs / "a.jsonl").write_text(line + "\n")
    assert take(follower) == ["1"]


def test_broken_records_are_told_once(store, logs):
    (logs / "a.jsonl").write_text("{broken\n" + chat("1") + "\n")
    (logs / "b.jsonl").write_text((chat("x") + "\n") * 30, encoding="utf-16")
    (logs / "c.jsonl").write_bytes(b"\0" * (LIMIT + 5) + b"\n")
    follower = follow(store, logs)
    assert take(follower) == ["not_json", "1", "utf_16", "too_long"]
    assert take(follower) == take(follow(store, logs)) == []


def test_what_was_not_saved_is_given_again(store, logs):
    append(logs / "a.jsonl", *map(str, range(10)))
    follower = follow(store, logs)
    for batch in follower.batches(num_records=4):
        follower.save(batch)
        break
    assert take(follower) == list("456789")
    append(logs / "a.jsonl", "x")
    assert len(list(follower.batches())) == 1  # read to the end, and not saved
    assert take(follower) == ["x"]


def test_a_crash_between_any_two_steps_loses_and_doubles_nothing(store, logs):
    rng = random.Random(1)
    written = 0
    for _ in range(60):
        for name in ("a.jsonl", "b.jsonl"):
            num = rng.randrange(4)
            append(logs / name, *(f"{name} {n}" for n in range(written, written + num)))
            written += num
        follower = follow(store, logs)
        try:
            for batch in follower.batches(num_records=rng.randint(1, 5)):
                with store.transaction() as db:
                    for record in batch.records:
                        db.execute("INSERT INTO made VALUES (?)", (text_of(record),))
                        if rng.random() < 0.05:
                            raise InterruptedError
                    follower.save(batch)
                    if rng.random() < 0.1:
                        raise InterruptedError
        except InterruptedError:
            continue
    for batch in (follower := follow(store, logs)).batches():
        with store.transaction() as db:
            db.executemany("INSERT INTO made VALUES (?)", [(text_of(one),) for one in batch.records])
            follower.save(batch)
    made = [row["text"] for row in store.query("SELECT text FROM made")]
    lines = [line for name in ("a", "b") for line in (logs / f"{name}.jsonl").read_text().splitlines()]
    assert written > 100
    assert sorted(made) == sorted(json.loads(line)["messages"][0]["content"] for line in lines)


def test_a_truncated_file_is_read_from_its_beginning(store, logs):
    append(logs / "a.jsonl", "1", "2", "3")
    follower = follow(store, logs)
    take(follower)
    (logs / "a.jsonl").write_text(chat("4") + "\n")
    assert take(follower) == ["4"]


@pytest.mark.parametrize("num_common", [0, 200])
def test_a_file_written_anew_beyond_its_old_size_is_noticed(store, logs, num_common):
    common = [f"the same beginning {n}" for n in range(num_common)]
    append(logs / "a.jsonl", *common, "1", "2")
    follower = follow(store, logs)
    take(follower)
    with (logs / "a.jsonl").open("r+") as file:  # the same inode
        file.truncate(0)
    append(logs / "a.jsonl", *common, "3", "4", "5", "6")
    assert take(follower) == [*common, "3", "4", "5", "6"]


def test_a_file_that_is_replaced_by_a_longer_copy_of_itself_goes_on(store, logs):
    append(logs / "a.jsonl", "1", "2")
    follower = follow(store, logs)
    take(follower)
    shutil.copy(logs / "a.jsonl", logs / ".new")
    append(logs / ".new", "3")
    os.replace(logs / ".new", logs / "a.jsonl")
    assert take(follower) == ["3"]


@pytest.mark.parametrize(
    ("rotated", "is_copied"),
    [("a.jsonl.1", False), ("b.jsonl", False), ("0.jsonl", False), ("a.jsonl.1", True)],
)
@pytest.mark.parametrize("is_same_process", [False, True])
def test_a_rotated_file_is_read_to_its_end_and_not_again(store, logs, rotated, is_copied, is_same_process):
    append(logs / "a.jsonl", "1", "2")
    follower = follow(store, logs)
    take(follower)
    append(logs / "a.jsonl", "3")
    if is_copied:
        shutil.copy(logs / "a.jsonl", logs / rotated)
        (logs / "a.jsonl").write_text("")
    else:
        (logs / "a.jsonl").rename(logs / rotated)
    append(logs / "a.jsonl", "new 1")
    follower = follower if is_same_process else follow(store, logs)
    assert take(follower) == ["3", "new 1"]
    append(logs / "a.jsonl", "new 2")
    assert take(follow(store, logs)) == ["new 2"]


def test_a_rotation_with_nothing_unread_gives_nothing_again(store, logs):
    append(logs / "a.jsonl", "1", "2")
    follower = follow(store, logs)
    take(follower)
    (logs / "a.jsonl").rename(logs / "b.jsonl")
    (logs / "a.jsonl").write_text("")
    assert take(follower) == []
    append(logs / "a.jsonl", "3")
    assert take(follower) == ["3"]
    assert take(follow(store, logs)) == []


def test_an_interrupted_reading_of_a_rotated_file_goes_on_there(store, logs):
    append(logs / "a.jsonl", "1")
    take(follow(store, logs))
    append(logs / "a.jsonl", "2", "3", "4")
    (logs / "a.jsonl").rename(logs / "a.jsonl.1")
    append(logs / "a.jsonl", "5")
    follower = follow(store, logs / "a.jsonl")
    for batch in follower.batches(num_records=1):
        assert text_of(batch.records[0]) == "2"
        follower.save(batch)
        break
    assert take(follow(store, logs / "a.jsonl")) == ["3", "4", "5"]
    assert take(follow(store, logs / "a.jsonl")) == []


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_log_that_is_compressed_later_is_not_read_again_only_to_its_end(store, logs, suffix, compress):
    append(logs / "a.jsonl", *(f"{n} " + "x" * 500 for n in range(100)))
    take(follow(store, logs))
    append(logs / "a.jsonl", "last")
    data = (logs / "a.jsonl").read_bytes()
    (logs / f"a.jsonl{suffix}").write_bytes(compress(data))
    (logs / "a.jsonl").unlink()
    assert take(follow(store, logs)) == ["last"]
    assert take(follow(store, logs)) == []


def test_a_compressed_log_is_read_on_after_a_crash(store, logs):
    text = "".join(chat(f"{n} " + "x" * 500) + "\n" for n in range(300))
    (logs / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    follower = follow(store, logs)
    for batch in follower.batches(num_records=100):
        follower.save(batch)
        break
    assert [one.split()[0] for one in take(follow(store, logs))] == [str(n) for n in range(100, 300)]


def test_an_archive_that_is_still_written_is_waited_for(store, logs):
    data = gzip.compress("".join(chat(f"{n} {random.random()}") + "\n" for n in range(5000)).encode())
    (logs / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    follower = follow(store, logs)
    first = take(follower)
    (logs / "a.jsonl.gz").write_bytes(data)
    assert len(first) + len(take(follower)) == 5000


def test_a_json_document_is_read_when_it_is_complete_and_its_array_may_grow(store, logs):
    path, one, two = logs / "a.json", chat("1"), chat("2")
    follower = follow(store, logs)
    path.write_text(f"[\n{one},\n{two[:9]}")
    assert take(follower) == ["1"]
    path.write_text(f"[\n{one},\n{two}\n]")
    assert take(follower) == ["2"]
    path.write_text(f"[\n{one},\n{two},\n{chat('3')}\n]")
    assert take(follower) == ["3"]
    (logs / "b.json").write_text(json.dumps(json.loads(chat("whole")), indent=1)[:-3])
    assert take(follower) == []
    (logs / "b.json").write_text(json.dumps(json.loads(chat("whole")), indent=1))
    assert take(follower) == ["whole"]
    assert take(follow(store, logs)) == []


def test_a_second_process_on_the_same_files_is_refused_and_keeps_nothing(store, logs):
    append(logs / "a.jsonl", "1", "2")
    one, other = follow(store, logs), follow(store, logs)
    [batch], [same] = list(one.batches()), list(other.batches())
    one.save(batch)

    def keep_twice():
        with store.transaction() as db:
            db.execute("INSERT INTO made VALUES ('twice')")
            other.save(same)

    with pytest.raises(Conflict, match="another process"):
        keep_twice()
    assert not store.query("SELECT * FROM made")
    append(logs / "a.jsonl", "3")
    assert take(other) == ["3"]


def test_an_unreadable_file_is_named_once_and_read_when_it_can_be(store, logs):
    append(logs / "b.jsonl", "1")
    (logs / "a.jsonl.zst").write_bytes(b"no archive")
    follower = follow(store, logs)
    assert take(follower) == ["cannot_read", "1"]
    assert take(follower) == []
    (logs / "a.jsonl.zst").write_bytes(zstandard.compress((chat("2") + "\n").encode()))
    assert take(follower) == ["2"]


def test_paths_may_come_later(store, logs):
    follower = follow(store, logs / "new", logs / "x.log")
    assert take(follower) == []
    (logs / "new").mkdir()
    append(logs / "new" / "a.jsonl", "1")
    append(logs / "x.log", "2")
    assert take(follower) == ["1", "2"]


def test_watching_gives_what_comes_until_it_is_stopped(store, logs):
    stop, seen = threading.Event(), threading.Event()
    found: list[str] = []
    append(logs / "a.jsonl", "1")

    def watch():
        with Store(store.path) as own:
            follower = follow(own, logs)
            for batch in follower.watch(0.01, stop):
                follower.save(batch)
                found.extend(text_of(record) for record in batch.records)
                seen.set()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert seen.wait(10)
        seen.clear()
        append(logs / "b.jsonl", "2")
        assert seen.wait(10)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    assert found == ["1", "2"]


def test_a_batch_holds_no_more_than_a_records_worth_of_bytes_and_one(store, logs):
    append(logs / "a.jsonl", *("x" * (LIMIT // 3) for _ in range(9)))
    sizes = [len(batch.records) for batch in follow(store, logs).batches()]
    assert sum(sizes) == 9
    assert max(sizes) == 3


def test_a_following_reader_prunes_like_any_other(store, logs):
    from apollo_curation.logs.strip import pruner
    from apollo_curation.settings import StripRule

    record = json.loads(chat("1")) | {"memory": "m"}
    (logs / "a.jsonl").write_text(json.dumps(record) + "\n")
    [batch] = follow(store, logs, prune=pruner([StripRule(json_path="$.memory")])).batches()
    [found] = batch.records
    assert isinstance(found, Conversation)
    assert len(found.removed) == 1
