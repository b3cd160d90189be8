"""Several examples in one pass: what each of them would have had alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.packing import MAX_PADDING, PackedRow, pack
from apollo_worker.step.step import Trainer
from gradients import gradients_of, one_each

from apollo_ipc.config import Train
from apollo_ipc.demo.models import make_model

TINY: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64}
LENGTHS = [7, 40, 12, 33, 12, 65, 64]  # 65 and 64: beside a chunk of the recurrent layers


def example_of(seed: int, num_tokens: int) -> TokenisedExample:
    ids = torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenisedExample(ids, [False] * 4 + [True] * (num_tokens - 4))


@pytest.fixture(scope="module", params=["qwen3", "qwen3.5"])
def model_dir(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m"), request.param, dtype=torch.float32, **TINY)


def test_a_packed_update_has_the_gradients_of_one_at_a_time(model_dir, monkeypatch):
    trainer = Trainer(load_offline(model_dir), Train(rank=8))
    examples = [example_of(seed, num) for seed, num in enumerate(LENGTHS)]
    together = gradients_of(trainer, examples)
    rows = [PackedRow([at], 0, num) for at, num in enumerate(LENGTHS)]
    monkeypatch.setattr("apollo_worker.step.step.packed", one_each)
    alone = gradients_of(trainer, examples)
    monkeypatch.setattr("apollo_worker.step.step.packed", lambda *_: [sorted(rows, key=lambda r: -r.length)])
    in_one = gradients_of(trainer, examples)
    assert alone[1].keys() == together[1].keys() == in_one[1].keys()
    for loss, gradients in (together, in_one):
        assert loss == pytest.approx(alone[0], rel=1e-6)
        for name, gradient in alone[1].items():
            # fp32 sums of some hundred terms in another order; the recurrent layers lose a digit more.
            error = float((gradients[name] - gradient).abs().max())
            assert error <= 2e-5 * float(gradient.abs().max()) + 1e-9, name


def test_what_stands_to_the_right_of_a_sequence_changes_nothing_of_it(model_dir):
    model = load_offline(model_dir).model
    ids = torch.tensor([example_of(1, 40).input_ids])
    with torch.no_grad():
        alone = model(input_ids=ids[:, :23], use_cache=False).logits
        before_others = model(input_ids=ids, use_cache=False).logits[:, :23]
    torch.testing.assert_close(before_others, alone, rtol=0, atol=1e-5)


def test_log_probabilities_come_in_the_order_of_the_examples(model_dir):
    trainer = Trainer(load_offline(model_dir), Train(rank=8))
    examples = [example_of(seed, num) for seed, num in enumerate(LENGTHS)]
    for one, values in zip(examples, trainer.logprobs_of(examples), strict=True):
        # Two passes in fp32: some 1e-6 of a log-probability of size 6.
        torch.testing.assert_close(values, trainer.logprobs_of([one])[0], rtol=0, atol=2e-5)


def test_a_pass_keeps_to_the_longest_example_and_to_little_padding():
    lengths = torch.randint(2, 400, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = batches_of(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        longest, real = max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert len(batch) * longest <= 1000
        assert real >= (1 - MAX_PADDING) * len(batch) * longest
    assert len(batches) < 100, "300 examples of 200 tokens on average, 1000 a pass"
    assert batches_of([1500, 3], 1000) == [[0], [1]], "one alone has its length, whatever that is"
    assert batches_of([50] * 8, 2048) == [list(range(8))]


def batches_of(lengths: list[int], max_tokens: int) -> list[list[int]]:
    batches = pack([PackedRow([at], 0, length) for at, length in enumerate(lengths)], max_tokens)
    return [[row.at[0] for row in batch] for batch in batches]
