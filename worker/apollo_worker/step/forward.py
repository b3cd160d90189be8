"""From tokens to the loss: one forward pass over a batch of sequences. Legend: B = sequences, S = tokens of
the longest, T = targets of all, V = vocabulary, H = hidden size."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.model.hf_model import vocab_size_of
from apollo_worker.model.live_model import LiveModel
from apollo_worker.step.loss import (
    IGNORED,
    SoftTargets,
    gather_targets,
    loss_of_logits,
    target_loss,
    teacher_of,
    token_logprobs,
)
from apollo_worker.step.objectives import Policy
from apollo_worker.step.packing import PackedRow
from apollo_worker.step.update import Row

UNLIMITED = 2**31


class Batch(NamedTuple):
    """Sequences on the model's device: ids (B, S), padded on the right; labels (B, S) on the CPU, IGNORED
    where not a target. Where sequences share a row: mask (B, 1, S, S), added to attention's logits, and
    positions (B, S). Of all targets, row after row: coefficients (T,) fp32, teacher, policy."""

    ids: Tensor
    labels: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    coefficients: Tensor | None = None
    teacher: SoftTargets | None = None
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
    """head: None where the model makes its logits in a way of its own; longest_shared: tokens of the longest
    sequence that may share a row with others, 0 where this model's cannot."""

    def __init__(self, live: LiveModel, chunk_tokens: int):
        self.live, self._chunk_tokens = live, chunk_tokens
        self.head = read_head(live.model)
        if not self._head_is_exact():
            self.head = None
        self.longest_shared = self._longest_shared()

    def batch_of(self, rows: Sequence[Row], layout: Sequence[PackedRow] | None = None) -> Batch:
        """What is trained of them, in one pass. layout: of those that are in it; None: each in a row of its
        own."""
        device, laid = self.live.device, layout or _one_each([row.example for row in rows])
        rows = [rows[at] for line in laid for at in line.at]
        examples = [row.example for row in rows]
        batch = self._laid_out(examples, laid)
        teachers = None
        if any(one.top_logprobs is not None for one in examples):
            given = (one.top_logprobs or [None] * one.num_targets for one in examples)
            teachers = [teacher for some in given for teacher in some]
        teacher = teacher_of(batch.labels[batch.labels != IGNORED], teachers, rows[0].target_probability)
        if teacher is not None:
            teacher = teacher.each(lambda part: part.to(device))
        coefficients = torch.cat([row.coefficients for row in rows]).to(device)
        return batch._replace(coefficients=coefficients, teacher=teacher, policy=_joint_policy(rows, device))

    def read(self, examples: Sequence[TokenisedExample], layout: Sequence[PackedRow] | None = None) -> Batch:
        """Without what the targets count. layout: as for `batch_of`."""
        laid = layout or _one_each(examples)
        return self._laid_out([examples[at] for line in laid for at in line.at], laid)

    def loss(self, batch: Batch) -> Tensor:
        """The sum of all targets' terms, 0-dim fp32, differentiable."""
        terms: dict[str, Any] = {
            "coefficients": batch.coefficients, "teacher": batch.teacher, "policy": batch.policy,
        }  # fmt: skip
        if self.head is None:
            return loss_of_logits(*self._own_logits(batch), **terms, is_mean=False)
        hidden, targets = gather_targets(self._hidden(batch), batch.labels)
        layer, options = self.head.layer, self.head.options(self._chunk_tokens)
        with self.live.weights_of(layer):
            return target_loss(hidden, layer.weight, layer.bias, targets, **terms, is_mean=False, **options)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """log p of each target, (T,) fp32, without gradient."""
        if self.head is None:
            logits, targets = self._own_logits(batch)
            return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        hidden, targets = gather_targets(self._hidden(batch), batch.labels)
        layer, options = self.head.layer, self.head.options(self._chunk_tokens)
        with self.live.weights_of(layer):
            return token_logprobs(hidden, layer.weight, layer.bias, targets, **options)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, S, H): the base model's last hidden states."""
        return self._hidden(Batch(ids, ids))

    def _hidden(self, batch: Batch) -> Tensor:
        return self.live.model.base_model(**_inputs(batch)).last_hidden_state

    def _own_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """((T, V), (T,)) by the model's own forward pass, for heads that we do not know."""
        return gather_targets(self.live.model(**_inputs(batch)).logits, batch.labels)

    def _laid_out(self, examples: Sequence[TokenisedExample], layout: Sequence[PackedRow]) -> Batch:
        """examples: in the order of the layout."""
        device, dtype = self.live.device, self.live.model.dtype
        ids, labels, owner, positions = _lines(examples, layout)
        if all(len(line.at) == 1 for line in layout):
            return Batch(ids.to(device), labels)
        mask = _mask(owner.to(device), dtype)
        return Batch(ids.to(device), labels, mask, positions.to(device))

    @torch.no_grad()
    def _longest_shared(self) -> int:
        """Tokens of the longest sequence that may share a row with others; 0: this model cannot. Not where a
        layer is recurrent or looks at a chunk of positions, and no sequence longer than a layer's window: the
        mask takes its place."""
        config = self.live.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        is_windowed = "sliding_attention" in kinds or (
            window and len(kinds) == 1 and getattr(config, "use_sliding_window", True)
        )
        if not kinds <= {"full_attention", "sliding_attention"} or not self._mask_is_exact():
            return 0
        return int(window) if is_windowed and window else UNLIMITED

    @torch.no_grad()
    def _mask_is_exact(self) -> bool:
        """Whether two sequences in one row give the hidden states that each gives alone."""
        size = vocab_size_of(self.live.model)
        ids = [[at * 7 % size for at in some] for some in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 8, 9, 10, 11, 12])]
        two = [TokenisedExample(some, [False] * len(some)) for some in ids]
        try:
            row = self._hidden(self.read(two, [PackedRow([0, 1], 3, 11)]))[0].float()
            alone = [self._hidden(self.read([one]))[0].float() for one in two]
        except (TypeError, ValueError, RuntimeError):  # takes no mask of this kind, or no positions
            return False
        expected = torch.cat([alone[0], alone[1][3:]])
        # bf16 rounds at different places in the two.
        return torch.allclose(row, expected, rtol=0, atol=4 * 2**-7 * float(expected.abs().max() + 1))

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


def _inputs(batch: Batch) -> dict[str, Any]:
    shared = {} if batch.mask is None else {"attention_mask": batch.mask, "position_ids": batch.positions}
    return {"input_ids": batch.ids, "use_cache": False, **shared}


def _one_each(examples: Sequence[TokenisedExample]) -> list[PackedRow]:
    return [PackedRow([at], 0, len(one.input_ids)) for at, one in enumerate(examples)]


def _lines(
    examples: Sequence[TokenisedExample], layout: Sequence[PackedRow]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, labels, owner, positions), (B, S) each, on the CPU. owner: the number of a token's sequence in
    its row; -1 what its sequences share, -2 padding."""
    longest = max(line.length for line in layout)
    ids = torch.zeros(len(layout), longest, dtype=torch.int64)
    labels, positions = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    owner, left = torch.full_like(ids, -2), iter(examples)
    for row, line in enumerate(layout):
        at = 0
        for number, one in enumerate(islice(left, len(line.at))):
            tokens = torch.tensor(one.input_ids)
            first = line.shared if number else 0
            end = at + len(tokens) - first
            ids[row, at:end], owner[row, at:end] = tokens[first:], number
            labels[row, at:end] = torch.where(torch.tensor(one.is_target), tokens, IGNORED)[first:]
            positions[row, at:end] = torch.arange(first, len(tokens))
            at = end
        owner[row, : line.shared] = -1
    return ids, labels, owner, positions


def _mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, S): 0 where a token sees another one, else the least number; each sees itself."""
    length = owner.shape[1]
    sees = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
    sees &= torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    least = torch.finfo(dtype).min
    return torch.zeros(sees.shape, dtype=dtype, device=owner.device).masked_fill_(~sees, least)[:, None]


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
