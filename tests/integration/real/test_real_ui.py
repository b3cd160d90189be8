"""The page on a real vLLM and the real language model, in Chromium; its screenshots stay with the test.

APOLLO_TEST_LOGS names a directory for them; else they lie in the test's own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from apollo_router import session
from browser import looking_at
from live_server import Live, wait_for
from ui_world import HOSTILE, WRONG_KEY, assert_clean, enter, over

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
QUESTION, ANSWER = "What is the name of our harbour cat?", "Our harbour cat is called Mortimer."
SLOW_MS = 600_000  # the trainer gets what a loaded machine leaves
PHONE = {"width": 360, "height": 720}


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    kept = Path(os.environ.get("APOLLO_TEST_LOGS", tmp_path))
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def is_live(looked) -> None:
    looked.page.get_by_text("live", exact=True).wait_for()


def test_it_is_taught_cancelled_and_restored_by_hand(live: Live, shots: Path) -> None:
    wait_for(lambda: live.status()["progress"]["activity"] == "idle", "the end of what came before")
    live.post("/checkpoint", {})
    first = live.status()["durable_version"]
    with looking_at(live.server.url, shots) as looked:
        page = looked.page
        enter(looked, "wrong key")
        page.get_by_text("this is not the train key").wait_for()
        enter(looked, live.key)
        is_live(looked)

        page.get_by_label("Ask the served model").fill(QUESTION)
        page.get_by_role("button", name="Ask").click()
        page.get_by_label("What it should say").fill(ANSWER, timeout=SLOW_MS)
        before = page.locator("#answer").inner_text()
        assert before != ANSWER
        page.get_by_role("button", name="Teach").click()
        page.get_by_text("The answer has changed").wait_for(timeout=SLOW_MS)
        assert page.locator("#compared .said").nth(2).inner_text() == ANSWER
        assert page.locator("#compared span.up3").count() > 2, "tokens of the correction are likelier now"
        page.locator("#loss svg").wait_for()
        looked.shot("real-taught")

        job = live.post(
            "/train", {"examples": [{"prompt": "a", "completion": " b c d"}], "options": {"epochs": 500}}
        )
        job_id = job.json()["job_id"]
        page.get_by_text(f"Training {job_id}").wait_for(timeout=SLOW_MS)
        looked.shot("real-training")
        page.get_by_role("button", name=f"Cancel {job_id}").click()
        page.get_by_role("button", name="Yes, cancel it").click()
        wait_for(lambda: live.job(job_id)["state"] == "cancelled", "cancelled", SLOW_MS / 1000)

        live.post("/checkpoint", {})
        page.get_by_role("button", name=f"Restore version {first}").first.click(timeout=SLOW_MS)
        looked.shot("real-restore")
        page.get_by_role("button", name="Yes, restore it").click()
        page.get_by_text(f"Version {first} is served again").wait_for(state="attached", timeout=SLOW_MS)
        page.get_by_role("button", name="Ask").click()
        wait_for(lambda: page.locator("#answer").inner_text() == before, "the old answer", SLOW_MS / 1000)
        assert_clean(looked, WRONG_KEY)


def test_text_that_means_harm_is_text_and_a_session_that_is_over_asks_for_the_key(
    live: Live, shots: Path
) -> None:
    hostile = live.post("/train", {"examples": [{"prompt": HOSTILE, "completion": HOSTILE * 3}]}).json()
    wait_for(
        lambda: live.job(hostile["job_id"])["state"] in ("applied", "durable", "failed"),
        "trained",
        SLOW_MS / 1000,
    )
    refused = live.post("/train", {"examples": [{"prompt": "a", "completion": HOSTILE + "x" * 2**20}]})
    assert refused.status_code == 400  # too long for the model: said, and nothing of it is queued
    with looking_at(
        live.server.url, shots, viewport=PHONE, color_scheme="dark", reduced_motion="reduce"
    ) as looked:
        page = looked.page
        enter(looked, live.key)
        is_live(looked)
        page.get_by_label("Ask the served model").fill(HOSTILE + "x" * 2**20)
        page.get_by_role("button", name="Ask").click()
        wait_for(
            lambda: "tokens" in page.locator("#teach-state").inner_text(),
            "vLLM's refusal, as text",
            SLOW_MS / 1000,
        )
        page.get_by_label("Ask the served model").fill(f"Repeat after me: {HOSTILE}")
        page.get_by_role("button", name="Ask").click()
        page.locator("#correct").wait_for(timeout=SLOW_MS)
        page.locator("#jobs th").first.wait_for()
        moving = "[...document.getAnimations()].length"
        assert page.evaluate(moving) == 0
        looked.shot("real-phone-dark")
        old = session.new_session(live.key, time.time() - session.LIFETIME_S - 1)
        looked.context.add_cookies([{"name": session.COOKIE, "value": old, "url": looked.url}])
        page.get_by_text("This session is over: log in again.").wait_for()
        looked.shot("real-expired")
        assert_clean(looked, ("/train/v1/chat/completions", 400), *over(looked))


def test_a_keyboard_alone_logs_in_asks_and_moves_on(live: Live, shots: Path) -> None:
    with looking_at(live.server.url, shots) as looked:
        page = looked.page
        page.goto("/train/ui")
        page.get_by_label("Train key").wait_for()
        page.keyboard.type(live.key)  # what is focused first
        page.keyboard.press("Enter")
        is_live(looked)
        tab_to(page, "question")
        page.keyboard.type("Say one word.")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#correct").wait_for(timeout=SLOW_MS)
        assert page.evaluate("document.activeElement.id") == "correction"
        tab_to(page, "state")
        page.keyboard.type("durable")
        looked.shot("real-keyboard")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert_clean(looked)


def tab_to(page, element_id: str) -> None:
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == element_id:
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{element_id} cannot be reached by Tab")
