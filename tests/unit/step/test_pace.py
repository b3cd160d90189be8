"""Rests between decoder layers: when, how long, and that nothing else changes."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import load_offline
from apollo_worker.step.pace import MAX_REST_S, MIN_REST_S, Pace
from apollo_worker.step.step import Trainer
from served_model import Exporter, make_config, make_tiny_model
from torch import nn
from trainer_by_hand import Trainer as TurnedByHand
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_ipc.config import Train, load_config
from apollo_ipc.demo.models import make_model
from apollo_ipc.errors import ConfigError

TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}
EXAMPLE = TokenisedExample(list(range(12)), [False] * 4 + [True] * 8)
FORWARD_S, BACKWARD_S = 0.25, 0.5  # of one layer, by the clock below


class FakeTime:
    """A clock that only `sleep` and `pass_by` move. rests: (when, how long), slices put together again."""

    def __init__(self) -> None:
        self.now = 100.0
        self.rests: list[tuple[float, float]] = []
        self.on_sleep: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        if self.rests and math.isclose(sum(self.rests[-1]), self.now):
            started, so_far = self.rests.pop()
            self.rests.append((started, so_far + seconds))
        else:
            self.rests.append((self.now, seconds))
        self.now += seconds
        self.on_sleep()

    def pass_by(self, seconds: float) -> None:
        self.now += seconds

    def durations(self) -> list[float]:
        return [seconds for _, seconds in self.rests]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("m"), "qwen3", **TINY)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def make_trainer(model_dir: Path, pace: Pace | None = None, **options) -> Trainer:
    return Trainer(load_offline(model_dir), Train(rank=8, **options), pace)


def timed_trainer(model_dir: Path, fake: FakeTime, rest_per_s: float, **options) -> Trainer:
    """Each layer takes FORWARD_S, also where it is recomputed, and BACKWARD_S; nothing else takes time."""
    trainer = make_trainer(model_dir, Pace(rest_per_s, clock=fake.clock, sleep=fake.sleep), **options)
    for layer in decoder_layers(trainer.live.model):
        layer.register_forward_pre_hook(lambda *_: fake.pass_by(FORWARD_S))
        # The first of a layer's weights that backward gets to.
        layer.mlp.down_proj.weight.register_post_accumulate_grad_hook(lambda _: fake.pass_by(BACKWARD_S))
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.live.model.named_parameters()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_after_each_layer_it_rests_in_proportion_forward_and_backward(model_dir):
    fake = FakeTime()
    timed_trainer(model_dir, fake, 0.5).step(EXAMPLE, 1e-3)
    assert fake.durations() == pytest.approx(3 * [0.5 * FORWARD_S] + 3 * [0.5 * BACKWARD_S])


def test_a_layer_that_is_recomputed_in_backward_counts_with_it(model_dir):
    fake = FakeTime()
    timed_trainer(model_dir, fake, 0.5, activation_checkpointing=True).step(EXAMPLE, 1e-3)
    in_backward = 0.5 * (FORWARD_S + BACKWARD_S)
    assert fake.durations() == pytest.approx(3 * [0.5 * FORWARD_S] + 3 * [in_backward])


def test_what_passes_between_two_steps_is_no_computing(model_dir):
    fake = FakeTime()
    trainer = timed_trainer(model_dir, fake, 1.0)
    trainer.step(EXAMPLE, 1e-3)
    num = len(fake.rests)
    fake.pass_by(3600)
    trainer.step_on([EXAMPLE, EXAMPLE], 1e-3)
    assert max(fake.durations()) == pytest.approx(BACKWARD_S)
    assert len(fake.rests) == 3 * num, "each example of a group has its borders"


def test_one_rest_is_bounded(model_dir):
    fake = FakeTime()
    timed_trainer(model_dir, fake, 100.0).step(EXAMPLE, 1e-3)
    assert fake.durations() == pytest.approx(6 * [MAX_REST_S])


def test_a_rest_too_short_to_sleep_is_owed_at_the_next_border():
    fake = FakeTime()
    pace = Pace(1.0, clock=fake.clock, sleep=fake.sleep).attach(nn.Linear(1, 1))
    with pace:
        for _ in range(2):
            fake.pass_by(0.6 * MIN_REST_S)
            pace._on_border()
    assert fake.durations() == pytest.approx([1.2 * MIN_REST_S])


@pytest.mark.parametrize("arch", ["qwen3", "qwen3.5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_the_same_bit_for_bit_with_and_without(tmp_path, arch, checkpointing):
    directory = make_model(tmp_path / "m", arch, **(TINY if arch == "qwen3" else {}))
    options = {"activation_checkpointing": checkpointing, "rounding": "stochastic"}
    fake = FakeTime()
    fake.on_sleep = lambda: torch.rand(3)  # what else runs meanwhile may draw random numbers
    plain = make_trainer(directory, **options)
    paced = make_trainer(directory, Pace(2.0, clock=lambda: fake.now + time.monotonic(), sleep=fake.sleep))
    before = weights(plain)
    results = [[trainer.step(EXAMPLE, 1e-3) for _ in range(2)] for trainer in (plain, paced)]
    assert fake.rests
    assert results[0] == results[1]
    assert not differing(weights(plain), weights(paced))
    assert differing(before, weights(plain)), "it did train"


def test_a_stop_ends_the_rest_and_the_step_is_finished_without_more(model_dir):
    fake, is_stopping = FakeTime(), False

    def stop() -> None:
        nonlocal is_stopping
        is_stopping = True

    fake.on_sleep = stop
    pace = Pace(100.0, lambda: is_stopping, clock=fake.clock, sleep=fake.sleep)
    stopped, plain = make_trainer(model_dir, pace), make_trainer(model_dir)
    decoder_layers(stopped.live.model)[0].register_forward_pre_hook(lambda *_: fake.pass_by(1.0))
    assert stopped.step(EXAMPLE, 1e-3) == plain.step(EXAMPLE, 1e-3)
    assert len(fake.rests) == 1
    assert fake.durations()[0] < 0.1, "the rest that the stop met was cut off"
    assert not differing(weights(plain), weights(stopped)), "a step is whole, also then"


def test_without_a_pace_no_hook_exists_and_closing_takes_them_away(model_dir):
    trainer = make_trainer(model_dir, Pace(0.0))
    assert not any(module._forward_hooks for module in trainer.live.model.modules())
    trainer.close()
    fake = FakeTime()
    paced = Trainer(trainer.live, trainer.options, Pace(1.0, clock=fake.clock, sleep=fake.sleep))
    layers = decoder_layers(paced.live.model)
    assert [len(layer._forward_hooks) for layer in layers] == [1, 1, 1]
    paced.close()
    assert not any(layer._forward_hooks for layer in layers)


def test_a_forward_pass_outside_of_a_step_is_not_paced(model_dir):
    fake = FakeTime()
    trainer = timed_trainer(model_dir, fake, 1.0)
    trainer.logprobs(EXAMPLE.input_ids)
    trainer.step(EXAMPLE, 1e-3)
    rests = list(fake.rests)
    trainer.logprobs(EXAMPLE.input_ids)
    assert fake.rests == rests
    assert rests[0][0] == pytest.approx(100.0 + 4 * FORWARD_S), "the first is after logprobs and one layer"


def test_a_model_without_marked_layers_is_named_once_and_rests_after_the_example(caplog):
    fake, layer = FakeTime(), nn.Linear(2, 2)
    pace = Pace(1.0, clock=fake.clock, sleep=fake.sleep).attach(layer)
    for _ in range(2):
        with pace:
            layer(torch.ones(1, 2)).sum().backward()
            fake.pass_by(0.5)
    assert fake.durations() == pytest.approx([0.5, 0.5])
    assert caplog.text.count("no decoder layers") == 1


def test_the_worker_paces_by_its_configuration_and_a_signal_stops_it(tmp_path):
    model_dir, config = make_tiny_model(tmp_path / "model"), make_config(tmp_path)
    config = msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, pace=100.0))
    with Exporter(model_dir, config.runtime_dir), TurnedByHand(config) as trainer:
        job_id = trainer.submit("one", epochs=1000)
        before = signal.signal(signal.SIGALRM, lambda *_: trainer.board.stopping.set())
        try:
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            started = time.monotonic()
            trainer.worker.train(trainer.queue.take())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - started < 30
        done = trainer.queue.get(job_id)
        assert done.state in ("running", "queued"), "the next worker goes on with it"
        # An unpaced step of this model is some 20 ms: in a second without rests there would be dozens.
        assert 1 <= done.steps_done < 10


@pytest.mark.parametrize("value", ["-0.5", "nan", "inf", "101", "'much'", "true"])
def test_a_pace_that_cannot_be_meant_is_refused(value):
    with pytest.raises(ConfigError, match=r"APOLLO_WORKER__PACE.*worker\.pace: Expected `float`"):
        load_config(environ={"APOLLO_WORKER__PACE": value})


def test_a_pace_is_taken_from_file_and_environment(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[worker]\npace = 0.5\n")
    assert load_config(environ={}).worker.pace == 0.0
    assert load_config(file, environ={}).worker.pace == 0.5
    assert load_config(file, environ={"APOLLO_WORKER__PACE": "1"}).worker.pace == 1.0
