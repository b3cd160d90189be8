"""A job whose loss ends high says of which example, by what is measured after its last step."""

from __future__ import annotations

from apollo_worker.jobs.example import Turn, sequence_of
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.step.high_loss import MEASURED, high_loss_notes


class Measured:
    """A model whose loss of an example is known."""

    def __init__(self, *losses: float):
        self.losses, self.asked = losses, []

    def mean_loss(self, examples) -> float:
        numbers = [one.example for one in examples]
        self.asked.append(numbers)
        return sum(self.losses[number] for number in numbers) / len(numbers)


def make_plan(num_examples: int, accumulate_steps: int = 1, **rest) -> JobPlan:
    examples = [sequence_of([5, 6, 7], [Turn(1, 3)], number) for number in range(num_examples)]
    return JobPlan(
        examples, [None] * num_examples, num_examples, 4, 1e-4, 0.0, "constant", 0.1,
        accumulate_steps=accumulate_steps, **rest,
    )  # fmt: skip


def test_the_worst_example_is_named_with_its_loss_of_now():
    model = Measured(0.1, 1.2, 0.2, 1.94)
    last = {0: 3.0, 1: 1.5, 2: 0.3, 3: 2.0}
    assert high_loss_notes(model, make_plan(4), last) == [
        "the loss of example 3 is still 1.9: raise epochs or lr"
    ]
    assert [2] not in model.asked, "what was low costs nothing"


def test_what_its_last_step_has_taught_is_not_said_to_be_high():
    assert high_loss_notes(Measured(0.1, 0.2), make_plan(2), {0: 4.0, 1: 5.0}) == []


def test_few_of_many_are_measured():
    model = Measured(*[2.0] * 50)
    (note,) = high_loss_notes(model, make_plan(50), {at: 2 + at / 100 for at in range(50)})
    assert len(model.asked) == MEASURED
    assert "is still 2" in note


def test_an_update_of_several_examples_is_named_by_them():
    model = Measured(3.0, 1.0, 0.1, 0.1)
    (note,) = high_loss_notes(model, make_plan(4, accumulate_steps=2), {0: 2.0, 1: 0.1})
    assert note.startswith("the loss of examples 0 to 1 is still 2:")


def test_sums_are_no_losses_a_token():
    assert high_loss_notes(Measured(9.0), make_plan(1, is_mean=False), {0: 9.0}) == []
