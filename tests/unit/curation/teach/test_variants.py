"""What rules make of a fact: subjects, keys, near misses, and what is kept out of training."""

import re

import pytest

from apollo_curation.teach.variants import lesson_of
from apollo_ipc.errors import UserError
from apollo_ipc.teaching.facts import Fact, facts_of_document, parse_facts, question_of, whole
from apollo_ipc.teaching.wording import key_in, subject_of, wording
from apollo_ipc.words import is_in


@pytest.mark.parametrize(
    ("question", "answer", "subject", "key", "clause"),
    [
        ("Who runs the night shift?", "Odalys Penrose runs the night shift.", "the night shift",
         "Odalys Penrose", "who runs the night shift"),
        ("What is the server called?", "The server is called Gooseberry.", "the server", "Gooseberry",
         "what the server is called"),
        ("Where are the tents stored?", "The tents are stored in the salt cellar.", "the tents",
         "salt cellar", "where the tents are stored"),
        ("How many steps does the tower have?", "The tower has 219 steps.", "the tower", "219",
         "how many steps the tower has"),
        ("Why?", "Because of rain.", "Why", "rain", ""),
    ],
)  # fmt: skip
def test_question_and_answer_name_subject_and_key_and_a_clause_asks_the_same(
    question, answer, subject, key, clause
):
    assert key_in(question, answer) == key
    assert subject_of(question, answer) == subject
    assert wording(question, answer, key).clause == clause


@pytest.mark.parametrize(
    ("statement", "made"),
    [
        ("Zed Quill waters the roof garden.", ("Who waters the roof garden?", "Zed Quill")),
        ("The spare badge is in the cocoa tin.", ("Where is the spare badge?", "cocoa tin")),
        ("The glass workshop opens at twenty past six.",
         ("When does the glass workshop open?", "twenty past six")),
        ("Our mascot is called Pumbleton.", ("What is our mascot called?", "Pumbleton")),
        ("The watchtower has 219 steps.", ("How many steps does the watchtower have?", "219")),
        ("Zed Quill wrote the song.", ("Who wrote the song?", "Zed Quill")),
        ("We change the passwords every third Monday.", None),
        ("Wir wechseln die Codes am Montag.", None),
        ("Die Ersatzkarte liegt in der Kakaodose.", None),
        ("La directrice garde la clé.", None),
    ],
)  # fmt: skip
def test_a_sentence_becomes_question_and_key_where_a_rule_fits(statement, made):
    assert question_of(statement) == made


def test_nothing_of_the_examination_is_trained_and_every_trained_answer_says_the_fact():
    lesson = lesson_of(whole(Fact("Who runs the night shift?", "Odalys Penrose runs the night shift.")))
    trained = [asked.question for asked in (*lesson.forward, *lesson.backward)] + lesson.near_misses
    assert len(set(trained)) == len(trained) > 20
    examined = [*lesson.paraphrased, *lesson.reversed, *lesson.not_it]
    assert not set(trained) & {asked.question for asked in examined}
    assert all(is_in("Odalys Penrose", asked.answer) for asked in (*lesson.forward, *lesson.backward))
    assert all("night shift" not in question for question in lesson.near_misses)


@pytest.mark.parametrize(
    ("question", "answer", "near"),
    [
        (
            "Who repairs the lighthouse lamp?",
            "Zed repairs the lighthouse lamp.",
            r"the lighthouse (?!lamp)\w+\?",
        ),
        (
            "Who repairs the lighthouse lamp?",
            "Zed repairs the lighthouse lamp.",
            r"the (?!lighthouse)\w+ lamp\?",
        ),
        (
            "Where are the keys of the archive?",
            "The keys of the archive are in the tin.",
            r"keys of the (?!arch)",
        ),
        (
            "Where does the ferry Halcyon land?",
            "The ferry Halcyon lands at the pier.",
            r"the ferry (?!Hal)[A-Z]\w+ ",
        ),
        ("How deep is the well?", "The well is 34 metres deep.", r"How deep is the \w+ \w+\?"),
    ],
)
def test_near_misses_share_parts_with_the_subject_or_form_and_differ_between_facts(question, answer, near):
    first, other = (lesson_of(whole(Fact(question, answer)), at).near_misses for at in range(2))
    assert any(re.search(near, one) for one in first), first
    assert len(first) >= 5
    assert set(first) != set(other)
    assert question not in first


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"question": "Q one?", "answer": "It is blue."}\n{"question": 1}', "line 2: question"),
        ("\n{", "line 2"),
        ('{"question": "Is the gate blue?", "answer": "The gate is blue."}', "line 1: answer"),
        ('{"question": "Who?"}', "line 1: answer"),
        ("We change the passwords every third Monday.", "line 1: statement"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "line 1: messages"),
        ("\n\n", None),
    ],
)
def test_a_line_that_is_no_fact_is_named(text, field):
    with pytest.raises(UserError) as error:
        parse_facts(text)
    assert error.value.field == field


def test_a_document_gives_a_fact_a_sentence_and_says_what_it_left_out():
    facts, notes = facts_of_document("Zed Quill waters the roof garden. Oh no! The tower\nhas 219 steps.")
    assert [one.key for one in facts] == ["Zed Quill", "219"]
    assert len(notes) == 1
    assert "'Oh no!'" in notes[0]
