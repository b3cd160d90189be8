"""Hindsight: what a next message says of an answer, when that is believed, and what becomes of a moment by
it."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from places import BENCHMARKS

from apollo_curation.chat_client import ModelAway, ServerRefused
from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.hindsight.better import check_better
from apollo_curation.moments.hindsight.calibration import Calibrations, calibrate, describe, measure
from apollo_curation.moments.hindsight.fit import auc, fit
from apollo_curation.moments.hindsight.samples import calibrating_samples, read_samples
from apollo_curation.moments.hindsight.score import candidates, look_back
from apollo_curation.moments.hindsight.ways import COMPLAINT, PRAISE, shown
from apollo_curation.moments.judge import approve_confident
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.store import Store
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

SAID = {sample.said_next: sample.label for sample in calibrating_samples()}


class Listener:
    """Answers as a model would that understands each sample's next message, or none: what speaks against an
    answer costs it one nat a token wherever it is in view."""

    def __init__(self, *, understands=True, name="m", is_away=False):
        self.model, self.is_away, self.num_asked = name, is_away, 0
        self._understands, self._rng = understands, random.Random(0)

    def answer_logprobs(self, context, answer, tools=None):
        self.num_asked += 1
        if self.is_away:
            raise ModelAway("nobody there")
        text = " ".join(message.content for message in context)
        if "unspeakable" in text + answer.content:
            raise ServerRefused("refused", said="no", status=400, field=None, code=None)
        return [-2.0 + self._shift(text, answer.content) + self._rng.gauss(0, 0.1)] * 4

    def _shift(self, text, said):
        if not self._understands:
            return self._rng.gauss(0, 1)
        if text in (COMPLAINT, PRAISE):
            return {("against", COMPLAINT): 1.0, ("for", PRAISE): 1.0}.get((SAID.get(said, ""), text), 0.0)
        label = next((label for known, label in SAID.items() if len(known) > 6 and known in text), None)
        return {"against": -1.0, "for": 1.0}.get(label or "", 0.0)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "curation.sqlite") as store:
        yield store


AGAINST = "No, that's wrong. It's Wellington."
NEITHER = "And of Finland?"


def moment(said_next=AGAINST, kind="correction", **changes):
    answer = Message("assistant", "The capital is Auckland.")
    values = {
        "kind": kind, "tier": "direct", "context": [Message("user", "What is the capital?")],
        "answer": answer if kind == "praise" else Message("assistant", "Wellington."),
        "original": None if kind == "praise" else answer, "aftermath": [Message("user", said_next)],
        "source": Origin("log.jsonl", 1, 0), "topic": "t", "reason": "The user objects.", "confidence": 0.5,
    }  # fmt: skip
    return Moment(**(values | changes))


def test_the_samples_are_of_three_labels_in_six_languages_and_of_coding_agents():
    samples = calibrating_samples()
    assert {sample.label for sample in samples} == {"against", "for", "neither"}
    assert {"en", "fr", "es", "ru", "zh", "de", "agent"} <= {sample.language for sample in samples}
    assert all(sample.said_next and sample.answer.content for sample in samples)
    assert any(message.tool_calls for sample in samples for message in sample.context)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[against en]\nU a\nA b\nX c\n", ":4"),
        ("U a\n", ":1"),
        ("[against en]\nU a\nA b\n", ":1"),
        ("[agianst en]\nU a\nA b\nU c\n", "samples"),
    ],
)
def test_a_file_of_samples_that_is_none_is_refused_by_line(tmp_path, text, field):
    file = tmp_path / "samples"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        calibrating_samples(file)
    assert field in (caught.value.field or "")


def test_a_curve_recovers_the_logistic_that_made_the_labels():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(1000)]
    labels = [rng.random() < 1 / (1 + math.exp(-(3 * x - 1))) for x in values]
    curve = fit(values, labels)
    assert curve.slope == pytest.approx(3, abs=0.75)  # three standard errors of 0.2 to 0.25
    assert curve.offset == pytest.approx(-1, abs=0.4)
    share = curve.num_positive / curve.num_samples
    p, low, high = curve.probability(1 / 3, share)
    assert low < p < high
    assert p == pytest.approx(0.5, abs=0.1)
    assert curve.can_tell
    # Bayes: odds after = odds before times the likelihood ratio, whatever the samples' own share was.
    odds = [curve.probability(0.5, prior)[0] for prior in (0.5, 0.9)]
    ratios = [one / (1 - one) for one in odds]
    assert ratios[1] / ratios[0] == pytest.approx(9)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_the_right_order():
    import numpy as np

    x, y = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True])
    assert auc(x, y) == (1 + 0.5 + 1 + 1) / 4
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, 200).astype(float), rng.random(200) < 0.3
    above = x[y][:, None] - x[~y][None, :]
    assert auc(x, y) == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())


def test_classes_that_are_far_apart_have_a_finite_curve():
    curve = fit([0.0] * 5 + [1.0] * 5, [False] * 5 + [True] * 5)
    assert math.isfinite(curve.slope)
    assert 0.5 < curve.probability(1.0)[0] < 1


def test_the_message_is_shown_behind_the_question_and_the_conversation_stays_valid():
    call = Message("assistant", "", tool_calls=[{"id": "c", "function": {"name": "ls", "arguments": "{}"}}])
    result = Message("tool", "ok", tool_call_id="c")
    context = [Message("system", "s"), Message("user", "q"), call, result]
    found = shown(context, "SAID" * 1000)
    assert [message.role for message in found] == ["system", "user", "assistant", "tool"]
    assert found[1].content.startswith("q\n\nThe following is a future user message.")
    assert found[1].content.count("SAID") == 250
    assert context[1].content == "q"


def test_a_model_that_understands_can_tell_and_one_that_does_not_cannot(store):
    good = calibrate(Listener(), calibrating_samples())  # pyright: ignore[reportArgumentType]
    assert good.against.curve.can_tell
    assert good.praised.curve.can_tell
    bad = calibrate(Listener(understands=False, name="b"), calibrating_samples())  # pyright: ignore[reportArgumentType]
    assert not bad.against.curve.can_tell
    assert not bad.praised.curve.can_tell
    assert "cannot tell" in describe(bad)
    table = Calibrations(store)
    table.keep(good)
    assert table.of("m") == good
    assert table.of("b") is None


def test_too_few_samples_calibrate_nothing():
    with pytest.raises(UserError, match="are needed"):
        calibrate(Listener(), calibrating_samples()[:30])  # pyright: ignore[reportArgumentType]


def test_a_candidate_that_was_spoken_against_stays_and_one_that_was_not_is_dropped(store):
    moments, model = Moments(store), Listener()
    wrong, plain = moments.add([moment(), moment(NEITHER, context=[Message("user", "Another?")])])
    assert wrong.is_candidate
    counts = look_back(store, model)  # pyright: ignore[reportArgumentType]
    assert (counts.num_scored, counts.num_for_it, counts.num_against) == (2, 1, 1)
    assert counts.calibrated == "m"
    kept = moments.get(wrong.moment_id)
    assert kept.state == "flagged"
    assert not kept.is_candidate
    assert kept.hindsight is not None
    assert kept.hindsight.probability is not None
    assert kept.hindsight.low == kept.confidence
    assert "spoke against the answer" in kept.hindsight.sentence
    gone = moments.get(plain.moment_id)
    assert (gone.state, gone.decided_by) == ("dropped", "hindsight")
    asked = model.num_asked
    assert look_back(store, model).num_scored == 0  # pyright: ignore[reportArgumentType]
    assert model.num_asked == asked  # neither calibrated nor scored again


def test_without_a_server_a_moment_stays_a_candidate_and_nothing_approves_it(store):
    moments = Moments(store)
    moments.add([moment(confidence=0.9, num_judged=1)])
    counts = look_back(store, Listener(is_away=True))  # pyright: ignore[reportArgumentType]
    assert (counts.num_scored, counts.num_away, counts.problem) == (0, 1, "nobody there")
    assert [one.is_candidate for one in moments.list("flagged")] == [True]
    for only_judged in (False, True):
        assert approve_confident(moments, 0.5, only_judged=only_judged) == []


def test_of_a_model_that_cannot_tell_only_what_a_judge_has_read_is_approved(store):
    moments = Moments(store)
    moments.add([moment(confidence=0.9)])
    counts = look_back(store, Listener(understands=False))  # pyright: ignore[reportArgumentType]
    assert (counts.num_scored, counts.num_untold) == (1, 1)
    assert approve_confident(moments, 0.5, only_judged=False) == []
    (one,) = moments.list("flagged")
    assert one.hindsight is not None
    assert "cannot tell" in one.hindsight.sentence
    moments.change(one.moment_id, num_judged=1)
    assert len(approve_confident(moments, 0.5, only_judged=True)) == 1


def test_what_the_server_cannot_score_stays_a_candidate_and_the_next_one_has_its_turn(store):
    moments = Moments(store)
    moments.add([moment("unspeakable", context=[Message("user", "unspeakable")], confidence=0.9), moment()])
    counts = look_back(store, Listener())  # pyright: ignore[reportArgumentType]
    assert (counts.num_scored, counts.num_refused) == (1, 1)
    assert sorted(one.is_candidate for one in moments.list("flagged")) == [False, True]


def test_candidates_are_what_rests_on_a_users_words_the_surest_first(store):
    moments = Moments(store)
    calls = [{"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]
    other = Message("assistant", "", tool_calls=calls)
    moments.add(
        [
            moment(confidence=0.5),
            moment("perfect", kind="praise", confidence=0.7, context=[Message("user", "Praised?")]),
            moment(kind="error_then_fix", answer=other, original=other),
            moment(is_told=True, context=[Message("user", "Told?")]),
        ]
    )
    assert [one.kind for one in candidates(moments)] == ["praise", "correction"]


@pytest.mark.parametrize(("gain", "is_kept"), [(0.5, True), (-3.0, False)])
def test_a_better_answer_against_which_the_message_speaks_no_less_is_set_aside(store, gain, is_kept):
    class Gaining(Listener):
        """The better answer gains by the message in view."""

        def _shift(self, text, said):
            return (
                gain * ("future user message" in text) if "Wellington" in said else super()._shift(text, said)
            )

    good = calibrate(Listener(), calibrating_samples())  # pyright: ignore[reportArgumentType]
    by_answers = msgspec.structs.replace(good, against=msgspec.structs.replace(good.against, way="question"))
    Calibrations(store).keep(by_answers)
    moments, model = Moments(store), Gaining()
    (added,) = moments.add([moment()])
    look_back(store, model)  # pyright: ignore[reportArgumentType]
    counts = check_better(store, model)  # pyright: ignore[reportArgumentType]
    assert (counts.num_checked, counts.num_set_aside) == (1, not is_kept)
    found = moments.get(added.moment_id)
    assert (found.answer is not None) == is_kept
    assert found.teaches
    assert found.moves_away != is_kept
    assert ("set aside" in found.decided_reason) != is_kept
    assert check_better(store, model).num_checked == 0  # pyright: ignore[reportArgumentType]


def test_the_labelled_reactions_of_the_benchmark_share_nothing_with_the_samples():
    tests = read_samples(BENCHMARKS / "reactions_test.txt")
    assert len(tests) > 200
    own = {(sample.context[-1].content, sample.said_next) for sample in calibrating_samples()}
    assert not own & {(sample.context[-1].content, sample.said_next) for sample in tests}


def test_a_measure_is_two_passes_or_three():
    model = Listener()
    args = ([Message("user", "q")], Message("assistant", "a"), AGAINST)
    measure(model, "question", *args)  # pyright: ignore[reportArgumentType]
    assert model.num_asked == 2
    measure(model, "message", *args)  # pyright: ignore[reportArgumentType]
    assert model.num_asked == 5
