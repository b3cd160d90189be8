"""Cross entropy at target positions, in chunks, with the gradient computed in the forward pass.

Full fp32 logits of 2,048 tokens over Qwen3.5's vocabulary of 248,320 take 2 GB, and autograd keeps several
such tensors. Here logits exist only for the positions that are trained on, `chunk_tokens` of them at a
time, and are gone before the next chunk. Legend: T = target tokens, H = hidden size, V = vocabulary.

Memory beside inputs: about 2 * chunk_tokens * V * 4 bytes, T * H * 4 for the hidden gradient, and, where
the head is trained, V * H * 4 for its gradient: summed over chunks in fp32, since a bf16 sum drops what
later chunks add. It becomes the head's dtype at the end of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a position that is not trained on, as in transformers and torch


def gather_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a target, and the targets: ((T, H), (T,) int64 on hidden's device).

    hidden: (S, H) or (B, S, H); labels: (S,) or (B, S), IGNORED where there is no target. As in
    transformers, label i is predicted at position i - 1 and the first label of a sequence by nothing.
    Labels on the CPU avoid a wait for the device.
    """
    labels = labels.reshape(-1, labels.shape[-1])[:, 1:]
    hidden = hidden.reshape(len(labels), -1, hidden.shape[-1])[:, :-1]
    row, position = torch.nonzero(labels != IGNORED, as_tuple=True)
    targets = labels[row, position].to(device=hidden.device, dtype=torch.int64)
    return hidden[row.to(hidden.device), position.to(hidden.device)], targets


def target_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_tokens: int = 64,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """Mean cross entropy over the targets: 0-dim fp32, differentiable once.

    hidden: (T, H) at the positions that predict `targets` (T,) int64; lm_head_weight: (V, H); bias: (V,).
    Logits are rounded to the weight's dtype, as transformers and vLLM have them, then fp32 throughout.
    logit_scale: multiplies the logits (Cohere's logit_scale; Granite's is 1 / logits_scaling);
    softcap: then softcap * tanh(logits / softcap) (Gemma 2's final_logit_softcapping).
    """
    assert len(targets) > 0, "no targets"
    inputs = (hidden, lm_head_weight, lm_head_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _TargetLoss.apply(*inputs, targets, chunk_tokens, softcap, logit_scale)
    return -token_logprobs(
        *inputs, targets, chunk_tokens=chunk_tokens, softcap=softcap, logit_scale=logit_scale
    ).mean()


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_tokens: int = 64,
    softcap: float | None = None,
    logit_scale: float | None = None,
) -> Tensor:
    """log p(target) of each target, (T,) fp32, without gradient; arguments as for `target_loss`."""
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = _logits(hidden[rows], lm_head_weight, lm_head_bias, softcap, logit_scale)
        logprobs[rows] = _pick(logits, targets[rows]) - logits.logsumexp(dim=1)
    return logprobs


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float | None
) -> Tensor:
    """(rows, V) fp32, a new tensor."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    if logit_scale is not None:
        logits.mul_(logit_scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0]


class _TargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        softcap: float | None,
        logit_scale: float | None,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        new = {"dtype": torch.float32, "device": hidden.device}
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, **new) if needs_weight else None
        grad_bias = torch.zeros(weight.shape[0], **new) if needs_bias else None
        total = torch.zeros((), **new)
        for start in range(0, len(targets), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], weight, bias, softcap, logit_scale)
            logsumexp = logits.logsumexp(dim=1, keepdim=True)
            total += (logsumexp[:, 0] - _pick(logits, targets[rows])).sum()
            slope = None if softcap is None else 1 - (logits / softcap).square_()  # d cap*tanh(x/cap) / dx
            dlogits = logits.sub_(logsumexp).exp_()  # softmax, in the logits' memory
            dlogits.scatter_add_(1, targets[rows, None], torch.full_like(logsumexp, -1.0))
            dlogits.mul_((1.0 if logit_scale is None else logit_scale) / len(targets))
            if slope is not None:
                dlogits.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[rows] = dlogits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight.addmm_(dlogits.T, hidden[rows].float())
            if grad_bias is not None:
                grad_bias += dlogits.sum(dim=0)
        ctx.grads = [
            None if grad is None or like is None else grad.to(like.dtype)
            for grad, like in zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        ]
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Handed over, not kept: the head's gradient is the largest tensor of a training step.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("target_loss: backward was called a second time")
        return (*(None if g is None else g.mul_(grad_outputs[0]) for g in grads), None, None, None, None)
