"""Statements whose question the served model makes."""

from __future__ import annotations

import msgspec
import pytest
from test_teach import teach
from test_writer import GERMAN, German, trained

from apollo_curation.teach.complete import Posed
from apollo_curation.teach.writer import Drafts
from apollo_ipc.errors import UserError
from apollo_ipc.teaching.facts import Fact, facts_of_document, parse_facts
from apollo_ipc.teaching.store import TeachRequest, TeachStore

STATEMENT = Fact(statement=GERMAN.statement)
POSED = {GERMAN.statement: Posed(GERMAN.question, "Kakaodose")}


class Asks(German):
    """Writes the question of a statement, too."""

    posed = POSED

    def write(self, prompts, kind, *, max_tokens):
        if kind is Drafts:
            return super().write(prompts, kind, max_tokens=max_tokens)
        self.num_posed = getattr(self, "num_posed", 0) + len(prompts)
        found = [[one for said, one in self.posed.items() if f"Statement: {said}\n" in x] for x in prompts]
        return self._called([one[0] if one else None for one in found])


@pytest.fixture
def store(tmp_path):
    with TeachStore(tmp_path / "teaching.sqlite") as store:
        yield store


def test_of_a_statement_that_no_rule_understands_the_model_makes_question_and_key(store):
    sent = [Fact(statement="Oje!"), STATEMENT, Fact(statement="Wir warten.")]
    world = Asks()
    world.posed = POSED | {"Wir warten.": Posed("Was tun wir?", "warten")}  # it cannot answer that
    world.facts = (GERMAN, Fact("Was tun wir?", "Nichts.", "Wir warten.", "warten"))
    job = teach(store, world, store.admit(TeachRequest(sent), b"1", client_key=None))
    assert (job.phase, job.report["known"]) == ("applied", 1.0)
    assert [one["fact"] for one in job.report["facts"]] == [msgspec.to_builtins(GERMAN)]
    assert job.report["left_out"] == ["Oje!", "Wir warten."]
    assert [one.fact for one in store.lessons()] == [GERMAN]
    assert ("Wo finde ich die Ersatzkarte?", "Wo liegt die Ersatzkarte?") not in trained(world, job)
    assert (GERMAN.question, GERMAN.statement) in trained(world, job)
    assert world.num_posed == 3


@pytest.mark.parametrize(
    "posed",
    [
        Posed("Wo liegt die Ersatzkarte?", "im Schrank"),  # not in the statement
        Posed("Was liegt in der Kakaodose?", "Kakaodose"),
        Posed("Wer?", "Kakaodose"),  # it does not answer that
        Posed("<|im_end|> Wo liegt die Ersatzkarte?", "Kakaodose"),
        Posed("Wo liegt die Ersatzkarte?", "Ersatzkarte|Kakaodose"),
        Posed("", "Kakaodose"),
        Posed("Wo liegt die Ersatzkarte?", " ."),
        None,
    ],
)
def test_where_it_makes_no_question_of_any_statement_nothing_is_trained(store, posed):
    world = Asks()
    world.posed = {GERMAN.statement: posed}
    job = teach(store, world, store.admit(TeachRequest([STATEMENT]), b"1", client_key=None))
    assert (job.phase, world.requests, world.pin_now) == ("failed", {}, None)
    assert "makes no question of any of these statements" in job.error


def test_a_key_that_was_sent_stays(store):
    world = Asks()
    world.posed = {GERMAN.statement: Posed("Wo liegt die Ersatzkarte?", "irgendwo")}
    sent = Fact(statement=GERMAN.statement, key="Kakaodose|Dose")
    teach(store, world, store.admit(TeachRequest([sent]), b"1", client_key=None))
    assert [one.fact.key for one in store.lessons()] == ["Kakaodose|Dose"]


def test_a_statement_without_a_rule_is_taken_where_the_model_is_to_write():
    assert parse_facts(GERMAN.statement, is_written=True) == [STATEMENT]
    facts, notes = facts_of_document(f"{GERMAN.statement} Oje!", is_written=True)
    assert (facts, notes) == ([STATEMENT, Fact(statement="Oje!")], [])
    with pytest.raises(UserError, match='writer "model"'):
        parse_facts("Oje!")
