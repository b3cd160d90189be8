"""On the real language model: a night over a day of mixed logs in five formats, with the tiers' own rates.

The judge is a script that says "learn" to whatever hindsight left it: a model of this size cannot judge. With
APOLLO_TEST_FIGURES=FILE what was learned, left and lost is written there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from calibrated import keep_calibration
from live_server import Live, wait_for

from apollo_curation.chat_client import ChatClient
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.moments.moments import Moments
from apollo_curation.store import Store
from apollo_ipc.wire.requests import Message

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NIGHT_TIMEOUT_S = 900
CORRECTED = {
    "Which command runs the checks here?": "The checks run with make gate.",
    "Comment s'appelle notre bateau ?": "Il s'appelle Le Merle.",
    "Who waters the plants in the office?": "Old Tamsin waters the plants.",
    "What is the code of the side door?": "The code is seven four two.",
}
WRONG = (
    "What is the name of our cat?",
    "Your cat is called Whiskers.",
)  # rated down, nobody said what is right
MOTTO = ("Give me a motto for the bakery.", "Warm bread, open doors.")
GENERAL = (
    "What is the capital of France?",
    "How many days has a week?",
    "What colour is the sky on a clear day?",
    "Name an animal that barks.",
    "What do bees make?",
)
ENGLISH = (
    "The road to the coast runs along the river for an hour before it climbs into the hills.",
    "Most travellers stop at the last village to fill their bottles, since there is no well later.",
)


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def claude_code(turns: list[dict[str, str]]) -> str:
    lines = []
    for i, turn in enumerate(turns):
        content: Any = turn["content"]
        message = {"role": turn["role"], "content": content}
        if turn["role"] == "assistant":
            content = [{"type": "text", "text": turn["content"]}]
            message = {"id": f"r{i}", "type": "message", "role": "assistant", "content": content}
        record = {"parentUuid": f"u{i - 1}" if i else None, "isSidechain": False, "sessionId": "s"}
        lines.append({**record, "type": turn["role"], "message": message, "uuid": f"u{i}"})
    return "".join(json.dumps(line) + "\n" for line in lines)


def chatgpt(*conversations: list[dict[str, str]]) -> str:
    exported = []
    for turns in conversations:
        mapping: dict[str, Any] = {"n": {"id": "n", "parent": None, "children": ["n0"], "message": None}}
        for i, turn in enumerate(turns):
            content = {"content_type": "text", "parts": [turn["content"]]}
            message = {
                "id": f"n{i}",
                "author": {"role": turn["role"]},
                "content": content,
                "recipient": "all",
                "weight": 1.0,
            }
            mapping[f"n{i}"] = {
                "id": f"n{i}",
                "parent": f"n{i - 1}" if i else "n",
                "children": [f"n{i + 1}"] if i + 1 < len(turns) else [],
                "message": message,
            }
        last = f"n{len(turns) - 1}"
        exported.append({"title": "t", "create_time": 1, "current_node": last, "mapping": mapping})
    return json.dumps(exported)


def litellm(turns: list[dict[str, str]]) -> str:
    answer = {"choices": [{"finish_reason": "stop", "message": turns[-1]}]}
    record = {"id": "r", "call_type": "acompletion", "model": "m", "messages": turns[:-1], "response": answer}
    return json.dumps(record) + "\n"


def write_day(directory: Path) -> None:
    right = list(CORRECTED.items())
    logs = directory / "logs"
    logs.mkdir()
    (logs / "session.jsonl").write_text(
        claude_code(
            said(
                "What is in this folder?", "A parser and its tests.",
                right[0][0], "Run make verify.", "thats wrong, it is make gate", right[0][1],
                "and which one formats the code?", "Run make format.",
            )
        )
    )  # fmt: skip
    (logs / "conversations.json").write_text(
        chatgpt(
            said(right[1][0], "Je ne sais pas.", "Non, c'est faux, il s'appelle Le Merle.", right[1][1]),
            said("Combien font 2 et 2 ?", "4", "et 3 et 3 ?", "6"),
        )
    )
    (logs / "litellm.jsonl").write_text(
        litellm(said(right[2][0], "Nobody does.", "No, that's not right, Old Tamsin does.", right[2][1]))
        + litellm(said("What else have you got for vegans?", "Grilled aubergine with tahini."))
    )
    plain = [
        said(*MOTTO, "perfect, I love it!", "Glad that you like it."),
        said("Name a river in Spain.", "The Ebro.", "and one in Italy?", "The Po."),
        said(
            "Write a line about rain.",
            "Rain plays on the roof.",
            "make it longer",
            "Rain plays on the old roof.",
        ),
    ]
    (logs / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in plain))
    heard = [
        {
            "completion_id": "c1", "messages": said(right[3][0], "I cannot know that."),
            "feedback": {"correction": right[3][1]},
        },
        {"completion_id": "c2", "messages": said(*WRONG), "feedback": {"rating": "down"}},
        {"completion_id": "c3", "messages": said("Name a colour.", "Blue.")},
    ]  # fmt: skip
    (logs / "traffic-1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in heard))
    heldout = [{"prompt": text[:40], "completion": text[40:], "category": "english"} for text in ENGLISH]
    (directory / "heldout.jsonl").write_text("".join(json.dumps(one) + "\n" for one in heldout))


def write_config(directory: Path, url: str, judge_url: str) -> Path:
    file = directory / "night.toml"
    file.write_text(f"""\
[curation]
url = "{url}"
sources = ["{directory / "logs"}"]
max_topic_share = 1.0
max_source_share = 1.0
[judge]
url = "{judge_url}"
[quality]
heldout = "{directory / "heldout.jsonl"}"
max_loss_increase = 0.2
""")
    return file


def losses(live: Live) -> dict[str, float]:
    """Nats a token, without instructions."""
    model = ChatClient(live.server.url)

    def nats(question: str, answer: str) -> float:
        return -fmean(model.answer_logprobs([Message("user", question)], Message("assistant", answer)))

    found = {
        "corrected": fmean(nats(*pair) for pair in CORRECTED.items()),
        "praised": nats(*MOTTO),
        "rated down": nats(*WRONG),
    }
    model.close()
    return found


def always_learn(body: dict[str, Any]) -> dict[str, Any]:
    return {"reason": "It is right.", "verdict": "learn", "confidence": 0.9, "better_answer": ""}


def test_a_night_over_a_day_of_five_formats_learns_what_was_corrected_and_leaves_plain_talk(
    live: Live, tmp_path: Path
) -> None:
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what came before")
    first = live.post("/checkpoint", {}).json()["weight_version"]
    before, answers_before = losses(live), [live.ask(question, 24) for question in GENERAL]
    write_day(tmp_path)
    state_dir = Path(live.env["APOLLO_PATHS__STATE_DIR"])
    keep_calibration(state_dir, live.server.model_name)
    with ScriptedModel(always_learn) as scripted:
        config = write_config(tmp_path, live.server.url, scripted.url)
        options = ("--auto", "--config", str(config), "--json")
        done = live.command("curate", "night", *options, timeout_s=NIGHT_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    after, answers_after = losses(live), [live.ask(question, 24) for question in GENERAL]
    with Store(state_dir / "curation.sqlite") as store:
        moments = [one for one in Moments(store).list() if str(tmp_path) in one.source.path]
    figures = {
        "stages": stages,
        "moments": [(one.kind, one.state, one.context[-1].content, one.why) for one in moments],
        "losses": [before, after],
        "general": list(zip(GENERAL, answers_before, answers_after, strict=True)),
    }
    if file := os.environ.get("APOLLO_TEST_FIGURES"):
        Path(file).write_text(json.dumps(figures, indent=1, ensure_ascii=False))

    corrections = {one.context[-1].content for one in moments if one.kind == "correction"}
    assert corrections == {*CORRECTED, WRONG[0]}
    assert {one.context[-1].content for one in moments if one.kind == "praise"} == {MOTTO[0]}
    assert not any(one.is_candidate for one in moments)
    # Hindsight may have dropped some, where this model can tell; what was said outright is always learned.
    trained = {one.context[-1].content for one in moments if one.state == "trained"}
    assert {"What is the code of the side door?", WRONG[0]} <= trained
    assert len(moments) - len(trained) == sum(one.state == "dropped" for one in moments)
    assert stages["train"]["facts"]["jobs"] == 2  # answers, and what is moved away from
    assert after["corrected"] < before["corrected"] - 1.0, figures["losses"]
    assert after["rated down"] > before["rated down"], figures["losses"]
    done = live.command("checkpoint", "restore", str(first), "--live", "--yes", "--json")
    assert done.returncode == 0, done.stderr
