"""The review: decisions are kept at once and never overwrite another's; its screen."""

from __future__ import annotations

import io
import json

import pytest
from review_moments import CALL, RIGHT, WRONG, editor, moment, screen, states
from rich.console import Console

from apollo_curation.moments.moments import Moments
from apollo_curation.moments.review import Review, approve, edited, reject
from apollo_curation.moments.review_screen import run
from apollo_curation.moments.review_view import diff, printable, view
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message


def test_every_key_does_what_it_says_and_at_once(store, moments, tmp_path):
    review = Review(store, moments, "ada")
    screen(review, "a\nr it was a joke\ne\ns\n", EDITOR=editor(tmp_path, "Forty-two.\n"))
    one, two, three, four = moments.list()
    assert (one.state, one.decided_by, one.answer, one.surprise) == ("approved", "person", RIGHT, 2.0)
    assert (two.state, two.decided_reason) == ("rejected", "it was a joke")
    assert (three.state, three.answer) == ("approved", Message("assistant", "Forty-two."))
    assert three.surprise is None  # it was measured of another answer
    assert four.state == "flagged"
    assert review.decided == {"approved": 1, "rejected": 1, "edited": 1, "skipped": 1}


def test_the_screen_shows_what_was_said_what_would_be_learned_and_why(store, moments):
    shown = screen(Review(store, moments, "ada"), "q\n")
    for text in (
        "Question 1?",
        "It is [-41-]{+42+}.",
        "The user objects.",
        "0.50",
        "2.00 nats",
        "log.jsonl:1",
    ):
        assert text in shown
    assert "4 left" in shown


def test_quitting_and_coming_back_goes_on_behind_what_was_skipped(store, moments):
    screen(Review(store, moments, "ada"), "s\na\nq\n")
    again = Review(store, moments, "ada")
    order = []
    while again.current is not None:
        order.append(again.current.source.number)
        again.skip()
    assert order == [3, 4, 1]
    assert Review(store, moments, "bob").current.source.number == 1  # each has a place of his own


def test_back_shows_a_decision_again_and_it_can_be_changed(store, moments):
    screen(Review(store, moments, "ada"), "a\nb\nr no\nq\n")
    assert states(moments) == ["rejected", "flagged", "flagged", "flagged"]
    assert "this is the first one" in screen(Review(store, moments, "bob"), "b\nq\n")


def test_what_is_being_trained_cannot_be_taken_back_by_going_back(store, moments):
    review = Review(store, moments, "ada")
    review.approve(review.current)
    moments.change(moments.list()[0].moment_id, state="training")
    review.back()
    assert "that cannot be changed" in screen(review, "r\nq\n")
    assert states(moments)[0] == "training"


def test_the_second_of_two_reviewers_is_told_and_overwrites_nothing(store, moments):
    ada, bob = Review(store, moments, "ada"), Review(store, moments, "bob")
    shown = bob.current
    assert shown == ada.current
    ada.reject(ada.current, "wrong")
    with pytest.raises(UserError, match="is rejected, not flagged"):
        bob.approve(shown)
    assert moments.get(shown.moment_id).decided_reason == "wrong"


def test_the_screen_goes_on_where_another_reviewer_was_faster(store, moments):
    review = Review(store, moments, "ada")
    other = Review(store, moments, "bob")

    class Faster(io.StringIO):
        def readline(self, *_):
            if other.decided.total() == 0:
                other.reject(other.current)
            return super().readline()

    out = io.StringIO()
    run(review, Console(file=out, width=200), Faster("a\na\nq\n"))
    assert "is rejected, not flagged" in out.getvalue()
    assert states(moments) == ["rejected", "approved", "flagged", "flagged"]
    assert review.decided == {"decided meanwhile": 1, "approved": 1}


def test_what_is_approved_is_what_was_shown(store, moments):
    review = Review(store, moments, "ada")
    shown = review.current
    moments.change(shown.moment_id, answer=Message("assistant", "The judge's, later."))
    assert review.approve(shown).answer == RIGHT


def test_moments_that_come_meanwhile_are_shown_too(store, moments):
    review = Review(store, moments, "ada")
    moments.add([moment(5)])
    for _ in range(4):
        review.skip()
    assert review.current.source.number == 5


def test_a_refusal_without_an_answer_cannot_be_approved_a_correction_moves_away_from_the_wrong_one(
    store, tmp_path
):
    table = Moments(store)
    table.add([moment(2, answer=None)])
    assert "it becomes less likely" in screen(Review(store, table, "ada"), "a\nq\n")
    (away,) = table.list("approved")
    assert away.example().label is False
    assert away.example().messages[-1].content == "It is 41."
    table.change(away.moment_id, state="trained")
    table.add([moment(1, answer=None, kind="wrong_refusal")])
    review = Review(store, table, "ada")
    assert "has no answer to learn" in screen(review, "a\nq\n")
    screen(review, "e\n", VISUAL=editor(tmp_path, "It is 42."))
    assert table.list("approved")[0].answer == RIGHT


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("false", "Editing failed"),
        ("no-such-editor", "Editing failed"),
        ("true", "nothing was changed"),
    ],
)
def test_an_editor_that_fails_or_changes_nothing_decides_nothing(store, moments, command, said):
    assert said in screen(Review(store, moments, "ada"), "e\nq\n", VISUAL=command)
    assert states(moments) == ["flagged"] * 4


def test_an_edited_answer_is_text_or_a_message_in_json():
    assert edited("  Two\nlines.\n", WRONG) == Message("assistant", "Two\nlines.")
    assert edited('{"a": 1}', WRONG) == Message("assistant", '{"a": 1}')  # JSON as an answer is text, too
    call = json.dumps({"role": "assistant", "content": "", "tool_calls": CALL.tool_calls})
    assert edited(call, CALL) == CALL
    for text in ("", "ls -l", '{"role": "user", "content": "x"}', '{"role": "assistant", "content": ""}',
                 '{"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}'):  # fmt: skip
        with pytest.raises(UserError):
            edited(text, CALL)


def test_a_failed_moment_may_be_approved_again_but_not_a_trained_one(moments):
    one, two, *_ = moments.list()
    moments.change(one.moment_id, state="failed")
    moments.change(two.moment_id, state="trained")
    assert approve(moments, moments.get(one.moment_id)).state == "approved"
    for decide in (approve, reject):
        with pytest.raises(UserError, match="cannot be changed"):
            decide(moments, moments.get(two.moment_id))


def test_the_diff_is_coloured_on_a_terminal_and_marked_elsewhere():
    plain = diff("It is 41.", "It is 42, I think.", has_colour=False).plain
    assert plain == "It is [-41-]{+42, I think+}."
    coloured = diff("It is 41.", "It is 42.", has_colour=True)
    assert coloured.plain == "It is 4142."
    assert {(coloured.plain[span.start : span.end], span.style) for span in coloured.spans} == {
        ("41", "red strike"),
        ("42", "green bold"),
    }


def test_a_transcript_cannot_command_the_terminal():
    assert printable("\x1b[2J\x07a\nb\u202e") == "\\u001b[2J\\u0007a\nb\\u202e"
    out = io.StringIO()
    evil = moment(1, context=[Message("user", "\x1b]0;owned\x07")], reason="\x1b[31m", topic="\x1b[5m")
    Console(file=out, width=100).print(view(evil, whole=True, has_colour=False))
    assert "\x1b" not in out.getvalue()
    assert "owned" in out.getvalue()


def test_a_call_is_shown_as_a_call():
    out = io.StringIO()
    Console(file=out, width=100).print(view(moment(1, original=CALL, answer=CALL), has_colour=False))
    assert 'ls({"p": 1})' in out.getvalue()
