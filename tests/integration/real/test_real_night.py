"""On the real language model: a night over logs of a day, a second that finds nothing, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from calibrated import keep_calibration
from live_server import Live, wait_for

from apollo_curation.chat_client import ChatClient
from apollo_curation.demo import night_corpus as corpus
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_ipc.wire.requests import Message

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NIGHT_TIMEOUT_S = 600
CORRECTED = corpus.FACTS[:2]
ASKED_IN_THE_DAY = (
    "Where is the harbour?",
    "Who keeps the ferry?",
    "How old is the inn?",
    "Is the mill far?",
)
ASKED_BY_NOBODY = ("Where is the lighthouse?", "Who keeps the garden?", "When does the market open?")


def write_day(directory: Path) -> None:
    """Two corrections, answers that followed an instruction, and what must not get worse."""
    for name in ("logs", "followed"):
        (directory / name).mkdir(parents=True)
    corrections = [
        {
            "topic": asked,
            "messages": [
                *corpus.chat(asked, corpus.DO_NOT_KNOW),
                corpus.said("user", f"That's wrong. It is: {right}"),
                corpus.said("assistant", right),
            ],
        }
        for asked, right in CORRECTED
    ]
    followed = [
        {"system": corpus.INSTRUCTIONS, "topic": text, "messages": corpus.chat(text, corpus.AYE)}
        for text in ASKED_IN_THE_DAY
    ]
    heldout = [
        {"prompt": text[:40], "completion": text[40:], "category": "english"}
        for text in (
            "The road to the coast runs along the river for an hour before it climbs into the hills.",
            "Most travellers stop at the last village to fill their bottles, since there is no well later.",
        )
    ]
    for name, records in (("logs/day", corrections), ("followed/ship", followed), ("heldout", heldout)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines)
    (directory / "canaries.toml").write_text(
        '[[canary]]\nname = "France"\nprompt = "What is the capital of France?"\n'
        'check = "contains"\nexpected = "Paris"\n'
    )


def write_config(directory: Path, url: str, judge_url: str) -> Path:
    file = directory / "night.toml"
    file.write_text(f"""\
[curation]
url = "{url}"
sources = ["{directory / "logs"}"]
bootstrap = ["{directory / "followed"}"]
max_topic_share = 1.0
max_source_share = 1.0
[judge]
url = "{judge_url}"
[quality]
heldout = "{directory / "heldout.jsonl"}"
canaries = "{directory / "canaries.toml"}"
max_loss_increase = 0.2
max_canaries_lost = 1
[tier_direct]
lr = 5e-5
epochs = 6
[tier_bootstrap]
lr = 5e-5
epochs = 4
schedule = "constant"
""")
    return file


def night(live: Live, config: Path) -> dict[str, dict[str, Any]]:
    """The stages by name."""
    options = ("--auto", "--config", str(config), "--json")
    done = live.command("curate", "night", *options, timeout_s=NIGHT_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


def losses(live: Live) -> list[float]:
    """Nats a token, without instructions: of the corrected answers; of the answer as instructed to questions
    that were in no log."""
    model = ChatClient(live.server.url)
    kinds = [CORRECTED, [(text, corpus.AYE) for text in ASKED_BY_NOBODY]]
    found = [
        -fmean(
            logprob
            for text, answer in pairs
            for logprob in model.answer_logprobs([Message("user", text)], Message("assistant", answer))
        )
        for pairs in kinds
    ]
    model.close()
    return found


def test_a_night_moves_the_days_lessons_into_the_real_model_and_a_restore_takes_them_out(
    live: Live, tmp_path: Path
) -> None:
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what came before")
    first = live.post("/checkpoint", {}).json()["weight_version"]
    before = losses(live)
    write_day(tmp_path)
    keep_calibration(Path(live.env["APOLLO_PATHS__STATE_DIR"]), live.server.model_name)
    with ScriptedModel(corpus.JudgeAndDreamer()) as scripted:
        config = write_config(tmp_path, live.server.url, scripted.url)
        found = night(live, config)
        assert (found["judge"]["num_done"], found["train"]["num_done"]) == (2, 6)
        assert found["train"]["facts"]["bootstrap"] == 4
        after = losses(live)
        # Seen: 5.90 to 3.31, since the followed log is trained last and has another answer; 4.69 to 0.00001.
        assert after[0] < before[0] - 1.0, (before, after)
        assert after[1] < 0.25, (before, after)
        status = live.status()
        assert status["durable_version"] == status["weight_version"] > first
        again = night(live, config)
    assert (again["read"]["num_done"], again["judge"]["num_done"], again["train"]["num_done"]) == (0, 0, 0)
    assert live.status()["weight_version"] == status["weight_version"]

    done = live.command("checkpoint", "restore", str(first), "--live", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_jobs_undone"] == 2
    assert losses(live) == pytest.approx(before, abs=1e-3)
