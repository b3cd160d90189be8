"""Moments of whole logs: a planted stream, a log that is read again, a session's length, feedback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import planted
import pytest
from conversations import call, conversation
from places import BENCHMARKS

from apollo_curation.logs.conversation import find_problem
from apollo_curation.logs.follow import Follower
from apollo_curation.moments.moments import Moments
from apollo_curation.moments.notice import notice
from apollo_curation.moments.signals import flag
from apollo_curation.moments.signals.intake import Taken, take, take_new
from apollo_curation.settings import Curation, CurationConfig, StripRule
from apollo_curation.store import Store
from apollo_ipc.config import Traffic
from apollo_ipc.wire.requests import Message

BENCHMARK = BENCHMARKS / "signals.py"


def test_the_stream_has_as_many_turns_and_moments_as_it_says_and_is_the_same_each_time():
    stream = planted.stream(3)
    assert stream == planted.stream(3) != planted.stream(4)
    assert planted.num_turns(stream) == 400
    assert Counter(label.kind for one in stream for label in one.labels) == dict.fromkeys(planted.KINDS, 10)
    assert not any(find_problem(one.conversation.messages) for one in stream)
    assert sum(bool(one.trap) for one in stream) > 50


# Measured when this was written, seeds 0 to 2, precision and recall of all kinds: part first 100 % and 95 %,
# part second, which no rule was mended with, 97 % and 80 %.
@pytest.mark.parametrize(("part", "precision", "recall"), [("first", 0.95, 0.9), ("second", 0.9, 0.75)])
def test_the_rules_find_the_planted_moments_among_what_looks_alike(part, precision, recall, tmp_path):
    command = [
        sys.executable,
        str(BENCHMARK),
        "--part",
        part,
        "--seeds",
        "3",
        "--json",
        str(tmp_path / "f.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    rows = {row["kind"]: row for row in figures["rows"]}
    assert rows["all"]["planted"] == 120
    assert rows["all"]["precision"] >= precision
    assert rows["all"]["recall"] >= recall
    assert rows["all"]["answer_wrong"] == 0
    for kind in planted.KINDS:
        assert rows[kind]["planted"] == 30
        assert rows[kind]["recall"] >= 0.4
        assert rows[kind]["precision"] >= 0.75


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "state" / "curation.sqlite") as store:
        yield store


def test_a_log_that_is_read_twice_gives_each_moment_once(store, tmp_path):
    stream = planted.stream(0)
    planted.write(stream, tmp_path / "log.jsonl")
    moments, settings = Moments(store), Curation()

    def follow():
        follower = Follower(store, [tmp_path / "log.jsonl"], settings)
        return take_new(store, moments, follower, settings)

    first, second = follow(), follow()
    assert first.num_conversations == len(stream)
    assert first.added.total() == len(moments.list("flagged")) > 30
    assert second.num_conversations == 0
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("nonsense\n")
    third = follow()
    assert third.broken.total() == 1
    assert third.added.total() == 0


def test_a_conversation_that_is_logged_again_with_its_better_answer_brings_the_answer(store):
    moments, settings, taken = Moments(store), Curation(), Taken()
    turns = ["What is 6 times 7?", "6 times 7 is 41.", "That's wrong."]
    take(moments, [conversation(*turns)], settings, taken)
    (before,) = moments.list()
    take(moments, [conversation(*turns, "Sorry! 6 times 7 is 42.")], settings, taken)
    (after,) = moments.list()
    assert before.answer is None
    assert after.answer == Message("assistant", "6 times 7 is 42.")
    assert (taken.added.total(), taken.num_known, taken.num_improved) == (1, 1, 1)


@pytest.mark.parametrize(
    "decision", [{"state": "rejected", "decided_by": "person"}, {"num_judged": 1, "decided_by": "judge"}]
)
def test_what_was_decided_or_judged_is_not_changed_by_a_longer_log(store, decision):
    moments, settings, taken = Moments(store), Curation(), Taken()
    turns = ["What is 6 times 7?", "6 times 7 is 41.", "That's wrong."]
    take(moments, [conversation(*turns)], settings, taken)
    (before,) = moments.list()
    decided = moments.change(before.moment_id, **decision)
    take(moments, [conversation(*turns, "Sorry! 6 times 7 is 42.")], settings, taken)
    assert moments.list() == [decided]
    assert taken.num_improved == 0


def test_the_time_of_a_session_is_linear_in_its_length():
    """600 edits that fail and are mended took 74 s once; twice as many take about twice as long."""
    took_s = {num: min(_time_of(num) for _ in range(3)) for num in (150, 600)}
    assert took_s[600] < 2  # of the CPU: others may use it too
    assert took_s[600] < 4 * 3 * took_s[150]  # 16 times where it is quadratic


def _time_of(num_edits: int) -> float:
    turns: list = ["Put it right."]
    for at in range(num_edits):
        for old in (f"lux{at} = 1 ", f"lux{at} = 1"):
            turns.append(call("edit", path=f"part{at % 7}.py", old=old, new=f"lux{at} = 2"))
            turns.append(("error: text not found" if old.endswith(" ") else f"edited {at} " + "lux " * 300,))
    said = conversation(*turns, "Done.")
    started = time.process_time()
    assert len(flag(said, [StripRule(role="system")], 8)) == num_edits
    return time.process_time() - started


@pytest.mark.parametrize(
    ("said", "kind", "answer"),
    [
        ({"rating": "up"}, "praise", "Cusco."),
        ({"rating": "down"}, "correction", None),
        ({"correction": "Lima."}, "correction", "Lima."),
    ],
)
def test_feedback_is_a_moment_with_its_whole_context(tmp_path, said, kind, answer):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Capital of Peru?"), ("assistant", "Cusco.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "spool").mkdir()
    record = {"completion_id": "c", "messages": messages, "feedback": said}
    (tmp_path / "spool" / "a.jsonl").write_text(json.dumps(record) + "\n")
    traffic = Traffic(directory=str(tmp_path / "spool"))
    with Store(tmp_path / "curation.sqlite") as store:
        notice(CurationConfig(traffic=traffic), store)
        [moment] = Moments(store).list()
    assert (moment.kind, moment.answer and moment.answer.content) == (kind, answer)
    assert [message.content for message in moment.context] == ["Hi", "Hello", "Capital of Peru?"]
    assert moment.confidence == 0.9
