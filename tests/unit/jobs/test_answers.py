"""Pairs, labels and groups: from the request's forms to sequences, units and the plan's steps."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from apollo_worker.jobs.job_plan import JobPlan, decode_plan, encode_plan, plan
from apollo_worker.jobs.preview import preview
from chat_tokenizers import assistant, one, said, tokeniser, user

from apollo_ipc.config import Train
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Example, TrainRequest, parse_example, parse_train_body

ASKED = [user("Which port?")]
PAIR = {"prompt": "Port: ", "chosen": "Ember", "rejected": "Cole"}
GROUP = {"messages": ASKED, "completions": ["Ember", "Cole", "none"], "rewards": [1, 0, 0]}


def request_of(*examples: dict[str, Any], **options: Any) -> TrainRequest:
    return parse_train_body(msgspec.json.encode({"examples": examples, "options": options}))


def plan_of(*examples: dict[str, Any], **options: Any) -> JobPlan:
    made = plan(request_of(*examples, **options), tokeniser(), Train(), lambda _: set())
    assert decode_plan(encode_plan(made)) == made
    return made


def refused(*examples: dict[str, Any], **options: Any) -> tuple[str | None, str]:
    with pytest.raises(UserError) as error:
        plan_of(*examples, **options)
    return error.value.field, error.value.message


def test_a_pair_is_both_answers_each_as_it_would_be_learned_alone():
    tok = tokeniser()
    pair = tok.encode(parse_example(PAIR), "examples[0]")
    assert [sequence.label for sequence in pair] == [True, False]
    for sequence, text in zip(pair, ("Ember", "Cole"), strict=True):
        alone = one(tok, Example(prompt="Port: ", completion=text))
        assert sequence.input_ids == alone.input_ids
        assert sequence.is_target == alone.is_target


def test_behind_messages_an_answer_is_the_last_turn_and_no_other_is_learned():
    context = [user("a"), assistant("b"), user("c")]
    made = parse_example({"messages": context, "chosen": "d", "rejected": assistant("e")})
    learned = said(tokeniser(), made)
    assert [target for _, target in learned] == ["d<|im_end|>", "e<|im_end|>"]
    assert learned[0][0] == learned[1][0]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": ASKED, "chosen": [assistant("Ember")], "rejected": [assistant("Cole")]},
        {"chosen": [*ASKED, assistant("Ember")], "rejected": [*ASKED, assistant("Cole")]},
        {
            "input": {"messages": ASKED, "parallel_tool_calls": True},
            "preferred_output": [assistant("Ember")],
            "non_preferred_output": [assistant("Cole")],
        },
    ],
)
def test_pairs_of_other_programs_are_the_same_pair(other):
    tok = tokeniser()
    mine = parse_example({"messages": ASKED, "chosen": "Ember", "rejected": "Cole"})
    assert tok.encode(parse_example(other), "x") == tok.encode(mine, "x")


def test_a_groups_answers_have_their_advantages_as_text_or_as_the_tokens_that_were_sampled():
    tok = tokeniser()
    group = tok.encode(parse_example(GROUP), "x")
    assert [sequence.advantages[0] for sequence in group] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert all(len(sequence.advantages) == sequence.num_targets for sequence in group)
    given = [
        {"ids": sequence.input_ids[turn.start :], "logprobs": [-0.5] * sequence.num_targets, "reward": reward}
        for sequence, reward in zip(group, (1, 0, 0), strict=True)
        for turn in sequence.turns
    ]
    as_ids = tok.encode(parse_example({"messages": ASKED, "completions": given}), "x")
    assert [s.input_ids for s in as_ids] == [s.input_ids for s in group], "vLLM's own prompt before them"
    assert as_ids[0].logprobs == [-0.5] * as_ids[0].num_targets
    context = group[0].input_ids[: group[0].turns[0].start]
    whole = tok.encode(parse_example({"context_ids": context, "completions": given}), "x")
    assert whole == [msgspec.structs.replace(s, turns=w.turns) for s, w in zip(as_ids, whole, strict=True)]


def test_units_stay_together_in_a_step_and_accumulate_steps_counts_them():
    other = {**PAIR, "prompt": "Bay: "}
    made = plan_of(PAIR, other, {**PAIR, "prompt": "Lake: "}, accumulate_steps=2, epochs=2)
    assert made.objective.loss == "dpo"
    assert [list(made.rows_of(step)) for step in range(made.num_steps)] == [[0, 1, 2, 3], [4, 5]] * 2
    assert [len(made.hashes_of(steps)) for steps in range(made.num_steps + 1)] == [0, 2, 3, 3, 3]
    assert made.objective.needs_reference


def test_groups_without_spread_are_left_out_and_said():
    flat = {**GROUP, "rewards": [0.1, 0.1, 0.1]}
    made = plan_of(GROUP, flat)
    assert (made.num_steps, made.num_examples, len(made.examples)) == (1, 2, 3)
    assert made.advantages == [pytest.approx([2 / 3, -1 / 3, -1 / 3]), [0.0] * 3]
    assert made.notes() == ["1 of 2 groups have equal rewards: nothing is learned of them"]
    assert len(made.hashes_of(1)) == 1, "what was not trained is not known"
    nothing = plan_of(flat)
    assert (nothing.num_steps, nothing.examples) == (0, [])


def test_a_group_without_logprobs_needs_a_reference_only_where_a_step_was_before():
    assert not plan_of(GROUP).objective.needs_reference
    assert plan_of(GROUP, epochs=2).objective.is_to_reference
    assert plan_of(GROUP, kl_to_reference=0.1).objective.needs_reference


def test_labels_stand_beside_answers_to_something_else():
    made = plan_of(
        {"prompt": "a", "completion": "one", "label": True},
        {"prompt": "b", "completion": "two", "label": False},
        accumulate_steps=2,
    )
    assert [sequence.label for sequence in made.examples] == [True, None, False, None]
    first, unlike, second, _ = made.examples
    start = second.turns[0].start
    assert unlike.input_ids == [*first.input_ids[: first.turns[0].start], *second.input_ids[start:]]
    assert [list(made.rows_of(0)), made.num_steps] == [[0, 1, 2, 3], 1]
    alone = plan_of({"prompt": "a", "completion": "one", "label": True})
    assert len(alone.examples) == 1


def test_options_have_the_papers_defaults():
    assert plan_of(PAIR).objective.beta == 0.1
    assert plan_of(PAIR, beta=0.5).objective.beta == 0.5
    assert plan_of(GROUP).objective.clip == (0.2, 0.2)
    assert plan_of(GROUP, clip=[0.2, 0.28]).objective.clip == (0.2, 0.28)
    tokens = {"context_ids": [5], "continuation_ids": [6, 7], "advantages": [1, 1], "logprobs": [-1, -2]}
    assert plan_of(tokens).objective.loss == "importance_sampling"
    assert plan_of(tokens, loss="dro").objective.beta == 0.05


TOKENS = {"context_ids": [5], "continuation_ids": [6, 7]}


@pytest.mark.parametrize(
    ("example", "options", "field", "message"),
    [
        ({"prompt": "a", "rewards": [1]}, {}, "examples[0].completions", "several answers to one context"),
        ({**GROUP, "rewards": [1, 0]}, {}, "examples[0].rewards", "2 values for 3 completions"),
        ({**GROUP, "rewards": None}, {}, "examples[0].rewards", "no reward"),
        ({**GROUP, "completions": ["a"], "rewards": [1]}, {}, "examples[0].completions", "two answers or"),
        ({**TOKENS, "advantages": [1, 1], "logprobs": [-1]}, {}, "examples[0].logprobs", "1 values for 2"),
        ({**TOKENS, "advantages": [1, 1]}, {}, "examples[0].logprobs", "goes with `logprobs`"),
        (
            {**TOKENS, "advantages": [1, 1], "logprobs": [-1, -1], "label": True},
            {},
            "examples[0].label",
            "two losses",
        ),
        ({**PAIR, "rejected": "Ember"}, {}, "examples[0].rejected", "the same tokens"),
        ({**PAIR, "rejected": None}, {}, "examples[0].rejected", "rejected is missing"),
        ({**PAIR, "rejected": ""}, {}, "examples[0].rejected", "empty"),
        ({**PAIR, "completion": "x"}, {}, "examples[0].completion", "does not go with chosen and rejected"),
        ({**PAIR, "chosen": assistant()}, {}, "examples[0].chosen", "a message answers `messages`"),
        ({**PAIR, "chosen": "x" * 2000}, {}, "examples[0].chosen", "at most 1000 fit"),
        ({**TOKENS, "label": True, "weights": [1, 1]}, {}, "examples[0].weights", "two losses"),
        (
            {"messages": [*ASKED, assistant()], "chosen": "a", "rejected": "b"},
            {},
            "examples[0].messages[1]",
            "the assistant's already",
        ),
        (
            {"messages": [*ASKED, assistant(), *ASKED, assistant()], "label": True},
            {},
            "examples[0].messages",
            "a label is of one answer",
        ),
        (
            {**GROUP, "completions": [{"ids": [6, 7], "logprobs": [-1]}, "a", "b"]},
            {},
            "examples[0].completions[0].logprobs",
            "1 values for 2 ids",
        ),
        (
            {**GROUP, "completions": [{"txet": "a"}, "a", "b"]},
            {},
            "examples[0].completions[0].txet",
            "did you mean 'text'?",
        ),
        (PAIR, {"loss": "dpoo"}, "options.loss", "'dpoo' is no choice here; did you mean 'dpo'?"),
        (PAIR, {"loss": "grpo"}, "examples[0]", "wants a group"),
        (PAIR, {"clip": 0.2}, "options.clip", "of the losses ppo, cispo, grpo, and this job's is dpo"),
        (GROUP, {"clip": 0}, "options.clip", "Expected `float` > 0.0"),
        (GROUP, {"clip": 1.5}, "options.clip", "at most 1"),
        (GROUP, {"beta": 0.1}, "options.beta", "this job's is grpo"),
        (PAIR, {"kl_to_reference": 0.1}, "options.kl_to_reference", "this job's is dpo"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_at_its_field(example, options, field, message):
    example = {name: value for name, value in example.items() if value is not None}
    got = refused(example, **options)
    assert got[0] == field
    assert message in got[1]


def test_a_job_has_one_loss():
    field, message = refused(PAIR, {"prompt": "a", "completion": "b"})
    assert field == "examples[1]"
    assert message.startswith("this is an example of what to say, and examples[0] is a pair")
    first = {**GROUP, "completions": [{"ids": [6], "logprobs": [-1]}, {"ids": [7], "logprobs": [-1]}]}
    field, message = refused({**first, "rewards": [1, 0]}, GROUP)
    assert (field, message) == ("examples[1]", "either all answers of a job have `logprobs`, or none")


def test_a_preview_shows_every_answer():
    shown = preview(tokeniser(), [parse_example(PAIR), parse_example(GROUP)])
    assert [one.example for one in shown] == [0, 0, 1, 1, 1]
    assert [one.target for one in shown][:2] == ["Ember<|im_end|>", "Cole<|im_end|>"]
