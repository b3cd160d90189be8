"""Following logs: no record is lost across appends, crashes, truncation, rotation and rewriting, and what was
read is read again only where in doubt."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
import zstandard

from apollo_curation.logs.conversation import Broken, Conversation
from apollo_curation.logs.follow import Follower
from apollo_curation.settings import Curation, StripRule
from apollo_curation.store import Store

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


def follow(store, *paths: Path, from_beginning: bool = False, **settings) -> Follower:
    own = Curation(max_record_bytes=LIMIT, **settings)
    return Follower(store, paths, own, from_beginning=from_beginning)


def text_of(record) -> str:
    return record.reason if isinstance(record, Broken) else record.messages[0].content


def take(follower: Follower, num_records: int = 64) -> list[str]:
    """What is new, saved batch by batch."""
    texts = []
    for batch in follower.batches(num_records):
        assert len(batch.records) <= num_records
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
    batch = next(follow(store, logs).batches())
    source = batch.records[0].source
    assert (source.path, source.number, source.offset) == (str(logs / "a.jsonl"), 2, size)


def test_half_a_last_line_is_waited_for_and_a_whole_one_needs_no_end(store, logs):
    line = chat("1")
    (logs / "a.jsonl").write_text(line[:20])
    follower = follow(store, logs)
    assert take(follower) == []
    (logs / "a.jsonl").write_text(line)
    assert take(follower) == ["1"]
    (logs / "a.jsonl").write_text(line + "\n" + chat("2"))
    assert take(follower) == ["2"]


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
    assert take(follower) == list("0123456789")  # a file's place is kept when all of it was taken
    append(logs / "a.jsonl", "x")
    assert len(list(follower.batches())) == 1  # read to the end, and not saved
    assert take(follower) == ["x"]
    assert take(follow(store, logs, from_beginning=True)) == [*"0123456789", "x"]


def test_a_crash_between_any_two_steps_loses_nothing(store, logs):
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
    assert set(made) == {json.loads(line)["messages"][0]["content"] for line in lines}


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


@pytest.mark.parametrize(
    ("rotated", "is_copied"), [("b.jsonl", False), ("0.jsonl", False), ("b.jsonl", True)]
)
@pytest.mark.parametrize("is_same_process", [False, True])
def test_a_renamed_log_is_read_on_and_a_copied_one_anew(store, logs, rotated, is_copied, is_same_process):
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
    assert sorted(take(follower)) == sorted([*(["1", "2"] if is_copied else []), "3", "new 1"])
    append(logs / "a.jsonl", "new 2")
    assert take(follow(store, logs)) == ["new 2"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_log_that_is_compressed_later_is_read_anew_once(store, logs, suffix, compress):
    append(logs / "a.jsonl", *(f"{n} " + "x" * 500 for n in range(100)))
    take(follow(store, logs))
    append(logs / "a.jsonl", "last")
    data = (logs / "a.jsonl").read_bytes()
    (logs / f"a.jsonl{suffix}").write_bytes(compress(data))
    (logs / "a.jsonl").unlink()
    assert take(follow(store, logs))[-1] == "last"
    assert take(follow(store, logs)) == []


def test_an_archive_that_is_still_written_is_waited_for(store, logs):
    data = gzip.compress("".join(chat(f"{n} {random.random()}") + "\n" for n in range(5000)).encode())
    (logs / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    follower = follow(store, logs)
    first = take(follower)
    (logs / "a.jsonl.gz").write_bytes(data)
    assert take(follower)[: len(first)] == first
    assert take(follower) == []


def test_a_json_document_is_read_when_it_is_complete_and_its_array_may_grow(store, logs):
    path, one, two = logs / "a.json", chat("1"), chat("2")
    follower = follow(store, logs)
    path.write_text(f"[\n{one},\n{two[:9]}")
    assert take(follower) == ["1"]
    path.write_text(f"[\n{one},\n{two}\n]")
    assert take(follower) == ["1", "2"]
    path.write_text(f"[\n{one},\n{two},\n{chat('3')}\n]")
    assert take(follower) == ["1", "2", "3"]
    (logs / "b.json").write_text(json.dumps(json.loads(chat("whole")), indent=1)[:-3])
    assert take(follower) == []
    (logs / "b.json").write_text(json.dumps(json.loads(chat("whole")), indent=1))
    assert take(follower) == ["whole"]
    assert take(follow(store, logs)) == []


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


def test_a_batch_holds_no_more_than_a_records_worth_of_bytes_and_one(store, logs):
    append(logs / "a.jsonl", *("x" * (LIMIT // 3) for _ in range(9)))
    sizes = [len(batch.records) for batch in follow(store, logs).batches()]
    assert sum(sizes) == 9
    assert max(sizes) == 3


def test_a_following_reader_prunes_like_any_other(store, logs):
    record = json.loads(chat("1")) | {"memory": "m"}
    (logs / "a.jsonl").write_text(json.dumps(record) + "\n")
    [batch] = follow(store, logs, strip=[StripRule(json_path="$.memory")]).batches()
    [found] = batch.records
    assert isinstance(found, Conversation)
    assert len(found.removed) == 1


def test_what_did_not_change_is_not_opened(store, logs, monkeypatch):
    """What did not change costs a look at its directory entry."""
    from apollo_curation.logs import follow as module

    append(logs / "a.jsonl", "1")
    take(follow(store, logs))
    (logs / "a.jsonl").rename(logs / "b.jsonl")
    take(follow(store, logs))
    monkeypatch.setattr(module, "open_stream", lambda path: pytest.fail(f"{path} was opened"))
    assert take(follow(store, logs)) == []
