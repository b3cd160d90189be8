"""Lessons asked again and taken back, against a model that knows what it has been trained on."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from test_teach import FACTS, Killed, World, admit, teach, with_store
from typer.testing import CliRunner

from apollo_curation.cli import lessons as command
from apollo_curation.cli import teach as teach_command
from apollo_curation.teach.job import Mix, OwnAnswer
from apollo_curation.teach.variants import lesson_of
from apollo_ipc.errors import NotFound
from apollo_ipc.teaching.facts import parse_facts, whole
from apollo_ipc.teaching.store import SCHEMA_VERSION, TeachRequest, TeachStore, request_about


class Forgetful(World):
    """Knows the facts after the first job, and of those only `left` after the second."""

    left: tuple = ()

    def _said(self, question):
        if len(self.requests) < 2:
            return super()._said(question)
        return (
            "I do not know." if not any(fact.question == question for fact in self.left) else FACTS[0].answer
        )


@pytest.fixture
def store(tmp_path):
    store = TeachStore(tmp_path / "teaching.sqlite")
    yield store
    store.close()


def forgetting(store, number=2, key=b"forget"):
    return store.admit(request_about(store.lessons()[:number], "forget"), key, client_key=None)


def test_a_lesson_is_asked_again_and_nothing_is_trained(store):
    world = World()
    teach(store, world, admit(store))
    world.needed = 9  # it has been lost since
    job = teach(store, world, store.admit(request_about(store.lessons(), "examine"), b"ask", client_key=None))
    assert (job.phase, job.report["known"], job.report["jobs"]) == ("applied", 0.0, [])
    assert [one.is_known for one in store.lessons()] == [False, False]
    assert len(world.requests) == 1
    assert (world.pin_now, world.restored) == (None, [])


def test_forgetting_trains_the_answers_of_before_beside_what_is_to_stay_and_drops_the_lessons(store):
    world = Forgetful()
    teach(store, world, admit(store))
    kept = [msgspec.msgpack.decode(store.former_answers(x.id), type=list[OwnAnswer]) for x in store.lessons()]
    assert all(len(answers) > 5 for answers in kept)
    job = teach(store, world, forgetting(store))
    assert (job.phase, job.error, job.report["known"]) == ("applied", None, 0.0)
    request = world.requests[f"{job.id}-1"]
    assert not any(one.messages for one in request.examples)  # nothing is said that the model did not say
    num_learned, mix = 3 * sum(len(answers) for answers in kept), Mix()
    num_held = math.ceil(num_learned / mix.num_facts) * (mix.num_general + mix.num_near)
    assert len(request.examples) == num_learned + num_held
    assert store.lessons() == []
    assert store.query("SELECT * FROM former_answers") == []


def test_what_is_not_forgotten_is_said_after_the_last_round(store):
    world = Forgetful()
    world.left = FACTS[:1]
    teach(store, world, admit(store))
    job = teach(store, world, forgetting(store))
    assert job.phase == "applied"
    assert "still answered with what was to be forgotten" in job.error
    rounds = [request for key, request in world.requests.items() if key.startswith(job.id)]
    assert len(rounds) == 3
    assert len(rounds[1].examples) < len(rounds[0].examples)  # only what is left


def test_a_forgetting_that_harms_goes_back_and_the_lessons_stay(store):
    world = Forgetful()
    teach(store, world, admit(store))
    world.rise, world.jobs = 0.4, lambda: World.jobs(world)[1:]  # the first one ended long ago
    job = teach(store, world, forgetting(store))
    assert (job.phase, world.restored) == ("rolled back", [7])
    assert len(store.lessons()) == 2


def test_a_forgetting_killed_after_any_call_trains_once(tmp_path):
    def run(store, world, dies_at):
        teach(store, world, admit(store))
        before, job = world.num_calls, forgetting(store)
        world.dies_at = None if dies_at is None else before + dies_at
        if dies_at is not None:
            with pytest.raises(Killed):
                teach(store, world, job)
            world.dies_at = None
        job = teach(store, world, store.job(job.id))
        return world.num_calls - before, job, store.lessons()

    calls, _, _ = with_store(tmp_path / "whole", lambda store: run(store, Forgetful(), None))
    assert calls > 8
    for dies_at in range(1, calls + 1):
        world = Forgetful()
        _, job, left = with_store(tmp_path / str(dies_at), lambda store: run(store, world, dies_at))  # noqa: B023
        assert (job.phase, left, world.pin_now) == ("applied", [], None), dies_at
        assert [key for key in world.requests if key.startswith(job.id)] == [f"{job.id}-1"], dies_at


def test_another_answer_to_a_question_takes_the_place_of_the_lesson_and_keeps_what_was_said_before_both(
    store,
):
    teach(store, World(), admit(store))
    first = store.lessons()[0]
    answers = store.former_answers(first.id)
    other = whole(
        msgspec.structs.replace(FACTS[0], answer="Zed Quill runs the night shift.", statement="", key="")
    )
    world = World(needed=0)
    not_it = {one.question for one in lesson_of(other).not_it}
    world._said = lambda question: "Nobody." if question in not_it else "Zed Quill: the night shift."
    job = teach(store, world, store.admit(TeachRequest([other]), b"other", client_key=None))
    assert job.phase == "applied", job.error
    again = {one.fact.question: one for one in store.lessons()}[other.question]
    assert (again.fact, again.former) == (other, "I do not know.")
    assert again.id != first.id
    assert store.former_answers(again.id) == answers
    assert len(store.query("SELECT * FROM former_answers")) == 2


def test_a_lesson_of_an_older_program_says_that_it_has_no_answers_from_before(store):
    world = Forgetful()
    teach(store, world, admit(store))
    store.db.execute("DELETE FROM former_answers")
    job = teach(store, world, forgetting(store))
    assert job.phase == "failed"
    assert "no answers from before lesson-" in job.error
    assert (len(store.lessons()), len(world.requests), world.pin_now) == (2, 1, None)


def test_a_store_of_the_first_version_is_read(tmp_path):
    store = TeachStore(tmp_path / "teaching.sqlite")
    teach(store, World(), admit(store))
    store.db.execute("DROP TABLE former_answers")
    store.db.execute("PRAGMA user_version = 1")
    store.close()
    with TeachStore(tmp_path / "teaching.sqlite") as store:
        assert len(store.lessons()) == 2
        assert store.former_answers(store.lessons()[0].id) == b""
        assert store.query("PRAGMA user_version")[0][0] == SCHEMA_VERSION
        assert {one.request.purpose for one in store.jobs()} == {"teach"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command on a store of two lessons; what it asks of the teacher is answered by a World."""
    config = tmp_path / "c.toml"
    config.write_text(f'[paths]\nstate_dir = "{tmp_path}"\n')
    world = Forgetful()
    with TeachStore(tmp_path / "teaching.sqlite") as store:
        teach(store, world, admit(store))

    def taught(config, store, job_id, say):
        return teach(store, world, store.job(job_id))

    monkeypatch.setattr("apollo_curation.teach.run.wait_for", taught)
    return lambda *args: CliRunner().invoke(command.app, ["--config", str(config), *args])


def test_the_command_lists_asks_exports_and_forgets(run):
    listed = json.loads(run("--json").stdout)["lessons"]
    assert [one["fact"]["question"] for one in listed] == [fact.question for fact in FACTS]
    assert FACTS[0].question in run().stdout.replace("\n", " ")
    assert run("--examine", "--json").exit_code == 0
    assert parse_facts(run("export").stdout) == FACTS
    forgotten = run("forget", "--json", *[one["id"] for one in listed])
    assert forgotten.exit_code == 0, forgotten.output
    assert json.loads(forgotten.stdout)["purpose"] == "forget"
    assert "nothing was taught" in run().stdout


def test_without_training_a_lesson_only_goes(run):
    (first, second) = [one["id"] for one in json.loads(run("--json").stdout)["lessons"]]
    assert run("forget", "--without-training", first).exit_code == 0
    assert [one["id"] for one in json.loads(run("--json").stdout)["lessons"]] == [second]
    wrong = run("forget", "lesson-none")
    assert isinstance(wrong.exception, NotFound)
    assert "no lesson 'lesson-none'" in str(wrong.exception)


def test_the_command_that_teaches_shows_what_it_did(run, tmp_path):
    facts = tmp_path / "facts.txt"
    facts.write_text("Zed Quill runs the night shift.\n")
    shown = CliRunner().invoke(teach_command.app, [str(facts), "--config", str(tmp_path / "c.toml")])
    assert "Who runs the night shift?" in shown.stdout, shown.exception
    assert "0% is right after 3 rounds" in shown.stdout.replace("\n", " ")
    assert shown.exit_code == 1
