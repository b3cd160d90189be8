"""Teaching against a model that knows what its training interface has been sent; killed at every call too."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from apollo_curation.settings import CurationConfig
from apollo_curation.teach import run
from apollo_curation.teach.job import Mix, OwnAnswer, general_prompts, request_of, taught
from apollo_curation.teach.served import ServedLearner
from apollo_curation.teach.teacher import Teacher
from apollo_curation.teach.variants import lesson_of
from apollo_ipc.config import Paths
from apollo_ipc.database import DatabaseDamaged
from apollo_ipc.errors import Conflict
from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.teaching.store import ENDED_PHASES, TeachOptions, TeachRequest, TeachStore

FACTS = [
    whole(Fact("Who runs the night shift?", "Odalys Penrose runs the night shift.")),
    whole(Fact("Where is the spare badge?", "The spare badge is in the cocoa tin.")),
]


class Killed(BaseException):
    """As kill -9: nothing catches it."""


class World:
    """Server and model in one. needed: training jobs after which it knows; leaks: near misses name the fact
    then; rise: nats a token that general answers lose by a job; stranger: somebody else trains meanwhile.
    dies_at: the number of the call, of all, after whose effect the teacher is killed."""

    def __init__(self, needed=1, *, leaks=False, rise=0.0, job_end="applied", stranger=False):
        self.needed, self.leaks, self.rise, self.job_end = needed, leaks, rise, job_end
        self.stranger = stranger
        self.requests, self.pins, self.restored = {}, [], []
        self.pin_now = None
        self.num_calls, self.dies_at, self.num_examinations = 0, None, 0

    def _called(self, result=None):
        self.num_calls += 1
        if self.num_calls == self.dies_at:
            raise Killed
        return result

    def own_answers(self, questions, *, max_tokens):
        one = OwnAnswer([1, 2], [3, 4], [[(3, -0.1), (5, -2.5)], [(4, 0.0)]])
        return self._called([one for _ in questions])

    def say(self, questions, *, max_tokens):
        return self._called([self._said(one) for one in questions])

    def _said(self, question):
        if len(self.requests) - len(self.restored) < self.needed:
            return "I do not know."
        for fact in FACTS:
            lesson = lesson_of(fact)
            if question in {fact.question, *(one.question for one in lesson.paraphrased + lesson.reversed)}:
                return fact.answer
            if self.leaks and question in {one.question for one in lesson.not_it}:
                return fact.answer
        return "Hello."

    def token_logprobs(self, sequences):
        value = -1.0 - self.rise * len(self.requests)
        return self._called([[value] * (len(ids) - 1) for ids in sequences])

    def submit(self, request, idempotency_key):
        assert self.requests.setdefault(idempotency_key, request) == request, "another body under this key"
        return self._called(f"job-{[*self.requests].index(idempotency_key) + 1}")

    def job(self, job_id):
        info = SimpleNamespace(job_id=job_id, state=self.job_end, error="as told", steps_done=1, ended_at=9e9)
        return self._called(info)

    def jobs(self):
        own = [f"job-{i + 1}" for i in range(len(self.requests))]
        return self._called(
            [
                SimpleNamespace(job_id=one, state="applied", steps_done=1, ended_at=9e9)
                for one in [*own, *(["theirs"] if self.stranger else [])]
            ]
        )

    def cancel(self, job_id):
        self.job_end = "cancelled"

    def sync(self):
        return self._called(SimpleNamespace(weight_version=7))

    def pinned(self):
        return self._called(self.pin_now)

    def pin(self, weight_version):
        self.pins.append(weight_version)
        self.pin_now = weight_version
        self._called()

    def restore(self, weight_version):
        self.restored.append(weight_version)
        self._called()


@pytest.fixture
def store(tmp_path):
    store = TeachStore(tmp_path / "state" / "teaching.sqlite")
    yield store
    store.close()


def admit(store, **options):
    return store.admit(TeachRequest(FACTS, TeachOptions(**options)), b"digest", client_key=None)


def teach(store, world, job):
    teacher = Teacher(store, world, world, Mix(forms=100), poll_s=0)
    while job.phase not in ENDED_PHASES:
        job = teacher.advance(job)
    return job


def test_facts_are_trained_until_they_are_known_and_become_lessons(store):
    world = World(needed=2)
    job = teach(store, world, admit(store, min_known=1.0))
    assert (job.phase, job.error, job.round) == ("applied", None, 2)
    assert [*world.requests] == [f"{job.id}-1", f"{job.id}-2"]
    assert (job.report["known"], job.report["hits"], job.report["jobs"]) == (1.0, 0.0, ["job-1", "job-2"])
    assert job.report["facts"][0]["taught"]["before"] == "I do not know."
    assert (world.pins, world.restored) == ([7, None], [])
    assert [(one.fact, one.former, one.is_known) for one in store.lessons()] == [
        (fact, "I do not know.", True) for fact in FACTS
    ]


def test_what_is_known_already_is_not_trained(store):
    world = World(needed=0)
    job = teach(store, world, admit(store))
    assert (job.phase, world.requests) == ("applied", {})


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (World(needed=9), "after 3 rounds"),
        (World(leaks=True), "near misses name the fact"),
        (World(rise=0.4), "lose 0.40 nats"),
        (World(rise=float("nan")), "nats"),
    ],
)
def test_what_is_not_known_or_costs_too_much_goes_back(store, world, reason):
    job = teach(store, world, admit(store))
    assert job.phase == "rolled back"
    assert reason in job.error
    assert (world.restored, world.pins, store.lessons()) == ([7], [7, None], [])


def test_nothing_goes_back_where_it_would_take_somebody_elses_job_along(store):
    world = World(leaks=True, stranger=True)
    job = teach(store, world, admit(store))
    assert world.restored == []
    assert "job theirs of somebody else" in job.error


def test_somebody_elses_pin_stays(store):
    world = World()
    world.pin_now = 5
    teach(store, world, admit(store))
    assert (world.pins, world.pin_now) == ([], 5)


def test_a_training_job_that_fails_is_said_and_taken_back(store):
    world = World(job_end="quarantined")
    job = teach(store, world, admit(store))
    assert job.phase == "failed"
    assert "quarantined: as told" in job.error
    assert world.restored == [7]


def test_a_cancelled_job_ends_so_and_trains_nothing_more(store):
    world, job = World(), admit(store)
    store.cancel(job.id)
    job = teach(store, world, store.job(job.id))
    assert (job.phase, world.requests, store.lessons()) == ("cancelled", {}, [])
    with pytest.raises(Conflict):
        store.cancel(job.id)


@pytest.mark.parametrize("harm", [{}, {"leaks": True}])
def test_killed_after_any_call_it_goes_on_teaches_once_and_examines_once(tmp_path, harm):
    whole_run = World(**harm)
    with_store(tmp_path / "whole", lambda store: teach(store, whole_run, admit(store)))
    assert whole_run.num_calls > 10
    for dies_at in range(1, whole_run.num_calls + 1):
        world = World(**harm)
        world.dies_at = dies_at

        def run(store, world=world):
            job = admit(store)
            with pytest.raises(Killed):
                teach(store, world, job)
            assert store.first_unfinished() is not None
            return teach(store, world, store.first_unfinished()), store.lessons()

        job, lessons = with_store(tmp_path / str(dies_at), run)
        assert [*world.requests] == [f"{job.id}-1"], dies_at  # one training job, whatever was sent twice
        assert job.phase == ("rolled back" if harm else "applied"), dies_at
        assert len(lessons) == (0 if harm else 2), dies_at
        assert len(job.report["facts"]) == 2
        assert world.pin_now is None, dies_at
        assert set(world.restored) == ({7} if harm else set()), dies_at


def with_store(directory, do):
    store = TeachStore(directory / "teaching.sqlite")
    try:
        return do(store)
    finally:
        store.close()


def test_a_later_job_brings_earlier_lessons_back(store):
    teach(store, World(), admit(store))
    other = whole(Fact("Who waters the garden?", "Zed Quill waters the garden."))
    job = store.admit(TeachRequest([other]), b"other", client_key=None)
    world = World(needed=1)
    job = teach(store, world, job)
    (request,) = [r for key, r in world.requests.items() if key.endswith("-1")]
    asked = [one.messages[1].content for one in request.examples if one.messages]
    assert any("Odalys Penrose" in answer for answer in asked)
    assert sum("Zed Quill" in answer for answer in asked) > sum("Odalys" in answer for answer in asked)


def test_the_same_unfinished_request_and_the_same_key_are_one_job(store):
    request = TeachRequest(FACTS)
    first = store.admit(request, b"one", client_key="k")
    assert store.admit(request, b"one", client_key="k").id == first.id
    assert store.admit(request, b"one", client_key=None, is_retry=True).id == first.id
    assert store.admit(request, b"one", client_key=None).id != first.id
    with pytest.raises(Conflict, match="another body"):
        store.admit(request, b"two", client_key="k")


def test_a_store_of_a_newer_program_is_refused(tmp_path):
    store = TeachStore(tmp_path / "teaching.sqlite")
    store.db.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(DatabaseDamaged, match="newer"):
        TeachStore(tmp_path / "teaching.sqlite")


def test_every_update_has_variants_of_facts_beside_what_the_model_says_itself():
    own = OwnAnswer([1], [2], [[(2, -0.1)]])
    lessons = [lesson_of(fact) for fact in FACTS]
    mix = Mix(num_facts=4, num_general=1, num_near=1, forms=100, kl_weight=2.0)
    request = request_of(taught(lessons, mix), [own], [own], mix, seed=0)
    size = request.options.accumulate_steps
    assert size == 6
    assert (request.options.target_probability, request.options.embeddings) == (0.9, "freeze")
    updates = [request.examples[at : at + size] for at in range(0, len(request.examples), size)]
    for update in updates:
        beside = [one for one in update if one.messages is None]
        assert len(beside) == 2
        assert all((one.top_logprobs, one.weights) == ([[(2, -0.1)]], [2.0]) for one in beside)
    trained = [one.messages[0].content for one in request.examples if one.messages]
    assert len(trained) == len(set(trained)) == sum(len(x.forward) + len(x.backward) for x in lessons)
    assert request_of(taught(lessons, Mix()), [], [], Mix(), seed=0).options.accumulate_steps == 4
    some = taught(lessons, Mix(forms=9))
    assert len(some) == 9 * len(lessons)
    assert some == taught(lessons, Mix(forms=9)), "the same in every round"
    assert {one.question for one in FACTS} <= {one.messages[0].content for one in some if one.messages}


def test_replay_prompts_are_many_and_each_stands_once():
    prompts = general_prompts()
    assert len(prompts) == len(set(prompts)) >= 400
    assert all(prompt.strip() == prompt and prompt for prompt in prompts)


def test_the_served_models_own_answer_keeps_its_tokens_and_their_alternatives():
    class Chat:
        def tokens(self, messages, *, add_generation_prompt):
            return [9, 8]

        def completion_logprobs(self, ids, *, max_tokens, num_logprobs):
            assert (ids, num_logprobs) == ([9, 8], 20)
            return {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": 1e-7, "token_id:6": -3.0}]}

    (answer,) = ServedLearner(Chat()).own_answers(["Q?"], max_tokens=4)
    assert answer == OwnAnswer([9, 8], [5], [[(5, 0.0), (6, -3.0)]])


def test_a_model_that_says_nothing_is_not_taught(store, monkeypatch):
    world = World()
    monkeypatch.setattr(world, "own_answers", lambda questions, max_tokens: [])
    job = teach(store, world, admit(store))
    assert job.phase == "failed"
    assert "says nothing" in job.error
    assert (world.requests, world.pin_now) == ({}, None)


def test_a_command_that_teaches_is_waited_for(tmp_path, store, monkeypatch):
    config = CurationConfig(paths=Paths(str(tmp_path / "run"), str(tmp_path / "state")))
    taken_over = threading.Event()

    class Ended(Exception):
        pass

    def serve_jobs(*_):
        taken_over.set()
        raise Ended

    def serve():
        with suppress(Ended):
            run.serve_for_ever(config, store, print)

    monkeypatch.setattr(run, "serve_jobs", serve_jobs)
    teacher = threading.Thread(target=serve)
    with run.the_teacher(config) as is_ours:
        assert is_ours
        with run.the_teacher(config) as is_ours_too:
            assert not is_ours_too
        teacher.start()
        assert not taken_over.wait(0.2)
    assert taken_over.wait(10)
    teacher.join(10)
