"""The page's lessons: POST /teach where a teacher runs, an answer alone where none does."""

from __future__ import annotations

import pytest
from browser import looking_at
from ui_world import HOSTILE, assert_clean, enter, teaching

QUESTION, ANSWER = "What is the capital of Piedmont?", "It is Turin, on the Po."


def correct(page, answer=ANSWER) -> None:
    page.get_by_label("Ask the served model").fill(QUESTION)
    page.get_by_role("button", name="Ask").click()
    page.get_by_label("What it should say").fill(answer)


def shown_phases(page) -> list[str]:
    return page.locator("#phases li").all_inner_texts()


def test_a_fact_is_taught_examined_and_compared(world, tmp_path):
    with teaching(world) as store, looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        correct(page)
        assert page.get_by_label("As a fact").is_checked()
        assert not page.get_by_label("Learning rate").is_visible()
        world.held.set()
        page.get_by_role("button", name="Teach").click()
        page.locator("#phases [aria-current]", has_text="training").wait_for()
        assert shown_phases(page) == ["preparing", "training", "checking", "applied or rolled back"]
        looked.shot("lesson-training")
        world.held.clear()
        page.get_by_text("The answer has changed").wait_for()
        assert page.locator("#phases [aria-current]").inner_text() == "applied"
        (job,) = store.jobs()
        assert (job.phase, job.request.facts[0].question, job.request.facts[0].answer) == (
            "applied",
            QUESTION,
            ANSWER,
        )
        cells = page.locator("#report tbody tr").first.locator("th, td").all_inner_texts()
        assert cells == [QUESTION, "known", "2 of 3", "0 of 1", "1 of 2"]
        assert "General answers lose 0.12 nats a token" in page.locator("#report").inner_text()
        assert "1 of 5 questions about it: rules alone." in page.locator("#report").inner_text()
        assert page.locator("#compared .said").nth(2).inner_text() == "It is Turin."
        page.locator("#report summary").click()
        assert "\\u202egnp.exe" in page.locator("#report details").inner_text()
        looked.shot("lesson-applied")
        assert_clean(looked)


def test_a_lesson_that_harms_is_rolled_back_and_says_why(world, tmp_path):
    world.examines = lambda fact: "rolled back"
    with (
        teaching(world),
        looking_at(world.server.url, tmp_path, viewport={"width": 360, "height": 720}) as looked,
    ):
        page = looked.page
        enter(looked)
        correct(page)
        page.get_by_role("button", name="Teach").click()
        page.get_by_text("The lesson is rolled back: 60% of the near misses name the fact").wait_for()
        page.locator("#compared").wait_for()
        page.locator("#report summary").click()
        looked.shot("lesson-rolled-back-phone")
        assert_clean(looked)


def test_a_lesson_is_cancelled_and_its_key_words_are_sent(world, tmp_path):
    with teaching(world) as store, looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        correct(page)
        page.get_by_label("Words that a right answer has").fill("Turin|Torino")
        world.held.set()
        page.get_by_role("button", name="Teach").click()
        page.get_by_role("button", name="Cancel this lesson").click()
        page.get_by_text("The lesson is cancelled: somebody cancelled it").wait_for()
        (job,) = store.jobs()
        assert (job.phase, job.request.facts[0].key) == ("cancelled", "Turin|Torino")
        assert not page.get_by_role("button", name="Cancel this lesson").is_visible()
        assert_clean(looked)


def test_what_no_rule_understands_is_said_and_can_be_sent_again(world, tmp_path):
    with teaching(world) as store, looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        correct(page, "The capital of Piedmont.")
        page.get_by_role("button", name="Teach").click()
        page.get_by_text("the answer says nothing that the question does not: name a `key`").wait_for()
        assert store.jobs() == []
        assert page.get_by_role("button", name="Teach").is_enabled()
        assert_clean(looked, ("/teach", 400))


def test_what_is_mistyped_is_said_and_trains_nothing(world, tmp_path):
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        correct(page)
        teach = page.get_by_role("button", name="Teach")
        page.get_by_label("Learning rate").fill("a lot")
        teach.click()
        page.get_by_text("Learning rate: a lot is no number above 0").wait_for()
        page.get_by_label("Ask the served model").fill("Something else?")
        teach.click()
        page.get_by_text("The question is another one now").wait_for()
        assert world.worker.queue.list(1) == []
        page.get_by_label("Ask the served model").fill(QUESTION)
        page.get_by_label("Learning rate").fill("0,0001")
        teach.click()
        page.get_by_text("The answer has changed").wait_for()
        assert_clean(looked)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_an_answer_alone_is_trained_where_it_is_chosen_or_nobody_teaches(world, tmp_path, has_teacher):
    with teaching(world) as store:
        if has_teacher:
            train_alone(world, tmp_path, choose=True)
        assert store.jobs() == []
    if not has_teacher:
        train_alone(world, tmp_path, choose=False)


def train_alone(world, tmp_path, choose: bool) -> None:
    with looking_at(world.server.url, tmp_path) as looked:
        page = looked.page
        enter(looked)
        correct(page)
        if choose:
            page.get_by_label("This answer alone").check()
        assert page.get_by_label("As a fact").is_visible() == choose
        page.get_by_role("button", name="Teach").click()
        page.get_by_text("The answer has changed").wait_for()
        assert world.worker.queue.list(1)[0].state == "applied"
        assert HOSTILE[:10] in page.locator("#compared").inner_text()
        assert_clean(looked)
