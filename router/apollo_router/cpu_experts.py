"""CPU only: the routed experts of a mixture, computed from the live weights.

vLLM's CPU backend packs w13 and w2 for a grouped product, or hands them to zentorch: copies that training
would not reach. Leans on vllm/model_executor/layers/fused_moe/experts/cpu_moe.py (0.32).
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

# Of gpt-oss; vLLM's own kernels have them as constants as well (fused_moe/activation.py).
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


class LiveExperts(CPUUnquantizedExperts):
    """vLLM's experts, as one product for each expert that has tokens."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is padded, packed or handed on."""

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
        expert_map, a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta,
        apply_router_weight_on_input,
    ) -> None:  # fmt: skip
        """Sums in fp32. With apply_router_weight_on_input the states that come here are weighted already."""
        total = torch.zeros(output.shape, dtype=torch.float32)
        ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        for expert in ids.unique().tolist():
            if expert < 0:  # held by another process
                continue
            token, slot = torch.nonzero(ids == expert, as_tuple=True)
            inner = nn.functional.linear(hidden_states[token], w1[expert], _row(self.w1_bias, expert, w1))
            inner = activate(inner.float(), activation).to(w2.dtype)
            out = nn.functional.linear(inner, w2[expert], _row(self.w2_bias, expert, w2)).float()
            if not apply_router_weight_on_input:
                out *= topk_weights[token, slot, None]
            total.index_add_(0, token, out)
        output.copy_(total)


def _row(bias: torch.Tensor | None, expert: int, weight: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias[expert].to(weight.dtype)


def activate(x: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    """(tokens, 2 I) -> (tokens, I), for what CPUUnquantizedExperts says that it supports."""
    if activation == MoEActivation.SWIGLUOAI:  # gate and up take turns
        gate, up = x[:, ::2].clamp(max=SWIGLU_LIMIT), x[:, 1::2].clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)
    gate, up = x.chunk(2, dim=-1)
    if activation == MoEActivation.SILU:
        return nn.functional.silu(gate) * up
    approximate = "tanh" if activation == MoEActivation.GELU_TANH else "none"
    return nn.functional.gelu(gate, approximate=approximate) * up


def use_live_experts(method: object) -> None:
    """Before the method has made its kernel."""
    if type(method) is UnquantizedFusedMoEMethod and issubclass(
        method.experts_cls or object, CPUUnquantizedExperts
    ):
        method.experts_cls = LiveExperts
