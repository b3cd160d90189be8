"""The gradients of one update, before the optimizer uses them up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apollo_worker.step.packing import PackedRow

if TYPE_CHECKING:
    import torch
    from apollo_worker.jobs.example import TokenisedExample
    from apollo_worker.step.step import Trainer


def gradients_of(trainer: Trainer, examples: list[TokenisedExample]) -> tuple[float, dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}
    names = {p: name for name, p in trainer.live.model.named_parameters()}

    def remember(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        seen[names[parameter]], parameter.grad = parameter.grad.float(), None

    trainer.optimizer.update_parameter = remember
    loss = trainer.step_on(examples, 1e-3).loss
    return loss, seen


def one_each(examples: list[TokenisedExample], *_: object) -> list[list[PackedRow]]:
    """In place of `packed`: a pass for each example."""
    return [[PackedRow([at], 0, len(one.input_ids))] for at, one in enumerate(examples)]
