"""The commands around a review: flag, judge, status, approve, reject."""

from __future__ import annotations

import json
import subprocess
import sys

import planted
import pytest
import typer
from review_moments import states
from typer.testing import CliRunner

from apollo_curation.cli import curate_input, curate_review, curate_status
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.moments.moments import Hindsight


@pytest.fixture
def curate(environment, tmp_path, monkeypatch):
    app = typer.Typer()
    for command in (curate_input.flag, curate_review.judge, curate_review.review, curate_status.status):
        app.command()(command)
    app.command()(curate_review.approve)
    app.command()(curate_review.reject)
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
        monkeypatch.setenv("APOLLO_CURATION__URL", "http://127.0.0.1:9")  # who is not there to be measured
        monkeypatch.setenv("APOLLO_CURATION__PATIENCE_S", "0")
        done = json.loads(curate("judge", "--limit", 5, "--auto", "--json", code=69))
    assert done["counts"]["num_judged"] == 5
    # The served model is away: what rests on a user's words stays a candidate, whatever the judge says.
    assert done["hindsight"]["num_away"] > 0
    approved = [json.loads(curate("status", one, "--json"))[0] for one in done["approved"]]
    assert {one["kind"] for one in approved} <= {"error_then_fix"}
    assert done["scored"]["num_away"] > 0
    found = json.loads(curate("status", "--state", "flagged", "--json"))
    one = next(one for one in found if one["answer"])
    first = one["moment_id"]
    assert first in curate("status", "--state", "flagged")
    curate("status", "--state", "flaged", code=1)
    assert one["reason"] in curate("status", first).replace("\n", " ")
    assert json.loads(curate("status", first, "--json")) == [one]
    assert curate("reject", first, "--reason", "no") == f"{first}: rejected\n"
    curate("approve", first, "m-unknown", code=2)
    assert json.loads(curate("status", first, "--json"))[0]["state"] == "approved"
    assert "1 rejected" in curate("review", stdin="r no\nq\n")


def test_a_judge_or_model_that_is_away_has_an_exit_status_of_its_own(curate, moments, monkeypatch):
    monkeypatch.setenv("APOLLO_CURATION__URL", "http://127.0.0.1:9")
    monkeypatch.setenv("APOLLO_CURATION__PATIENCE_S", "0")
    assert "0 judged" in curate("judge", code=69)
    assert states(moments) == ["flagged"] * 4


def test_a_judge_that_is_switched_off_is_not_asked(curate, moments, monkeypatch):
    monkeypatch.setenv("APOLLO_JUDGE__ENABLED", "false")
    curate("judge", code=1)
    monkeypatch.setenv("APOLLO_CURATION__AUTO_CONFIDENCE", "0.5")
    assert "0 approved" in curate("review", "--auto")  # candidates
    for one in moments.list():
        moments.change(one.moment_id, hindsight=Hindsight("m", can_tell=True))
    assert "4 approved" in curate("review", "--auto")


def test_logs_that_are_followed_bring_moments_as_they_come(environment, config, tmp_path):
    log = tmp_path / "log.jsonl"
    planted.write(planted.stream(0)[:60], log)
    code = "import typer; from apollo_curation.cli.curate_input import flag; typer.run(flag)"
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
