"""The trainable model: transformers' own class for the checkpoint, built around tensors that already exist.

Nothing is allocated for parameters: they are declared on the meta device and then replaced by the live views.
Buffers (rotary tables with the model's own scaling) are computed for real by the model's constructors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from apollo_ipc.errors import AttachError


def read_model_config(model_dir: Path) -> PreTrainedConfig:
    """Raises AttachError where transformers does not know the model."""
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AttachError(f"transformers cannot read the model in {model_dir}: {error}") from None


def build_model(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The text model of `model_dir` with every parameter on the meta device and every buffer on the CPU.

    Raises AttachError where transformers has no causal language model for the configuration.
    """
    config = read_model_config(model_dir)
    try:
        try:
            model = _declare(config, dtype, "sdpa")
        except ValueError:  # attention with sinks has no sdpa
            model = _declare(config, dtype, "eager")
    except ValueError as error:
        raise AttachError(f"transformers has no causal language model for {model_dir}: {error}") from None
    model.tie_weights()
    return model


def _declare(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, each parameter moves to the meta device the moment a module registers it; buffers do not."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def vocab_size_of(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids below it are valid."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def parameter_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """First name -> all names, of each distinct parameter (tied ones have several)."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {group[0]: group for group in names.values()}


def checkpoint_names(model: PreTrainedModel, available: set[str]) -> tuple[dict[str, str], list[str]]:
    """(parameter -> checkpoint tensor, parameters without one), of the tensors `available`.

    A checkpoint may use other names than the model's parameters (`embed_out` for `lm_head`,
    `model.language_model.` for `model.`): transformers' own loading rules translate them.
    """
    own = _names_by_parameter(model, available)
    found, missing = {}, []
    for first, names in parameter_names(model).items():
        hit = next((own[name] for name in names if name in own), None)
        if hit is None:
            missing.append(first)
        else:
            found[first] = hit
    return found, missing


def _names_by_parameter(model: PreTrainedModel, available: set[str]) -> dict[str, str]:
    """Model's name -> checkpoint's name. Tensors that transformers merges or splits in loading have none:
    merged.py."""
    rules = NameRules(model)
    found = {name: name for name in available if name in rules.declared}
    for name in available:
        own, pattern = rules.own_name(name)
        if pattern is None:
            found.setdefault(own, name)
    return found


class NameRules:
    """transformers' own rules from a checkpoint's names to those of `model`."""

    def __init__(self, model: PreTrainedModel):
        rules = get_model_conversion_mapping(model)
        self._renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self.declared = model.base_model_prefix, model.state_dict()

    def own_name(self, name: str) -> tuple[str, str | None]:
        """(the model's name for it, the pattern of the converter that takes it: None where there is none)."""
        return rename_source_key(name, self._renamings, self._converters, self._prefix, self.declared)

    def converter(self, pattern: str) -> WeightConverter:
        return next(rule for rule in self._converters if pattern in rule.source_patterns)


def fill_parameters(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> None:
    """Replaces every parameter by the tensor of the same name, tied ones by the same object.

    tensors: name -> live tensor; names: parameter -> name among them (of `checkpoint_names`).
    Raises AttachError naming each parameter whose shape contradicts the model's configuration.
    """
    wrong = []
    for first, group in parameter_names(model).items():
        live = tensors[names[first]]
        declared = model.get_parameter(first)
        if live.shape != declared.shape:
            wrong.append(f"{first}: served {list(live.shape)}, configuration {list(declared.shape)}")
            continue
        parameter = nn.Parameter(live, requires_grad=True)
        for name in group:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = parameter
    if wrong:
        raise AttachError(
            f"shapes contradict the model's configuration: {'; '.join(wrong[:5])}", refused=wrong
        )


def fill_buffers(model: PreTrainedModel, model_dir: Path, device: torch.device) -> None:
    """Moves buffers to `device`; those that the checkpoint stores are read from it."""
    from apollo_ipc.checkpoint import shard_index

    stored = shard_index(model_dir)
    kept = set(model.state_dict().keys())
    for name, buffer in list(model.named_buffers()):
        if name in stored and name in kept:
            from safetensors import safe_open

            with safe_open(model_dir / stored[name].shard, "pt") as shard:
                buffer = shard.get_tensor(name).to(buffer.dtype)
        if buffer.device.type == "meta":
            raise AttachError(f"buffer {name} was left without a value", refused=[name])
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.to(device)
