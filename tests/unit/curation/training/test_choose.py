"""Choosing: what is trained, in which order, and why the rest is left."""

from __future__ import annotations

import itertools
import random
import time

import msgspec
import pytest
from batch_fixtures import moment

from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment, Moments, example_digest
from apollo_curation.settings import Curation, CurationConfig, DirectTier
from apollo_curation.store import Store
from apollo_curation.teach.job import ANSWER_TOKENS, OwnAnswer
from apollo_curation.training.batch_table import BatchTable
from apollo_curation.training.choose import Choice, by_value, choose
from apollo_curation.training.near_duplicates import NearDuplicates, shingles, similarity
from apollo_curation.training.replay import MAX_CONTEXT_TOKENS, held_request
from apollo_ipc.config import Http
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import Message, TrainRequest

NOW = 1_000_000.0
WORDS = [f"word{i}" for i in range(400)]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "curation.sqlite") as store:
        yield store


def configured(max_examples: int = 100, **curation) -> CurationConfig:
    wide = {"max_source_share": 1.0, "max_topic_share": 1.0, "max_examples_per_window": 1000, **curation}
    return msgspec.structs.replace(
        CurationConfig(), curation=Curation(**wide), tier_direct=DirectTier(max_examples=max_examples)
    )


def distinct(num: int, **changes) -> list[Moment]:
    """Moments that have no three words in common, with ids, as a store would have them."""
    found = []
    for i in range(num):
        text = " ".join(f"{word}-{i}" for word in ("alpha", "beta", "gamma", "delta"))
        facts = {"moment_id": f"m-{i:04}", "created_at": float(i), **changes}
        found.append(moment(text, context=[Message("user", f"ask{i} about{i} this{i}")], **facts))
    return found


def ids(moments: list[Moment]) -> list[str]:
    return [one.moment_id for one in moments]


def left(choice: Choice) -> dict[str, list[str]]:
    return {reason: ids(moments) for reason, moments in choice.left.items()}


def train(store: Store, moments: list[Moment], *, state="trained", ended_at: float = NOW, **changes) -> str:
    """As if a batch of them had been trained."""
    kept = Moments(store).add(moments)
    table = BatchTable(store)
    batch_id = f"batch-{len(table.list())}"
    table.add("direct", kept, TrainRequest([one.example() for one in kept]), batch_id)
    table.change(batch_id, state=state, ended_at=ended_at, created_at=ended_at, **changes)
    for one in kept:
        Moments(store).change(one.moment_id, state=state, batch_id=batch_id)
    return batch_id


def test_what_cannot_or_need_not_be_learned_is_left_with_the_reason(store):
    a, b, c, d = distinct(4)
    silent = msgspec.structs.replace(a, answer=None)
    known = msgspec.structs.replace(b, surprise=0.4)
    at_limit = msgspec.structs.replace(c, surprise=0.5)
    other_tier = msgspec.structs.replace(distinct(5)[4], tier="dream")
    choice = choose(
        [silent, known, at_limit, d, other_tier], store, "direct", configured(min_surprise=0.5), NOW
    )
    assert set(ids(choice.chosen)) == {c.moment_id, d.moment_id}  # not measured: it passes
    assert left(choice) == {"no answer": [a.moment_id], "known already": [b.moment_id]}


def test_corrections_without_an_answer_move_away_from_the_wrong_one_in_a_job_of_their_own(store):
    a, b, c, d = distinct(4, original=Message("assistant", "a wrong one"))
    away = [msgspec.structs.replace(one, answer=None, confidence=0.5) for one in (c, d)]
    first = choose([a, b, *away], store, "direct", configured(), NOW)
    assert set(ids(first.chosen)) == {a.moment_id, b.moment_id}
    assert left(first) == {"other loss": [c.moment_id, d.moment_id]}
    train(store, first.chosen)
    second = choose(away, store, "direct", configured(), NOW)
    assert set(ids(second.chosen)) == {c.moment_id, d.moment_id}
    examples = [one.example() for one in second.chosen]
    assert [one.label for one in examples] == [False, False]
    assert [one.messages[-1].content for one in examples] == ["a wrong one"] * 2
    train(store, second.chosen)
    assert left(choose(away, store, "direct", configured(), NOW)) == {
        "trained before": [c.moment_id, d.moment_id]
    }


def test_the_most_surprising_and_most_confident_come_first(store):
    facts = [(2.0, 0.5), (0.5, 1.0), (3.0, 0.9), (None, 0.9), (2.0, 0.25)]
    moments = [
        msgspec.structs.replace(one, surprise=surprise, confidence=confidence)
        for one, (surprise, confidence) in zip(distinct(5), facts, strict=True)
    ]
    # Values 1, 0.5, 2.7, 1.8 (the median surprise is 2) and 0.5, of which the older one is first.
    assert ids(by_value(moments[::-1])) == ["m-0002", "m-0003", "m-0000", "m-0001", "m-0004"]
    choice = choose(moments[::-1], store, "direct", configured(max_examples=3), NOW)
    assert ids(choice.chosen) == ["m-0000", "m-0002", "m-0003"]  # of these the order says nothing


def test_the_order_of_the_moments_changes_nothing(store):
    moments = [
        msgspec.structs.replace(
            one, source=Origin(f"log{i % 3}", i, 0), topic=f"t{i % 4}", surprise=float(i % 5)
        )
        for i, one in enumerate(distinct(40))
    ]
    config = configured(max_examples=12, max_source_share=0.4, max_topic_share=0.3)
    first = choose(moments, store, "direct", config, NOW)
    for seed in range(3):
        shuffled = random.Random(seed).sample(moments, len(moments))
        assert choose(shuffled, store, "direct", config, NOW) == first


def test_equal_content_is_trained_once_whatever_moment_it_comes_from(store):
    a, b = distinct(2)
    twin = msgspec.structs.replace(a, moment_id="m-twin", created_at=9.0, source=Origin("other", 1, 0))
    choice = choose([twin, a, b], store, "direct", configured(near_duplicate=0.0), NOW)
    assert (ids(choice.chosen), left(choice)) == (["m-0000", "m-0001"], {"duplicate": ["m-twin"]})
    train(store, [a])
    choice = choose([twin, b], store, "direct", configured(near_duplicate=0.0), NOW)
    assert (ids(choice.chosen), left(choice)) == (["m-0001"], {"trained before": ["m-twin"]})


@pytest.mark.parametrize(
    ("state", "is_known"),
    [("trained", True), ("training", True), ("failed", False), ("undone", False), ("dropped", False)],
)
def test_content_counts_as_trained_while_it_is_in_the_weights_or_on_its_way(store, state, is_known):
    (a,) = distinct(1)
    train(store, [a])
    Moments(store).change(Moments(store).list()[0].moment_id, state=state)
    choice = choose([a], store, "direct", configured(near_duplicate=0.0), NOW)
    assert bool(choice.left.get("trained before")) == is_known


def test_the_same_words_with_another_role_or_tool_are_another_example():
    examples = [
        moment("yes").example(),
        moment("yes", tools=[{"type": "function", "function": {"name": "f"}}]).example(),
        moment("yes", context=[Message("tool", "Question before yes?")]).example(),
    ]
    assert len({example_digest(one) for one in examples}) == 3
    assert example_digest(moment("yes", topic="other", reason="other").example()) == example_digest(
        examples[0]
    )


def test_nearly_the_same_is_trained_once_and_by_the_more_valuable(store):
    said = " ".join(WORDS[:60])
    a = moment(said, moment_id="m-a", confidence=0.5)
    b = moment(f"{said} indeed", moment_id="m-b", context=a.context, confidence=0.9)
    c = moment(" ".join(WORDS[60:120]), moment_id="m-c", confidence=0.7)
    choice = choose([a, b, c], store, "direct", configured(), NOW)
    assert (ids(choice.chosen), left(choice)) == (["m-b", "m-c"], {"near duplicate": ["m-a"]})
    assert not choose([a, b, c], store, "direct", configured(near_duplicate=0.0), NOW).left


def test_nearly_what_was_trained_lately_is_left_and_after_a_while_it_is_not(store):
    said = " ".join(WORDS[:60])
    train(store, [moment(said, context=[Message("user", "ask")])])
    again = moment(f"{said} indeed", moment_id="m-again", context=[Message("user", "ask")])
    config = configured()
    choice = choose([again], store, "direct", config, NOW + 3 * config.curation.window_s)
    assert left(choice) == {"near duplicate": ["m-again"]}
    choice = choose([again], store, "direct", config, NOW + 8 * config.curation.window_s)
    assert ids(choice.chosen) == ["m-again"]


def test_two_moments_of_one_conversation_are_not_one_because_they_share_its_beginning(store):
    shared = [Message("user", " ".join(WORDS)), Message("assistant", "Good."), Message("user", "And blue?")]
    a = moment("Blue it is, as the sky.", moment_id="m-a", context=shared)
    b = moment(
        "Green would be wrong here.",
        moment_id="m-b",
        context=[*shared, Message("assistant", "x"), Message("user", "Green perhaps?")],
    )
    assert len(choose([a, b], store, "direct", configured(), NOW).chosen) == 2


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.85, 1.0])
def test_near_duplicates_are_those_that_comparing_every_pair_finds(threshold):
    """Nothing is found in vain, and nothing missed."""
    dice = random.Random(7)
    texts = []
    for _ in range(30):
        base = dice.choices(WORDS, k=40)
        texts.append(base)
        for num_changed in (0, 1, 2, 4, 8):
            texts.append([dice.choice(WORDS) if i < num_changed else word for i, word in enumerate(base)])
    moments = [moment(" ".join(text), moment_id=f"m-{i}", context=[]) for i, text in enumerate(texts)]
    near = NearDuplicates(threshold)
    num_found = 0
    kept: list[Moment] = []
    for one in moments:
        own = shingles(one)
        best = max((similarity(own, shingles(other)) for other in kept), default=0.0)
        found = near.find(one)
        assert (found is not None) == (best >= threshold)
        num_found += found is not None
        near.add(one)
        kept.append(one)
    assert 0 < num_found < len(moments)


def test_texts_of_one_or_two_words_are_compared_too():
    near = NearDuplicates(0.85)
    near.add(moment("Yes", moment_id="m-a", context=[]))
    assert near.find(moment("yes!", moment_id="m-b", context=[])) == "m-a"
    assert near.find(moment("No", moment_id="m-c", context=[])) is None
    assert near.find(moment("", moment_id="m-d", context=[])) is None


@pytest.mark.parametrize(("share", "places", "wanted"), [(0.5, 10, 5), (0.5, 3, 1), (0.1, 4, 1), (1.0, 4, 4)])
def test_a_file_or_topic_takes_its_share_of_the_places_and_at_least_one(store, share, places, wanted):
    moments = distinct(20)
    for name, reason in (("max_source_share", "source share"), ("max_topic_share", "topic share")):
        choice = choose(moments, store, "direct", configured(places, **{name: share}), NOW)
        assert len(choice.chosen) == wanted
        if wanted < places:
            assert len(choice.left[reason]) == 20 - wanted


def test_a_loud_file_does_not_push_a_quiet_one_out(store):
    loud = [msgspec.structs.replace(one, surprise=9.0, topic=one.moment_id) for one in distinct(50)]
    quiet = [
        msgspec.structs.replace(one, moment_id=f"m-q{i}", surprise=1.0, source=Origin("quiet", i, 0))
        for i, one in enumerate(distinct(54)[50:])
    ]
    choice = choose([*loud, *quiet], store, "direct", configured(10, max_source_share=0.5), NOW)
    sources = [one.source.path for one in choice.chosen]
    assert (sources.count("log.jsonl"), sources.count("quiet")) == (5, 4)


def test_a_few_moments_of_one_file_are_trained_in_one_job_with_the_defaults(store):
    config = CurationConfig()
    choice = choose(distinct(3), store, "direct", config, NOW)
    assert len(choice.chosen) == 3


def test_a_job_takes_no_more_than_the_tier_and_the_caller_say(store):
    choice = choose(distinct(9), store, "direct", configured(6), NOW)
    assert (len(choice.chosen), len(choice.left["job full"])) == (6, 3)
    choice = choose(distinct(9), store, "direct", configured(6), NOW, limit=2)
    assert (ids(choice.chosen), len(choice.left["job full"])) == (["m-0000", "m-0001"], 7)
    assert len(choose(distinct(9), store, "direct", configured(6), NOW, limit=20).chosen) == 6
    # A person who asks for two of one file gets two: shares are of the job, not of what a person asks for.
    halved = configured(6, max_source_share=0.5)
    assert len(choose(distinct(9), store, "direct", halved, NOW, limit=2).chosen) == 2


def test_the_window_gives_out_what_batches_really_trained_have_left_of_it(store):
    config = configured(window_s=100.0, max_examples_per_window=10)
    lot = iter(distinct(100))

    def some(num: int) -> list[Moment]:
        return list(itertools.islice(lot, num))

    train(store, some(4), ended_at=NOW - 101)  # before the window
    train(store, some(3), ended_at=NOW - 50)
    train(store, some(5), ended_at=NOW - 40, state="failed")  # before its first step
    train(
        store,
        some(2),
        ended_at=NOW - 30,
        job=JobInfo("job", 1, "applied", NOW, 2, 1, steps_done=1, num_skipped=1),
    )
    train(store, some(1), ended_at=NOW - 20, state="undone")  # it was trained, all the same
    candidates = some(8)
    choice = choose(candidates, store, "direct", config, NOW)
    assert (len(choice.chosen), len(choice.left["window budget"])) == (10 - 3 - 1 - 1, 3)
    train(store, some(9), ended_at=NOW - 10)
    choice = choose(candidates, store, "direct", config, NOW)
    assert (choice.chosen, len(choice.left["window budget"])) == ([], 8)
    assert len(choose(candidates, store, "direct", config, NOW + 200).chosen) == 8


def test_a_job_stays_below_what_the_server_takes_as_a_body(store):
    config = msgspec.structs.replace(
        configured(near_duplicate=0.0), http=Http(max_body_bytes=10_000), tier_direct=DirectTier(hold=0)
    )
    moments = [
        msgspec.structs.replace(one, answer=Message("assistant", f"{i} " * size))
        for i, (one, size) in enumerate(zip(distinct(4), (1500, 1500, 1500, 5000), strict=True))
    ]
    choice = choose(moments, store, "direct", config, NOW)
    assert (len(choice.chosen), left(choice)) == (2, {"too large": ["m-0003"], "job full": ["m-0002"]})
    assert len(msgspec.json.encode([one.example() for one in choice.chosen])) < 8_000


def test_a_job_leaves_room_for_what_is_held_beside_in_every_pass(store):
    limit = 250_000
    config = msgspec.structs.replace(configured(), http=Http(max_body_bytes=limit))
    choice = choose(distinct(4), store, "direct", config, NOW)
    assert (len(choice.chosen), list(choice.left)) == (2, ["job full"])
    row = [(150_000 + i, -12.3456789012345678) for i in range(20)]  # as long as they come
    longest = OwnAnswer([150_000] * MAX_CONTEXT_TOKENS, [150_000] * ANSWER_TOKENS, [row] * ANSWER_TOKENS)
    request = held_request([one.example() for one in choice.chosen], [longest], config.tier_direct, 0)
    assert limit / 2 < len(msgspec.json.encode(request)) < limit


def test_choosing_among_thousands_takes_seconds(store):
    dice = random.Random(1)
    many = [
        moment(" ".join(dice.choices(WORDS, k=60)), moment_id=f"m-{i}", surprise=dice.random())
        for i in range(3000)
    ]
    started = time.process_time()
    choice = choose(many, store, "direct", configured(200), NOW)
    assert len(choice.chosen) == 200
    assert time.process_time() - started < 10
