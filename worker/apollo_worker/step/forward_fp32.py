"""The model's own weights, computed in fp32: what a forward pass in bf16 is held against.

Legend: B = prompts, S = tokens of a prompt.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnnecessaryComparison=false, reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo_worker.step.forward import Head

VOCAB_CHUNK = 8192  # rows of the head that are fp32 at a time


@torch.no_grad()
def logprobs_in_fp32(model: PreTrainedModel, head: Head | None, prompts: Tensor) -> Tensor:
    """log p of each token given those before it, (B, S - 1) fp32 on the CPU. prompts: (B, S) int64.

    head: the trainer's, which is known to be exact; None: the model's own forward pass makes the logits.
    Memory: one decoder layer, or one chunk of the head, in fp32 at a time. The weights stay as they are.
    """
    prompts = prompts.to(next(model.parameters()).device)
    with ExitStack() as stack:
        for hooks in _hooks(model, head):
            stack.enter_context(hooks)
        if head is None:
            logits = model(input_ids=prompts, use_cache=False).logits[:, :-1].float()
            return _pick(logits.log_softmax(-1), prompts[:, 1:]).cpu()
        base: Any = model.base_model
        hidden = base(input_ids=prompts, use_cache=False).last_hidden_state[:, :-1]
    sums, picked = [], []
    for start in range(0, head.layer.weight.shape[0], VOCAB_CHUNK):
        logits = _logits(head, hidden, slice(start, start + VOCAB_CHUNK))
        index = prompts[:, 1:] - start
        is_here = (index >= 0) & (index < logits.shape[-1])
        sums.append(logits.logsumexp(-1))
        picked.append(torch.where(is_here, _pick(logits, index.clamp(0, logits.shape[-1] - 1)), 0.0))
    return (torch.stack(picked).sum(0) - torch.stack(sums).logsumexp(0)).cpu()


def _pick(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(-1, index[..., None])[..., 0]


def _logits(head: Head, hidden: Tensor, rows: slice) -> Tensor:
    bias = None if head.layer.bias is None else head.layer.bias[rows].float()
    logits = nn.functional.linear(hidden.float(), head.layer.weight[rows].float(), bias)
    logits = logits * (head.logit_scale or 1.0)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _hooks(model: PreTrainedModel, head: Head | None) -> Iterator[Any]:
    """Each decoder layer is widened whole, since a layer may reach into its parts; outside of them each
    module that has parameters is. What an embedding looks up is widened, not its table."""
    inside: set[nn.Module] = {head.layer} if head is not None else set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            parts = list(module.modules())
            inside.update(parts)
            yield _in_fp32(module, parts)
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.Embedding):
            yield module.register_forward_hook(lambda _module, _inputs, output: output.float())
        elif any(True for _ in module.parameters(recurse=False)):
            yield _in_fp32(module, [module])


@contextmanager
def _in_fp32(module: nn.Module, parts: list[nn.Module]) -> Generator[None]:
    """Inside, `module` computes with fp32 copies of its parameters: they live as long as its forward pass."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def widen(*_: Any) -> None:
        for part in parts:
            own: dict[str, Any] = part._parameters
            kept.append((own, dict(own)))
            for name, value in own.items():
                if value is not None:
                    own[name] = nn.Parameter(value.float(), requires_grad=False)

    def narrow(*_: Any) -> None:
        while kept:
            own, before = kept.pop()
            own.update(before)

    hooks = [
        module.register_forward_pre_hook(widen),
        module.register_forward_hook(narrow, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        narrow()
