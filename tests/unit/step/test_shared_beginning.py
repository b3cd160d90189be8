"""Sequences that begin alike, in one row of a pass: what each of them would have had alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.forward import Forward
from apollo_worker.step.packing import MIN_SAVED, ROW_TOKENS, PackedRow, packed
from apollo_worker.step.step import Trainer
from gradients import gradients_of, one_each

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model

TINY: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64}
ATTENTION, RECURRENT = "qwen3", "qwen3.5"


def tokens(seed: int, number: int) -> list[int]:
    return torch.randint(0, 256, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


def example_of(beginning: list[int], seed: int, asked: int, answered: int) -> TokenisedExample:
    ids = [*beginning, *tokens(seed, asked + answered)]
    return TokenisedExample(ids, [at >= len(ids) - answered for at in range(len(ids))])


BEGINNING = tokens(0, 30)
LIKE = [example_of(BEGINNING, seed, 3 + seed, 4 + seed % 3) for seed in range(1, 7)]
OTHERS = [example_of([], seed, 9, 60) for seed in (20, 21)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m"), ATTENTION, dtype=torch.float32, **TINY)


def trainer_of(model_dir: Path) -> Trainer:
    return Trainer(load_offline(model_dir), Train(rank=8))


@pytest.mark.parametrize(
    "examples",
    [LIKE, [*LIKE[:4], *OTHERS], [LIKE[0], LIKE[0], LIKE[1]]],
    ids=["alike", "two unlike", "one twice"],
)
def test_a_shared_beginning_gives_the_gradients_of_one_at_a_time(model_dir, monkeypatch, examples):
    trainer = trainer_of(model_dir)
    (batch,) = trainer._packed(examples)
    assert any(len(row.at) > 1 for row in batch)
    together = gradients_of(trainer, examples)
    monkeypatch.setattr("apollo_worker.step.step.packed", one_each)
    alone = gradients_of(trainer, examples)
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together[1].keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        # fp32 sums of some hundred terms in another order.
        error = float((together[1][name] - gradient).abs().max())
        assert error <= 2e-5 * float(gradient.abs().max()) + 1e-9, name


def test_log_probabilities_come_in_the_order_of_the_examples(model_dir):
    trainer = trainer_of(model_dir)
    examples = [LIKE[4], OTHERS[0], LIKE[0], LIKE[2], OTHERS[1], LIKE[1]]
    assert any(len(row.at) > 1 for batch in trainer._packed(examples) for row in batch)
    for one, values in zip(examples, trainer.logprobs_of(examples), strict=True):
        torch.testing.assert_close(values, trainer.logprobs_of([one])[0], rtol=0, atol=2e-5)


def test_a_recurrent_model_shares_nothing_and_the_probe_alone_would_see_it(tmp_path):
    live = load_offline(make_model(tmp_path / "m", RECURRENT, dtype=torch.float32, **TINY))
    forward = Forward(live, 64)
    assert forward.longest_shared == 0
    assert not forward._mask_is_exact()
    assert all(len(row.at) == 1 for batch in packed(LIKE, 2048, 0) for row in batch)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sliding_window": 40, "layer_types": ["sliding_attention"] * 4}, 40),
        ({"sliding_window": 40, "use_sliding_window": False}, None),
        ({"sliding_window": 40, "layer_types": None, "use_sliding_window": True}, 40),
        ({"layer_types": ["chunked_attention"] * 4}, 0),
        ({"layer_types": ["linear_attention", *["full_attention"] * 3]}, 0),
    ],
)
def test_no_sequence_longer_than_a_layers_window_shares_a_row(model_dir, monkeypatch, change, expected):
    trainer = trainer_of(model_dir)
    config = trainer.live.model.config
    for name, value in change.items():
        monkeypatch.setattr(config, name, value, raising=False)
    monkeypatch.setattr(Forward, "_mask_is_exact", lambda forward: True)
    found = trainer.forward._longest_shared()
    assert found == expected if expected is not None else found > 1_000_000
    if expected == 40:
        short = [one for one in LIKE if len(one.input_ids) <= 40]
        shared = [i for batch in packed(LIKE, 2048, 40) for row in batch if len(row.at) > 1 for i in row.at]
        assert all(len(LIKE[i].input_ids) <= 40 for i in shared)
        assert len(short) < len(LIKE)


def rows_of(examples: list[TokenisedExample], max_tokens: int = 4096) -> list[PackedRow]:
    return [row for batch in packed(examples, max_tokens, 1 << 20) for row in batch]


def test_what_predicts_a_target_is_never_shared():
    """The token before the first target, whoever's it is."""
    same = [*BEGINNING, 7]
    examples = [TokenisedExample([*same, target], [False] * len(same) + [True]) for target in (1, 2, 3)]
    (row,) = rows_of(examples)
    assert row.shared == len(same) - 1
    assert row.length == row.shared + 3 * 2


def test_many_short_examples_are_rows_of_some_hundred_tokens():
    """Attention over a row costs by its square."""
    examples = [example_of(BEGINNING, seed, 10, 15) for seed in range(100)]
    rows = rows_of(examples)
    assert sorted(i for row in rows for i in row.at) == list(range(100))
    assert all(row.length <= ROW_TOKENS for row in rows)
    assert sum(row.length for row in rows) < 0.6 * sum(len(one.input_ids) for one in examples)


def test_a_group_shares_its_long_prompt_in_a_row_that_is_longer():
    prompt = tokens(1, 2000)
    (row,) = rows_of([example_of(prompt, seed, 1, 200) for seed in range(8)])
    assert (row.shared, row.length) == (2000, 2000 + 8 * 201)


def test_a_pass_is_no_larger_than_the_longest_example_that_may_be_sent():
    prompt = tokens(1, 600)
    rows = rows_of([example_of(prompt, seed, 1, 200) for seed in range(8)], max_tokens=1000)
    assert sorted(i for row in rows for i in row.at) == list(range(8))
    assert max(row.length for row in rows) <= 1000


def test_what_saves_little_stays_as_it_was():
    few = [example_of(BEGINNING[:4], seed, 10, 30) for seed in range(6)]
    assert packed(few, 4096, 1 << 20) == packed(few, 4096, 0)
    assert MIN_SAVED > 4 / 44
