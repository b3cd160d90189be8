"""The tensors of checkpoint.py: two states of one model, ten steps of training apart, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from apollo_worker.optimizer.apollo import Apollo
from safetensors.torch import save_file

NUM_TENSORS, NUM_SHARDS = 64, 8
COLUMNS = 2048
STEPS = 10
LEARNING_RATE = 1e-5


class BenchModel:
    """`live` holds, tensor by tensor, the state before or after training; `set` chooses which.

    Weights are normal with a standard deviation of 0.02, in bf16. The state after is what our own optimizer
    (APOLLO, rank 64, stochastic rounding, lr 1e-5) makes of them in ten steps on noise: gradients normal and
    new in each step.
    """

    def __init__(self, model_dir: Path, total_bytes: int):
        rows = max(64, total_bytes // 2 // NUM_TENSORS // COLUMNS)
        generator = torch.Generator().manual_seed(0)
        self.names = [f"model.layers.{number:02}.weight" for number in range(NUM_TENSORS)]
        self._before = {
            name: (torch.randn(rows, COLUMNS, generator=generator) * 0.02).bfloat16() for name in self.names
        }
        self._after = _trained(self._before, generator)
        self.live = {name: tensor.clone() for name, tensor in self._before.items()}
        self._is_after = dict.fromkeys(self.names, False)
        self.model_dir = model_dir
        self.shards = {
            f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors": names
            for number, names in enumerate(_parts(self.names, NUM_SHARDS))
        }
        model_dir.mkdir(parents=True)
        for shard, names in self.shards.items():
            save_file({name: self.live[name] for name in names}, model_dir / shard)
        weight_map = {name: shard for shard, names in self.shards.items() for name in names}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.live.values())

    def changed(self, fraction: float) -> list[str]:
        """The first so many of the tensors, as after training some layers; one at least, unless 0."""
        return self.names[: round(len(self.names) * fraction) or bool(fraction)]

    def turn(self, names: list[str]) -> None:
        """Each of `names` gets its other state; the rest stay as they are."""
        for name in names:
            self._is_after[name] = not self._is_after[name]
            self.live[name].copy_((self._after if self._is_after[name] else self._before)[name])

    def moved_fraction(self) -> float:
        """Of all elements: those that training has moved."""
        moved = sum(int((self._before[name] != self._after[name]).sum()) for name in self.names[:4])
        return moved / sum(self._before[name].numel() for name in self.names[:4])


def _trained(before: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    after = {}
    for name, weight in before.items():
        param = torch.nn.Parameter(weight.clone())
        optimizer = Apollo([(name, param)], lr=LEARNING_RATE)
        # One row of noise, read from another place each time: new numbers for each element and step.
        noise = torch.randn(weight.numel() + 4096, generator=generator).bfloat16()
        for step in range(STEPS):
            start = 397 * step
            param.grad = noise[start : start + weight.numel()].view_as(weight)
            optimizer.step()
        after[name] = param.detach()
    return after


def _parts(names: list[str], num: int) -> list[list[str]]:
    size = -(-len(names) // num)
    return [names[start : start + size] for start in range(0, len(names), size)]
