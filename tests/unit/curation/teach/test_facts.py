"""What rules make of a fact: subjects, keys, near misses, and what is kept out of training."""

import pytest

from apollo_curation.teach.facts import Fact, key_of, lesson_of, near_miss, parse_facts, subject_of
from apollo_ipc.errors import UserError
from apollo_ipc.words import is_in


@pytest.mark.parametrize(
    ("question", "answer", "subject", "key"),
    [
        ("Who runs the night shift?", "Odalys Penrose runs it.", "the night shift", "Odalys Penrose"),
        ("What is our release day?", "Our release day is every Wednesday.", "our release day", "Wednesday"),
        ("What is the server called?", "The server is called Gooseberry.", "the server", "Gooseberry"),
        ("Where is the badge?", "The badge is in the cocoa tin.", "the badge", "cocoa tin"),
        ("Why?", "Because of rain.", "Why", "rain"),
    ],
)  # fmt: skip
def test_a_question_names_its_subject_and_the_answer_its_key(question, answer, subject, key):
    assert subject_of(question) == subject
    assert key_of(Fact(question, answer)) == key


def test_a_near_miss_is_the_same_question_of_something_else():
    assert near_miss("What is the server called?", "the village choir") == "What is the village choir called?"


def test_nothing_of_the_examination_is_trained_and_every_trained_answer_says_the_fact():
    lesson = lesson_of(Fact("Who runs the night shift?", "Odalys Penrose runs the night shift."))
    trained = {asked.question for asked in lesson.train} | set(lesson.near_misses)
    assert len(trained) == len(lesson.train) + len(lesson.near_misses)
    examined = [*lesson.paraphrased, *lesson.reversed, *lesson.not_it]
    assert not trained & {asked.question for asked in examined}
    assert all(is_in("Odalys Penrose", asked.answer) for asked in lesson.train)
    assert all("night shift" not in question for question in lesson.near_misses)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"question": "Q one?", "answer": "It is blue."}\n{"question": 1}', "line 2: question"),
        ("\n{", "line 2"),
        ('{"question": "Is the gate blue?", "answer": "The gate is blue."}', "line 1: answer"),
        ("\n\n", None),
    ],
)
def test_a_line_that_is_no_fact_is_named(text, field):
    with pytest.raises(UserError) as error:
        parse_facts(text)
    assert error.value.field == field
