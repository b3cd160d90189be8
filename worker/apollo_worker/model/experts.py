"""Which parameters of a model hold experts, and which choose among them: told by their shapes and places."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd


def expert_stacks(model: nn.Module) -> set[str]:
    """Names of the parameters that hold one matrix, or one bias, for each expert along their first dimension.

    A matrix for each expert is what no other layer of a language model has but a convolution.
    """
    found: set[str] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            num = _num_experts(module)
            if num is not None and parameter.dim() in (2, 3) and len(parameter) == num:
                found.add(f"{prefix}.{name}".lstrip("."))
    return found


def routers(model: nn.Module) -> set[str]:
    """Names of the parameters that score the experts: a row and perhaps a bias for each, in a module beside
    theirs."""
    found: set[str] = set()
    for prefix, block in model.named_modules():
        nums = {num for child in block.children() if (num := _num_experts(child)) is not None}
        for child_name, child in block.named_children():
            own = dict(child.named_parameters(recurse=False))
            if _num_experts(child) is None and any(p.dim() == 2 and len(p) in nums for p in own.values()):
                found |= {f"{prefix}.{child_name}.{name}".lstrip(".") for name in own}
    return found


def set_routers(model: nn.Module, *, is_trained: bool) -> None:
    frozen = set() if is_trained else routers(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _num_experts(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd):
        return None
    return next((len(p) for p in module.parameters(recurse=False) if p.dim() == 3), None)
