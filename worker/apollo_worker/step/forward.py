"""From tokens to the loss: one forward pass over a batch of sequences. Legend: B = sequences, S = tokens of
the longest, T = targets of all, V = vocabulary, H = hidden size."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.live_model import LiveModel
from apollo_worker.step.loss import (
    IGNORED,
    Teacher,
    gather_targets,
    loss_of_logits,
    target_loss,
    teacher_of,
    token_logprobs,
)
from apollo_worker.step.objectives import Policy
from apollo_worker.step.update import Row


class PaddedRows(NamedTuple):
    """Sequences on the model's device: ids (B, S), padded on the right; labels (B, S) on the CPU, IGNORED
    where not a target; of all targets, row after row: coefficients (T,) fp32, teacher, policy."""

    ids: Tensor
    labels: Tensor
    coefficients: Tensor | None = None
    teacher: Teacher | None = None
    policy: Policy | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """How this model makes logits of hidden states: `softcap(logit_scale * (W h + b))`."""

    layer: nn.Linear
    softcap: float | None
    logit_scale: float | None

    def options(self, chunk_tokens: int) -> dict[str, Any]:
        return {"chunk_tokens": chunk_tokens, "softcap": self.softcap, "logit_scale": self.logit_scale}


class Forward:
    """head: None where the model makes its logits in a way of its own."""

    def __init__(self, live: LiveModel, chunk_tokens: int):
        self.live, self._chunk_tokens = live, chunk_tokens
        self.head = read_head(live.model)
        if not self._head_is_exact():
            self.head = None

    def batch_of(self, rows: Sequence[Row]) -> PaddedRows:
        """What is trained of them, in one pass."""
        device, examples = self.live.device, [row.example for row in rows]
        ids, labels = _padded(examples)
        teachers = None
        if any(one.top_logprobs is not None for one in examples):
            given = (one.top_logprobs or [None] * one.num_targets for one in examples)
            teachers = [teacher for some in given for teacher in some]
        teacher = teacher_of(labels[labels != IGNORED], teachers)
        if teacher is not None:
            teacher = Teacher(teacher.ids.to(device), teacher.logprobs.to(device))
        coefficients = torch.cat([row.coefficients for row in rows]).to(device)
        return PaddedRows(ids.to(device), labels, coefficients, teacher, _joint_policy(rows, device))

    def read(self, examples: Sequence[TokenisedExample]) -> PaddedRows:
        """Without what the targets count."""
        ids, labels = _padded(examples)
        return PaddedRows(ids.to(self.live.device), labels)

    def loss(self, batch: PaddedRows) -> Tensor:
        """The sum of all targets' terms, 0-dim fp32, differentiable."""
        ids, labels, *given = batch
        terms: dict[str, Any] = dict(zip(("coefficients", "teacher", "policy"), given, strict=True))
        if self.head is None:
            return loss_of_logits(*self._own_logits(batch), **terms, is_mean=False)
        hidden, targets = gather_targets(self.hidden(ids), labels)
        layer, options = self.head.layer, self.head.options(self._chunk_tokens)
        return target_loss(hidden, layer.weight, layer.bias, targets, **terms, is_mean=False, **options)

    @torch.no_grad()
    def logprobs(self, batch: PaddedRows) -> Tensor:
        """log p of each target, (T,) fp32, without gradient."""
        if self.head is None:
            logits, targets = self._own_logits(batch)
            return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        hidden, targets = gather_targets(self.hidden(batch.ids), batch.labels)
        layer, options = self.head.layer, self.head.options(self._chunk_tokens)
        return token_logprobs(hidden, layer.weight, layer.bias, targets, **options)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, S, H): the base model's last hidden states."""
        return self.live.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def _own_logits(self, batch: PaddedRows) -> tuple[Tensor, Tensor]:
        """((T, V), (T,)) by the model's own forward pass, for heads that we do not know."""
        return gather_targets(self.live.model(input_ids=batch.ids, use_cache=False).logits, batch.labels)

    @torch.no_grad()
    def _head_is_exact(self) -> bool:
        """Whether hidden states through `self.head` give what the model's own forward pass gives."""
        if self.head is None:
            return False
        ids = torch.arange(8, device=self.live.device)[None] % self.head.layer.weight.shape[0]
        expected = self.live.model(input_ids=ids, use_cache=False).logits[0].float()
        logits = self.head.layer(self.hidden(ids)[0]).float() * (self.head.logit_scale or 1.0)
        if (cap := self.head.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        # bf16 rounds at different places in the two: 2**-7 of the largest logit, a few times over.
        return bool(
            torch.allclose(logits, expected, rtol=0, atol=4 * 2**-7 * float(expected.abs().max() + 1))
        )


def _padded(examples: Sequence[TokenisedExample]) -> tuple[Tensor, Tensor]:
    """(ids, labels), (B, S) each, on the CPU."""
    longest = max(len(one.input_ids) for one in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, one in enumerate(examples):
        num = len(one.input_ids)
        ids[row, :num] = torch.tensor(one.input_ids)
        labels[row, :num] = torch.where(torch.tensor(one.is_target), ids[row, :num], IGNORED)
    return ids, labels


def _joint_policy(rows: Sequence[Row], device: torch.device) -> Policy | None:
    policies = [row.policy for row in rows if row.policy is not None]
    if not policies:
        return None
    objective, *given = zip(*policies, strict=True)

    def joint(values: tuple[Tensor | None, ...]) -> Tensor | None:
        there = [value for value in values if value is not None]
        assert len(there) in (0, len(rows))
        return torch.cat(there).to(device) if there else None

    sampled, advantages, reference = map(joint, given)
    assert advantages is not None
    return Policy(objective[0], sampled, advantages, reference)


def read_head(model: Any) -> Head | None:
    """The head by the names that transformers' configurations use; None where the output is not linear."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        return None
    config = model.config
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / divisor
    return Head(layer, getattr(config, "final_logit_softcapping", None), scale)


def enable_activation_checkpointing(model: Any) -> None:
    """Recomputes each layer's activations in backward. Dropout stays off: only the layers' flag is set."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def max_tokens_of(model: Any, max_tokens: int) -> int:
    """The longest sequence that is trained: as configured, or as many as the model has positions."""
    return min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
