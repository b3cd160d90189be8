"""Teaching against a model that knows what its training interface has been sent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apollo_curation.teach.facts import Fact, lesson_of
from apollo_curation.teach.job import Mix, OwnAnswer, general_prompts, request_of
from apollo_curation.teach.served import ServedLearner
from apollo_curation.teach.teach import Limits, TeachFailed, teach

FACTS = [
    Fact("Who runs the night shift?", "Odalys Penrose runs the night shift."),
    Fact("Where is the spare badge?", "The spare badge is in the cocoa tin."),
]


class World:
    """Server and model in one. needed: rounds after which it knows; leaks: near misses name the fact then;
    rise: nats a token that its general answers lose by a round."""

    num_parallel = 2

    def __init__(self, needed=1, *, leaks=False, rise=0.0, job_end="applied"):
        self.needed, self.leaks, self.rise, self.job_end = needed, leaks, rise, job_end
        self.requests, self.pinned, self.restored, self.keys = [], [], [], []

    def own_answer(self, question, *, max_tokens):
        return OwnAnswer([1, 2], [3, 4], [[(3, -0.1), (5, -2.5)], [(4, 0.0)]])

    def say(self, question, *, max_tokens):
        if len(self.requests) < self.needed:
            return "I do not know."
        for fact in FACTS:
            lesson = lesson_of(fact)
            known = {fact.question, *(one.question for one in (*lesson.paraphrased, *lesson.reversed))}
            if question in known:
                return f"{fact.answer}"
            if self.leaks and question in {one.question for one in lesson.not_it}:
                return fact.answer
        return "Hello."

    def token_logprobs(self, ids):
        return [-1.0 - self.rise * len(self.requests)] * (len(ids) - 1)

    def submit(self, request, idempotency_key):
        self.requests.append(request)
        self.keys.append(idempotency_key)
        return f"job-{len(self.requests)}"

    def wait(self, job_id):
        return SimpleNamespace(job_id=job_id, state=self.job_end, error="as told")

    def sync(self):
        return SimpleNamespace(weight_version=7)

    def pin(self, weight_version):
        self.pinned.append(weight_version)

    def restore(self, weight_version):
        self.restored.append(weight_version)


def test_facts_are_trained_until_they_are_known_and_examined_before_and_after():
    world = World(needed=2)
    report = teach(FACTS, world, world, mix=Mix(), limits=Limits(min_known=1.0))
    assert (report.state, report.known, report.hits) == ("applied", 1.0, 0.0)
    assert report.jobs == ["job-1", "job-2"]
    assert len(set(world.keys)) == 2
    assert (world.pinned, world.restored) == ([7], [])
    first = report.facts[0]
    assert first.taught.before == "I do not know."
    assert [one.is_right for one in (first.taught, *first.paraphrased, *first.reversed)] == [True] * 5


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (World(needed=9), "after 3 rounds"),
        (World(leaks=True), "near misses name the fact"),
        (World(rise=0.4), "lose 0.40 nats"),
        (World(rise=float("nan")), "nats"),
    ],
)
def test_what_is_not_known_or_costs_too_much_goes_back_to_the_pinned_version(world, reason):
    report = teach(FACTS, world, world, mix=Mix(), limits=Limits())
    assert report.state == "rolled back"
    assert reason in report.reason
    assert world.restored == [7]


def test_a_job_that_fails_is_said_and_nothing_is_called_applied():
    world = World(job_end="quarantined")
    with pytest.raises(TeachFailed, match="quarantined: as told"):
        teach(FACTS, world, world, mix=Mix(), limits=Limits())


def test_every_update_has_variants_of_facts_beside_what_the_model_says_itself():
    own = OwnAnswer([1], [2], [[(2, -0.1)]])
    lessons = [lesson_of(fact) for fact in FACTS]
    request = request_of(lessons, [own], [own], Mix(num_facts=4, epochs=2), seed=0)
    size = request.options.accumulate_steps
    assert size == 6
    updates = [request.examples[at : at + size] for at in range(0, len(request.examples), size)]
    assert len(updates) == 2 * 16 / 4
    for update in updates:
        assert [one.messages is not None for one in update] == [True] * 4 + [False] * 2
        assert all(one.top_logprobs == [[(2, -0.1)]] for one in update[4:])
    trained = [one.messages[0].content for one in request.examples if one.messages]
    assert {trained.count(question) for question in trained} == {2}
    without = request_of(lessons, [], [], Mix(), seed=0)
    assert without.options.accumulate_steps == 4


def test_replay_prompts_are_many_and_each_stands_once():
    prompts = general_prompts()
    assert len(prompts) == len(set(prompts)) >= 80
    assert all(prompt.strip() == prompt and prompt for prompt in prompts)


def test_the_served_models_own_answer_keeps_its_tokens_and_their_alternatives():
    class Chat:
        def tokens(self, messages, *, add_generation_prompt):
            return [9, 8]

        def completion_logprobs(self, ids, *, max_tokens, num_logprobs):
            assert (ids, num_logprobs) == ([9, 8], 20)
            return {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": 1e-7, "token_id:6": -3.0}]}

    answer = ServedLearner(Chat()).own_answer("Q?", max_tokens=4)
    assert answer == OwnAnswer([9, 8], [5], [[(5, 0.0), (6, -3.0)]])


def test_a_model_that_says_nothing_is_not_taught(monkeypatch):
    world = World()
    monkeypatch.setattr(world, "own_answer", lambda question, max_tokens: OwnAnswer([1], [], []))
    with pytest.raises(TeachFailed, match="says nothing"):
        teach(FACTS, world, world, mix=Mix(), limits=Limits())
    assert (world.requests, world.pinned) == ([], [])
