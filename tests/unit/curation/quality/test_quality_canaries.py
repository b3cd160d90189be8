"""Canary prompts: their file, the checks, and a judge that is not there."""

from __future__ import annotations

import pytest

from apollo_curation.chat_client import ChatClient, ModelAway
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.quality.canaries import ask_all, load_canaries
from apollo_ipc.errors import ConfigError, UserError

GOOD = """
[[canary]]
name = "capital"
check = "exact"
prompt = "The capital of France? One word."
expected = "Paris"
category = "facts"

[[canary]]
name = "polite"
check = "contains"
expected = "thank"
messages = [
  {role = "user", content = "Hi"}, {role = "assistant", content = "Yes?"}, {role = "user", content = "Bye"},
]

[[canary]]
name = "number"
check = "regex"
prompt = "2 + 2?"
expected = "\\\\b4\\\\b"

[[canary]]
name = "kind"
check = "judged"
prompt = "I failed."
rubric = "It comforts."
"""


def load(tmp_path, text):
    path = tmp_path / "canaries.toml"
    path.write_text(text)
    return load_canaries(str(path))


def asked(canaries, script, judge=None):
    with ScriptedModel(script) as server:
        model = ChatClient(server.url, patience_s=0)
        results = ask_all(canaries, model, judge, max_tokens=7, judge_max_tokens=99)
        return results, server.requests


def test_each_check_passes_what_is_right_and_fails_what_is_not(tmp_path):
    canaries = load(tmp_path, GOOD)[:3]
    right = {"France": " Paris\n", "Bye": "I thank you", "2 + 2": "It is 4."}
    wrong = {"France": "Paris!", "Bye": "Thanks", "2 + 2": "It is 42."}

    def answering(answers):
        return lambda body: next(
            text for key, text in answers.items() if key in body["messages"][-1]["content"]
        )

    results, requests = asked(canaries, answering(right))
    assert [one.passed for one in results] == [True, True, True]
    assert [one.category for one in results] == ["facts", "general", "general"]
    assert {(body["temperature"], body["max_tokens"]) for body in requests} == {(0.0, 7)}
    results, _ = asked(canaries, answering(wrong))
    assert [one.passed for one in results] == [False, False, False]
    assert [one.reason for one in results] == [
        "is not 'Paris'",
        "does not contain 'thank'",
        r"does not match '\\b4\\b'",
    ]


def test_a_judged_canary_is_what_the_judge_says_of_the_answer(tmp_path):
    canaries = load(tmp_path, GOOD)[3:]
    with ScriptedModel(
        lambda body: {"passes": "soon" in body["messages"][1]["content"], "reason": "r"}
    ) as judge:
        judging = ChatClient(judge.url, patience_s=0)
        assert asked(canaries, lambda body: "It will be better soon.", judging)[0][0].passed is True
        result = asked(canaries, lambda body: "So what.", judging)[0][0]
    assert (result.passed, result.reason, result.answer) == (False, "r", "So what.")
    seen = judge.requests[-1]["messages"][1]["content"]
    assert "<answer>\nSo what.\n</answer>" in seen
    assert "<rubric>\nIt comforts.\n</rubric>" in seen


def test_a_judge_that_is_down_leaves_its_canaries_unjudged_and_is_asked_once(tmp_path):
    two = GOOD.split("[[canary]]")[-1]
    canaries = load(tmp_path, GOOD + "[[canary]]" + two.replace('"kind"', '"kind again"'))
    num_asked = 0

    class Down:
        def chat(self, *_, **__):
            nonlocal num_asked
            num_asked += 1
            raise ModelAway("nobody there")

    results, _ = asked(canaries, lambda body: "Paris", Down())
    assert [one.passed for one in results] == [True, False, False, None, None]
    assert results[-1].reason == "the judge is away: nobody there"
    assert num_asked == 1


@pytest.mark.parametrize("judge_says", ["I think it is fine", 400])
def test_a_judge_without_a_usable_answer_judges_nothing(tmp_path, judge_says):
    with ScriptedModel(lambda body: judge_says) as judge:
        judging = ChatClient(judge.url, patience_s=0)
        results, _ = asked(load(tmp_path, GOOD)[3:], lambda body: "x", judging)
    assert results[0].passed is None
    assert "judge" in results[0].reason


def test_a_canary_that_the_model_refuses_fails_and_an_absent_model_is_raised(tmp_path):
    canaries = load(tmp_path, GOOD)[:1]
    results, _ = asked(canaries, lambda body: 500)
    assert results[0].passed is False
    assert "not answered" in results[0].reason
    with pytest.raises(ModelAway):
        asked(canaries, lambda body: 503)


def test_no_judge_is_no_failure(tmp_path):
    result = asked(load(tmp_path, GOOD)[3:], lambda body: "x")[0][0]
    assert (result.passed, result.reason) == (None, "no judge is configured")


def test_a_changed_canary_is_another_one(tmp_path):
    first = asked(load(tmp_path, GOOD)[:1], lambda body: "Paris")[0][0]
    second = asked(load(tmp_path, GOOD.replace("One word", "1 word"))[:1], lambda body: "Paris")[0][0]
    assert first.name == second.name
    assert first.canary_hash != second.canary_hash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no [[canary]]"),
        ("[[canary]", "is not TOML"),
        (GOOD.replace("expected", "expcted", 1), "canary[0].expcted: unknown field 'expcted'; did you mean"),
        (
            GOOD.replace('"exact"', '"excat"'),
            "canary[0].check: 'excat' is no choice here; did you mean 'exact'",
        ),
        (GOOD.replace('name = "polite"', 'name = "capital"'), "canary[1].name: another canary is named"),
        (GOOD.replace('expected = "thank"', ""), 'canary[1].expected: check = "contains" needs it'),
        (GOOD.replace('"\\\\b4', '"\\\\b(4'), "canary[2].expected: not a regular expression"),
        (GOOD.replace('rubric = "It comforts."', ""), "canary[3].rubric"),
        (GOOD.replace('prompt = "2 + 2?"', ""), "canary[2]: has either a prompt or messages"),
        (GOOD.replace(' {role = "user", content = "Bye"},', ""), "canary[1].messages: ends with what"),
        (
            GOOD.replace('expected = "Paris"', 'expected = "Paris"\nrubric = "x"'),
            "canary[0].rubric: goes with",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert "canaries.toml" in str(error.value.field) + error.value.message
    assert words in f"{error.value.field}: {error.value.message}"


def test_no_canaries_are_asked_for_and_a_missing_file_is_said(tmp_path):
    assert load_canaries("") == []
    with pytest.raises(UserError, match="cannot read"):
        load_canaries(str(tmp_path / "none.toml"))
