"""The review: decisions are kept at once and never overwrite another's; its screen, its commands."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from apollo_ipc.cli import curate_flag, curate_review
from apollo_ipc.curation.conversation import Source
from apollo_ipc.curation.moments import Moment, Moments
from apollo_ipc.curation.review import Review, approve, edited, reject
from apollo_ipc.curation.review_screen import Keys, run
from apollo_ipc.curation.review_view import diff, printable, view
from apollo_ipc.curation.store import Store, store_path
from apollo_ipc.demo import planted
from apollo_ipc.demo.scripted_model import ScriptedModel
from apollo_ipc.errors import UserError
from apollo_ipc.requests import Message

WRONG, RIGHT = Message("assistant", "It is 41."), Message("assistant", "It is 42.")
FUNCTION = {"name": "ls", "arguments": '{"p": 1}'}
CALL = Message("assistant", "", tool_calls=[{"id": "c", "function": FUNCTION}])


def moment(number, **changes):
    values = {
        "kind": "correction", "tier": "direct", "context": [Message("user", f"Question {number}?")],
        "answer": RIGHT, "source": Source("log.jsonl", number, 0), "topic": "t",
        "reason": "The user objects.",
        "confidence": 0.5, "original": WRONG, "created_at": float(number), "surprise": 2.0,
    }  # fmt: skip
    return Moment(**(values | changes))


@pytest.fixture
def store(config):
    with Store(store_path(config)) as store:
        yield store


@pytest.fixture
def moments(store):
    table = Moments(store)
    table.add(moment(i) for i in (1, 2, 3, 4))
    return table


def states(moments):
    return [one.state for one in moments.list()]


def screen(review, lines, **environ):
    """What a review on a pipe shows."""
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False, markup=False)
    with Keys(io.StringIO(lines)) as keys:
        run(review, console, keys, environ)
    return out.getvalue()


def editor(tmp_path, text):
    """The command of an editor that writes `text` whatever it is given."""
    script = tmp_path / "editor.py"
    script.write_text(f"import sys; open(sys.argv[1], 'w').write({text!r})")
    return f"{sys.executable} {script}"


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

    class Faster(Keys):
        def read(self):
            if other.decided.total() == 0:
                other.reject(other.current)
                return "a", ""
            return super().read()

    out = io.StringIO()
    run(review, Console(file=out, width=200), Faster(io.StringIO("a\nq\n")), {})
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


def test_without_an_answer_there_is_nothing_to_approve(store, tmp_path):
    table = Moments(store)
    table.add([moment(1, answer=None)])
    review = Review(store, table, "ada")
    assert "has no answer to learn" in screen(review, "a\nq\n")
    screen(review, "e\n", VISUAL=editor(tmp_path, "It is 42."))
    assert table.list()[0].answer == RIGHT


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (None, "set EDITOR"),
        ("false", "ended with 1"),
        ("no-such-editor", "cannot run"),
        ("true", "nothing was changed"),
    ],
)
def test_an_editor_that_fails_or_changes_nothing_decides_nothing(store, moments, command, said):
    environ = {} if command is None else {"EDITOR": command}
    assert said in screen(Review(store, moments, "ada"), "e\nq\n", **environ)
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


SCREEN = "import typer; from apollo_ipc.cli.curate_review import review; typer.run(review)"


class Terminal:
    """A command in a pseudo-terminal, as a person meets it."""

    def __init__(self, arguments, environ):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(arguments[0], arguments, environ)
        self.shown = ""

    def wait_for(self, text, timeout_s=20.0):
        """Everything up to and with `text`, which is taken out of what was shown."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            if not select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come, but {self.shown!r}")
            try:
                new = os.read(self.fd, 65536)
            except OSError:
                new = b""
            if not new:
                raise AssertionError(f"ended before {text!r}: {self.shown!r}")
            self.shown += new.decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def press(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        while True:  # or the child waits for somebody to read
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_person_reviews_in_a_terminal(moments, environment, tmp_path):
    environ = dict(os.environ) | {
        "TERM": "xterm-256color",
        "EDITOR": editor(tmp_path, "Forty-two."),
        "COLUMNS": "100",
    }
    terminal = Terminal([sys.executable, "-c", SCREEN], environ)
    first = terminal.wait_for("[q] quit")
    assert "Question 1?" in first
    assert "\x1b[9;31m41" in first.replace("\x1b[31;9m", "\x1b[9;31m")  # in red and struck through
    assert "4 left" in first
    terminal.press("\x1bOq")  # a key of the number pad is no answer, and no `q`
    terminal.wait_for("none of")
    terminal.press("a")
    terminal.wait_for("Question 2?")
    assert states(moments) == [
        "approved",
        "flagged",
        "flagged",
        "flagged",
    ]  # kept before anything else is done
    terminal.wait_for("[q] quit")
    terminal.press("r")
    terminal.wait_for("why?")
    terminal.press("a joke\n")
    terminal.wait_for("Question 3?")
    terminal.wait_for("[q] quit")
    terminal.press("e")
    terminal.wait_for("Question 4?")
    terminal.wait_for("[q] quit")
    terminal.press("q")
    terminal.wait_for("1 flagged are left")
    assert terminal.end() == 0
    one, two, three, four = moments.list()
    assert [one.state, two.state, three.state, four.state] == ["approved", "rejected", "approved", "flagged"]
    assert two.decided_reason == "a joke"
    assert three.answer == Message("assistant", "Forty-two.")


def test_ctrl_c_leaves_the_terminal_as_it_was_and_the_decisions_kept(moments, environment):
    terminal = Terminal([sys.executable, "-c", SCREEN], dict(os.environ) | {"TERM": "xterm"})
    before = termios.tcgetattr(terminal.fd)
    terminal.wait_for("[q] quit")
    assert termios.tcgetattr(terminal.fd) != before  # keys come as they are pressed
    terminal.press("a")
    terminal.wait_for("Question 2?")
    terminal.wait_for("[q] quit")
    terminal.press("\x03")
    terminal.wait_for("1 approved; 3 flagged are left")
    assert termios.tcgetattr(terminal.fd) == before
    assert terminal.end() != 0
    assert states(moments) == ["approved", "flagged", "flagged", "flagged"]


@pytest.fixture
def curate(environment, tmp_path, monkeypatch):
    app = typer.Typer()
    app.command()(curate_flag.flag)
    for command in (curate_review.judge, curate_review.score, curate_review.show, curate_review.review):
        app.command()(command)
    app.command()(curate_review.approve)
    app.command()(curate_review.reject)
    app.command("moments")(curate_review.list_moments)
    monkeypatch.chdir(tmp_path)

    def curate(*arguments, stdin="", code=0):
        done = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout

    return curate


def test_from_a_log_to_a_decision_on_the_command_line(curate, tmp_path, monkeypatch):
    planted.write(planted.stream(0), tmp_path / "log.jsonl")
    taken = json.loads(curate("flag", tmp_path / "log.jsonl", "--json"))
    assert taken["num_added"] > 30
    assert json.loads(curate("flag", tmp_path / "log.jsonl", "--json"))["num_conversations"] == 0
    again = json.loads(curate("flag", tmp_path / "log.jsonl", "--all", "--json"))
    assert (again["num_added"], again["num_known"]) == (0, taken["num_added"])
    verdict = {"reason": "so", "verdict": "learn", "confidence": 0.9, "better_answer": ""}
    with ScriptedModel(lambda body: verdict) as server:
        monkeypatch.setenv("APOLLO_JUDGE__URL", server.url)
        done = json.loads(curate("judge", "--limit", 5, "--auto", "--json"))
    assert done["counts"]["num_judged"] == 5
    assert len(done["approved"]) + done["counts"]["num_answers_refused"] == 5
    found = json.loads(curate("moments", "--state", "flagged", "--json"))
    one = next(one for one in found if one["answer"])
    first = one["moment_id"]
    assert first in curate("moments", "--kind", one["kind"])
    assert one["reason"] in curate("show", first).replace("\n", " ")
    assert json.loads(curate("show", first, "--json")) == one
    assert curate("reject", first, "--reason", "no") == f"{first}: rejected\n"
    curate("approve", first, "m-unknown", code=2)
    assert json.loads(curate("show", first, "--json"))["state"] == "approved"
    assert "1 rejected" in curate("review", stdin="r no\nq\n")


def test_a_judge_or_model_that_is_away_has_an_exit_status_of_its_own(curate, moments, monkeypatch):
    monkeypatch.setenv("APOLLO_CURATION__URL", "http://127.0.0.1:9")
    monkeypatch.setenv("APOLLO_CURATION__PATIENCE_S", "0")
    assert "0 judged" in curate("judge", code=69)
    assert json.loads(curate("score", "--again", "--json", code=69))["num_away"] == 4
    assert states(moments) == ["flagged"] * 4


def test_a_judge_that_is_switched_off_is_not_asked(curate, moments, monkeypatch):
    monkeypatch.setenv("APOLLO_JUDGE__ENABLED", "false")
    curate("judge", code=1)
    monkeypatch.setenv("APOLLO_CURATION__AUTO_CONFIDENCE", "0.5")
    assert "4 approved" in curate("review", "--auto")


def test_logs_that_are_followed_bring_moments_as_they_come(environment, config, tmp_path):
    log = tmp_path / "log.jsonl"
    planted.write(planted.stream(0)[:60], log)
    code = "import typer; from apollo_ipc.cli.curate_flag import flag; typer.run(flag)"
    command = [sys.executable, "-c", code, str(log), "--follow", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        planted.write(planted.stream(0), tmp_path / "more.jsonl")
        lines = (tmp_path / "more.jsonl").read_text().splitlines(keepends=True)
        with log.open("a") as file:
            file.writelines(lines[60:])
        second = json.loads(process.stdout.readline())
        process.terminate()
        last = json.loads(process.stdout.read())
        assert process.wait(20) == 0
    assert first["num_conversations"] == 60
    assert second["num_conversations"] == len(lines)
    assert last["num_added"] == second["num_added"] > first["num_added"] > 0
