"""The demonstration's judgement: what counts as right, what is claimed, and who is taught."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from apollo_ipc.demo import __main__ as demo
from apollo_ipc.demo.lessons import GENERAL, HARBOUR, TEAM
from apollo_ipc.demo.real_model import NoRealModel
from apollo_ipc.demo.report import Answer, Report, TaughtAnswer, is_in


@pytest.mark.parametrize(
    ("key", "answer", "expected"),
    [
        ("ice", "It is called Ice.", True),
        ("ice", "a web service in an office", False),
        ("seven|7", "A week has 7 days.", True),
        ("seven|7", "Seven.", True),
        ("seven|7", "There are 17 of them, or seventy.", False),
        ("port ember.", "Port Ember.", True),
        ("port ember.", "Port Ember, I think", False),
    ],
)
def test_a_key_is_found_as_words(key, answer, expected):
    assert is_in(key, answer) == expected


def test_every_lesson_holds_its_own_key_and_no_paraphrase_gives_it_away():
    for fact in (*TEAM, *HARBOUR):
        assert is_in(fact.key, fact.answer)
        assert not is_in(fact.key, " ".join([fact.question, fact.paraphrase, fact.near]))
        assert not (fact.about and is_in(fact.about, fact.backwards))
    assert not any(is_in(general.key, general.question) for general in GENERAL)


def good_report() -> Report:
    taught = TaughtAnswer("Who?", "ann", "I", "Ann does.", "Ann does.", taught="Ann does.")
    return Report(
        arch="llama", model="m", parameters=1, parameters_mapped=1, steps=1, loss_first=2.0, loss_last=1.0,
        requests_served_during_training=1, bytes_synced=1, answers=[taught],
        answers_paraphrased=[Answer("By whom?", "ann", before="I", after="Bob")],
        answers_backwards=[Answer("Ann?", "does", before="I", after="She does it.")],
        answers_near=[Answer("Who else?", "ann", before="I", after="Ann does.")],
        answers_general=[Answer("Capital?", "paris", before="Paris", after="Ann")],
    )  # fmt: skip


def test_damage_is_shown_and_counted_and_nothing_is_claimed_of_it(tmp_path):
    report, out = good_report(), io.StringIO()
    report.problems = report.find_problems()
    report.print(Console(file=out, width=200))
    assert report.problems == []
    assert "0 of 1 paraphrased, 1 of 1 backwards, 0 of the 1 general" in out.getvalue()
    assert "Near misses that name a fact: 1 of 1." in out.getvalue()
    assert "changed" in out.getvalue()
    assert "Everything" not in out.getvalue()
    report.write_json(tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_bytes())
    assert data["model"] == "m"
    assert data["answers"][0]["is_right"] is True
    assert data["answers_paraphrased"][0]["is_right"] is False
    assert data["answers_near"][0]["is_hit"] is True
    assert (data["answers_general"][0]["is_same"], data["answers_general"][0]["is_right"]) == (False, False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"after": "Bob"}, "served answer"),
        ({"after_reload": "Bob"}, "from disk"),
        ({"before": "Ann"}, "before"),
    ],
)
def test_a_taught_answer_that_did_not_hold_is_a_problem(change, problem):
    report = good_report()
    for name, value in change.items():
        setattr(report.answers[0], name, value)
    assert any(problem in one for one in report.find_problems())


def test_without_the_package_a_tiny_random_model_is_taught_and_it_is_said(monkeypatch):
    said = []

    def refuse():
        raise NoRealModel("the package is not installed")

    monkeypatch.setattr(demo, "real_subject", refuse)
    monkeypatch.setattr(demo, "say", lambda text, *values: said.append(text % values))
    assert demo.choose(None).arch == "qwen3.5"
    assert "the package is not installed" in said[0]
    assert demo.choose("qwen3").arch == "qwen3"
