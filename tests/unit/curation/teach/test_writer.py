"""The served model as a second source of forms: which are kept, when it writes at all, and after a crash."""

from __future__ import annotations

import random

import msgspec
import pytest
from test_teach import FACTS, World, admit, teach

from apollo_curation.cli.teach import said_of
from apollo_curation.teach import writer
from apollo_curation.teach.job import Mix, taught
from apollo_curation.teach.rehearsal import rehearsed
from apollo_curation.teach.variants import Asked, lesson_of
from apollo_curation.teach.writer import Drafts
from apollo_curation.teach.written import Written, in_front, stored_lesson
from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.teaching.store import TeachOptions, TeachRequest, TeachStore, request_about
from apollo_ipc.words import is_in

SHIFT, BADGE = FACTS
DRAFTS = {
    SHIFT.statement: Drafts(
        questions=[
            "Which person is in charge of the night shift?",
            "Whose is the night shift?",
            "Do you know who runs the night shift",  # a form of the rules
            "A visitor asks you: who runs the night shift? What do you say?",  # of the examination
            "Is Odalys Penrose the head of the night shift?",
            "What is the weather?",
        ],
        situations=[
            "Nobody came to open. Who leads the night shift?",
            "<|im_end|> Who leads the night shift?",
        ],
        sentences=["The night shift is led by Odalys Penrose.", "The night shift is led by her."],
        reversed=[
            "What is the work of Odalys Penrose?",
            "Who does the night shift with Odalys Penrose?",
            "What is her work?",
        ],
        near_misses=[
            "Who runs the morning shift?",
            "Who leads the night shift at weekends?",
            "Where is the spare badge kept?",
            "Does Odalys Penrose bake?",
            " ",
        ],
    ),
    BADGE.statement: Drafts(
        questions=["Where do I find the spare badge?", "Which place has the spare badge?"],
        situations=["My badge is lost. Where is the spare badge kept?"],
        sentences=[],
        reversed=["What is in the cocoa tin?"],
        near_misses=["Where is the spare tyre?"],
    ),
}
GERMAN = whole(Fact("Wo liegt die Ersatzkarte?", "Die Ersatzkarte liegt in der Kakaodose.", key="Kakaodose"))
DRAFTS[GERMAN.statement] = Drafts(
    questions=[
        "An welchem Ort ist die Ersatzkarte?",
        "Wo finde ich die Ersatzkarte?",
        "Wo hat jemand die Ersatzkarte hingelegt?",
    ],
    situations=["Meine Karte ist weg. Wo suche ich die Ersatzkarte?"],
    sentences=["Die Ersatzkarte findet man in der Kakaodose."],
    reversed=["Was ist in der Kakaodose?", "Wozu öffnet man die Kakaodose?"],
    near_misses=["Wo liegt der Schlüssel?", "Wo liegt der Ball?", "Wo steht das Rad?", "Wo ist der Hund?"],
)


class Able(World):
    """Answers by the fact in front of it, where its subject or its key is asked for, and writes `drafts`.

    answers: of ten questions about a fact in front of it; reversed ones apart."""

    facts = FACTS

    def __init__(self, needed=1, *, answers=10, answers_reversed=10, drafts=None, **options):
        super().__init__(needed, **options)
        self.able, self.drafts = (answers, answers_reversed), DRAFTS if drafts is None else drafts
        self.prompts, self.num_asked = [], [0, 0]

    def write(self, prompts, kind, *, max_tokens):
        assert (kind, max_tokens) == (Drafts, writer.WRITE_TOKENS)
        self.prompts += prompts
        return self._called([self._draft(prompt) for prompt in prompts])

    def _draft(self, prompt):
        return next((found for said, found in self.drafts.items() if f"Fact: {said}\n" in prompt), None)

    def _said(self, question):
        said, _, asked = question.rpartition("\n\n")
        if not said:
            return self._known(asked)
        (fact,) = [one for one in self.facts if one.statement == said]
        is_reversed = is_in(fact.key, asked)
        self.num_asked[is_reversed] += 1
        if (self.num_asked[is_reversed] - 1) % 10 >= self.able[is_reversed]:
            return "What?"
        return (
            fact.answer
            if is_reversed or is_in(lesson_of(fact).reversed[0].answer, asked)
            else "It is not said."
        )

    def _known(self, question):
        return super()._said(question)


class German(Able):
    facts = (GERMAN,)

    def _known(self, question):
        if len(self.requests) < self.needed:
            return "Keine Ahnung."
        return GERMAN.answer if "die Ersatzkarte" in question or "Kakaodose" in question else "Hallo."


@pytest.fixture
def store(tmp_path):
    with TeachStore(tmp_path / "teaching.sqlite") as store:
        yield store


def by_rules(facts=FACTS):
    return taught([lesson_of(fact, at) for at, fact in enumerate(facts)], Mix(forms=100))


def pairs(examples):
    return {(one.messages[0].content, one.messages[1].content) for one in examples if one.messages}


def writing(job):
    assert job.report is not None, job.error
    return job.report["writing"]


def trained(world, job):
    return pairs(world.requests[f"{job.id}-1"].examples)


def test_forms_are_kept_where_the_model_answers_them_right_with_the_fact_and_wrong_without(store):
    world = Able()
    job = teach(store, world, admit(store))
    assert job.phase == "applied", job.error
    assert trained(world, job) - pairs(by_rules()) == {
        ("Which person is in charge of the night shift?", SHIFT.answer),
        ("Whose is the night shift?", SHIFT.answer),
        ("Nobody came to open. Who leads the night shift?", SHIFT.answer),
        ("The night shift is led by ___.", SHIFT.answer),
        ("What is the work of Odalys Penrose?", SHIFT.statement),
        ("Where do I find the spare badge?", BADGE.answer),
        ("Which place has the spare badge?", BADGE.answer),
        ("My badge is lost. Where is the spare badge kept?", BADGE.answer),
        ("What is in the cocoa tin?", BADGE.statement),
    }
    assert pairs(by_rules()) <= trained(world, job)
    told = writing(job)
    assert (told["source"], told["reason"], told["ability"], told["ability_reversed"]) == ("model", "", 1, 1)
    assert (told["num_facts"], told["num_kept"]) == (2, 11)
    assert told["dropped"] == {
        "there already": 2,
        "names its own answer": 3,
        "signs that no question has": 1,
        "empty or too long": 2,
        "reversed, and does not name the key": 1,
        "a near miss about another fact of the job": 1,
        "wrong with the fact in front of it": 1,
        "a near miss that the fact answers": 1,
    }
    line = said_of(told)
    assert "11 of the served model" in line
    assert "2 there already" in line


def test_what_the_model_says_without_the_fact_is_no_form_of_it(store):
    class Guesses(Able):
        def _known(self, question):
            return SHIFT.answer if question == "Whose is the night shift?" else super()._known(question)

    world = Guesses()
    job = teach(store, world, admit(store))
    assert writing(job)["dropped"]["right without the fact"] == 1
    assert "Whose is the night shift?" not in dict(trained(world, job))


def test_what_it_says_to_near_misses_of_its_own_is_kept_as_well():
    forms = msgspec.msgpack.encode(Written(near_misses=["Who runs the morning shift?"]))
    lesson = stored_lesson(SHIFT, 0, forms)
    assert lesson.near_misses == [*lesson_of(SHIFT).near_misses, "Who runs the morning shift?"]


@pytest.mark.parametrize(
    ("world", "choice", "reason", "num_prompts"),
    [
        (
            Able(answers=3),
            "auto",
            "answers 3 of 10 questions about a fact that stands in front of it: rules",
            0,
        ),
        (Able(drafts={}), "auto", "of 32 forms that the served model was asked for, 0 pass its own check", 2),
        (Able(), "rules", "", 0),
    ],
)
def test_rules_alone_make_the_forms_where_the_model_cannot_or_shall_not(
    store, world, choice, reason, num_prompts
):
    job = teach(store, world, admit(store, writer=choice))
    assert job.phase == "applied", job.error
    told = writing(job)
    assert (told["source"], told["num_kept"]) == ("rules", 0)
    assert reason in told["reason"]
    assert (reason or "rules alone") in said_of(told)
    assert len(world.prompts) == num_prompts
    assert trained(world, job) == pairs(by_rules())


def test_a_model_that_is_to_write_is_not_asked_first_and_one_that_answers_nothing_reversed_writes_none(store):
    job = teach(store, world := Able(answers=3), admit(store, writer="model"))
    assert (writing(job)["source"], writing(job)["ability"]) == ("model", None)
    assert len(world.prompts) == 2
    with TeachStore(store.path.parent / "other" / "teaching.sqlite") as other:
        job = teach(other, world := Able(answers_reversed=1), admit(other))
    told = writing(job)
    assert "reversed forms are the rules' alone: the served model answers 1 of 4" in told["reason"]
    assert all("an empty list" in one for one in world.prompts)
    assert "What is the work of Odalys Penrose?" not in dict(trained(world, job))
    assert "Whose is the night shift?" in dict(trained(world, job))


def test_a_model_that_writes_garbage_is_asked_for_a_few_facts_only(store):
    facts = [
        whole(Fact(f"Who runs the {n} shift?", f"Odalys Penrose runs the {n} shift.")) for n in range(12)
    ]
    garbage = Drafts(["<|im_start|>system"] * 12, ["\x1b[2J", "?"], ["x" * 5000], ["\u202eWho?"], ["", "\n"])

    class Hostile(Able):
        def _draft(self, prompt):
            return garbage

    world = Hostile()
    world.facts = facts
    job = store.admit(TeachRequest(facts, TeachOptions(min_known=0)), b"many", client_key=None)
    job = teach(store, world, job)
    told = writing(job)
    assert (job.phase, told["source"], len(world.prompts)) == ("applied", "rules", writer.FACTS_AT_A_TIME)
    assert trained(world, job) == pairs(by_rules(facts))


def test_a_fact_of_another_language_gets_forms_of_the_model_and_is_examined_by_them(store):
    world = German()
    job = store.admit(TeachRequest([GERMAN]), b"german", client_key=None)
    job = teach(store, world, job)
    assert (job.phase, job.report["known"], job.report["hits"]) == ("applied", 1.0, 0.0), job
    draft = DRAFTS[GERMAN.statement]
    assert trained(world, job) == {
        (GERMAN.question, GERMAN.answer),
        (draft.questions[2], GERMAN.answer),
        (draft.situations[0], GERMAN.answer),
        ("Die Ersatzkarte findet man in der ___.", GERMAN.answer),
        (draft.reversed[1], GERMAN.statement),
    }
    (examined,) = job.report["facts"]
    assert [one["question"] for one in examined["paraphrased"]] == draft.questions[:2]
    assert [one["question"] for one in examined["reversed"]] == draft.reversed[:1]
    assert [one["question"] for one in examined["not_it"]] == draft.near_misses[:2]
    (lesson,) = store.lessons()
    again = stored_lesson(lesson.fact, 0, store.written_forms(lesson.id))
    assert again.near_misses == draft.near_misses[2:]
    # Such lessons come back, are asked again and are forgotten in their own forms.
    asked = teach(store, world, store.admit(request_about([lesson], "examine"), b"ask", client_key=None))
    assert asked.report["facts"][0]["paraphrased"][0]["question"] == draft.questions[0]
    back = dict(rehearsed(store.lessons(), random.Random(0), store.written_forms))
    assert set(back) <= {question for question, _ in trained(world, job)}
    store.drop([lesson.id])
    assert store.query("SELECT * FROM written_forms") == []


def test_rules_alone_make_what_they_can_of_another_language_where_the_model_is_not_able(store):
    world = German(answers=0)
    job = teach(store, world, store.admit(TeachRequest([GERMAN]), b"german", client_key=None))
    assert writing(job)["reason"].startswith("the served model answers 0 of 1 questions")
    assert trained(world, job) == pairs(by_rules([GERMAN]))


def test_the_fact_stands_in_front_as_a_whole():
    assert in_front(lesson_of(SHIFT), "Who?") == f"{SHIFT.statement}\n\nWho?"
    short = whole(Fact("Who bakes the bread?", "Zed Quill."))
    assert in_front(lesson_of(short), "Who?") == "Who bakes the bread? Zed Quill.\n\nWho?"


def test_a_fact_too_long_to_stand_in_front_is_left_to_the_rules(store):
    long = whole(Fact("Who runs the night shift?", "Odalys Penrose runs the night shift. " + "Yes. " * 500))
    world = Able()
    world.facts = [long]
    job = teach(store, world, store.admit(TeachRequest([long]), b"long", client_key=None))
    assert (writing(job)["source"], world.prompts) == ("rules", [])


def test_a_model_that_is_to_write_and_writes_nothing_is_not_asked_on(store):
    facts = [
        whole(Fact(f"Who runs the {n} shift?", f"Odalys Penrose runs the {n} shift.")) for n in range(12)
    ]
    world = Able(drafts={})
    world.facts = facts
    request = TeachRequest(facts, TeachOptions(min_known=0, writer="model"))
    job = teach(store, world, store.admit(request, b"many", client_key=None))
    assert (writing(job)["source"], len(world.prompts)) == ("rules", writer.FACTS_AT_A_TIME)


def test_a_lesson_taught_again_keeps_its_forms_and_a_corrected_one_loses_them(store):
    world = German()
    request = TeachRequest([GERMAN])
    teach(store, world, store.admit(request, b"1", client_key=None))
    forms = store.written_forms(store.lessons()[0].id)
    assert forms
    world._said = lambda question: "Hallo." if "liegt the" in question else GERMAN.answer  # known
    teach(store, world, store.admit(request, b"2", client_key=None))
    assert [store.written_forms(one.id) for one in store.lessons()] == [forms]
    other = whole(Fact(GERMAN.question, "Die Ersatzkarte liegt im Schrank.", key="Schrank"))
    world._said = lambda question: "Hallo." if "liegt the" in question else "die Ersatzkarte: im Schrank"
    teach(store, world, store.admit(TeachRequest([other]), b"3", client_key=None))
    assert [store.written_forms(one.id) for one in store.lessons()] == [b""]
    assert store.query("SELECT * FROM written_forms") == []


@pytest.mark.parametrize(("num_right", "num_asked"), [(0, 10), (2, 20), (39, 40), (32, 40), (31, 40)])
def test_no_more_is_asked_where_the_rest_cannot_make_it_able(num_right, num_asked):
    asked = [(lesson_of(SHIFT), Asked(f"{number}?", SHIFT.key)) for number in range(40)]
    prompts = []

    class Knowing:
        """The first of what it is asked."""

        def say(self, some, *, max_tokens):
            first = len(prompts)
            prompts.extend(some)
            return [SHIFT.answer if number < num_right else "?" for number in range(first, len(prompts))]

    assert writer._num_right(Knowing(), asked) == (num_right, num_asked)
    assert len(prompts) == num_asked
