"""A teacher whose forms the served model writes is killed, or its job is cancelled."""

from __future__ import annotations

import pytest
from test_complete import STATEMENT, Asks
from test_teach import FACTS, Killed, admit, teach, with_store
from test_writer import GERMAN, Able, trained, writing

from apollo_curation.teach import writer
from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.teaching.store import TeachOptions, TeachRequest, TeachStore


@pytest.fixture
def store(tmp_path):
    with TeachStore(tmp_path / "teaching.sqlite") as store:
        yield store


@pytest.mark.parametrize(
    "request_", [TeachRequest(FACTS), TeachRequest([GERMAN]), TeachRequest([STATEMENT])], ids=str
)
def test_killed_after_any_call_it_goes_on_and_teaches_once(tmp_path, request_):
    def run(directory, dies_at):
        world = Able() if request_.facts == FACTS else Asks()

        def go_on(store):
            job = store.admit(request_, b"one", client_key="one")
            world.dies_at = dies_at
            if dies_at is not None:
                with pytest.raises(Killed):
                    teach(store, world, job)
            world.dies_at = None
            return teach(store, world, store.job(job.id))

        return world, with_store(directory, go_on)

    whole_run, first = run(tmp_path / "whole", None)
    assert whole_run.num_calls > 15
    for dies_at in range(1, whole_run.num_calls + 1):
        world, job = run(tmp_path / str(dies_at), dies_at)
        assert job.phase == "applied", dies_at
        assert [*world.requests] == [f"{job.id}-1"], dies_at
        assert trained(world, job) == trained(whole_run, first), dies_at
        assert writing(job) == writing(first), dies_at
        assert len(world.prompts) <= 2 * len(request_.facts), dies_at


def test_what_was_written_before_a_crash_is_not_written_again(tmp_path):
    world = Able()
    first = world.own_answers

    def run(store):
        job = admit(store)
        calls = iter([first])
        world.own_answers = lambda *args, **options: next(calls, dead)(*args, **options)
        with pytest.raises(Killed):
            teach(store, world, job)
        assert len(world.prompts) == 2
        world.own_answers = first
        return teach(store, world, store.job(job.id))

    def dead(*_args, **_options):
        raise Killed

    job = with_store(tmp_path, run)
    assert (job.phase, len(world.prompts)) == ("applied", 2)


def test_a_job_that_is_cancelled_while_the_model_writes_asks_nothing_more(store):
    facts = [
        whole(Fact(f"Who runs the {n} shift?", f"Odalys Penrose runs the {n} shift.")) for n in range(12)
    ]

    class Cancels(Able):
        def write(self, prompts, kind, *, max_tokens):
            store.cancel(job.id)
            return super().write(prompts, kind, max_tokens=max_tokens)

        def own_answers(self, questions, *, max_tokens):
            assert not self.prompts, "asked after it was cancelled"
            return super().own_answers(questions, max_tokens=max_tokens)

    world = Cancels()
    world.facts = facts
    job = store.admit(TeachRequest(facts, TeachOptions(writer="model")), b"many", client_key=None)
    job = teach(store, world, job)
    assert (job.phase, world.requests, world.pin_now) == ("cancelled", {}, None)
    assert len(world.prompts) == writer.FACTS_AT_A_TIME
