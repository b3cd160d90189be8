"""CPU only: vLLM's layers made to compute from the live weights instead of packed copies of them.

Leans on vllm/model_executor/layers/{linear,vocab_parallel_embedding}.py and mamba/ops/cpu/gdn_attention.py.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from apollo_ipc import cpu_products


class LiveLinearMethod(UnquantizedLinearMethod):
    """vLLM's linear layer, computing from the live weight: no packed copy that training would not reach."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.cpu_linear = cpu_products.linear  # pyright: ignore[reportArgumentType]


class LiveEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The same for embeddings and lm_head, which vLLM's CPU backend packs as well."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.cpu_linear = cpu_products.linear  # pyright: ignore[reportArgumentType]


def compute_from_live_weights(model: nn.Module) -> None:
    """CPU only: replaces the layer methods that would prepack (oneDNN, AMX, zentorch) by ones that do not.

    vLLM's prepacking leaves the parameter with shape [0] or unread, so training it would change nothing.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if type(method) is UnquantizedLinearMethod:
            method.__class__ = LiveLinearMethod
        elif type(method) is UnquantizedEmbeddingMethod:
            method.__class__ = LiveEmbeddingMethod
        elif type(method).__name__ == "UnquantizedFusedMoEMethod":
            _use_live_experts(method)
    _unpack_causal_conv()


def _use_live_experts(method: object) -> None:
    try:  # only where a model has experts: a vLLM without these layers serves all the others
        experts = importlib.import_module("apollo_router.cpu_experts")
    except ImportError:  # what that vLLM packs is then named in the manifest (derived.py)
        return
    experts.use_live_experts(method)


def _unpack_causal_conv() -> None:
    """Gated delta net: on CPUs with AVX512-BF16 the convolution's kernels take a packed weight by default.

    They take a plain one as well, by the flag `is_weight_packed` (vllm/_custom_ops.py); the layer code passes
    True unconditionally (mamba/ops/cpu/gdn_attention.py), so the two helpers there are wrapped.
    """
    try:
        gdn = importlib.import_module("vllm.model_executor.layers.mamba.ops.cpu.gdn_attention")
    except ImportError:
        return
    for name in ("_causal_conv1d_fwd_cpu", "_causal_conv1d_update_cpu"):
        packed = getattr(gdn, name, None)
        if packed is None or getattr(packed, "reads_live_weight", False):
            continue

        def live(*, x: torch.Tensor, weight: torch.Tensor, is_weight_packed: bool, _packed=packed, **rest):
            if weight.dim() == 3:  # (channels, 1, width) as the parameter has it
                weight, is_weight_packed = weight.view(weight.size(0), weight.size(2)), False
            if x.dim() == 2 and x.size(1) == 1:
                # A prompt of one token: its (channels, 1) slice keeps the stride of the wider tensor, which
                # the kernel refuses ("expect x to be transposed"), and vLLM 0.32 itself dies of it.
                x = x.as_strided(x.shape, (1, x.size(0)))
            return _packed(x=x, weight=weight, is_weight_packed=is_weight_packed, **rest)

        live.reads_live_weight = True
        setattr(gdn, name, live)
