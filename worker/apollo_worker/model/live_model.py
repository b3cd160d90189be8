"""The live model: transformers' model whose parameters are the memory that vLLM serves from.

`attach` builds it from a manifest; `load_offline` builds the same from a directory, without a server too.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.errors import AttachError
from apollo_ipc.manifest import Manifest
from apollo_worker.model.compare import compare
from apollo_worker.model.hf_model import (
    build_model,
    checkpoint_names,
    fill_buffers,
    fill_parameters,
    parameter_names,
)
from apollo_worker.model.host_buffer import DTYPES
from apollo_worker.model.live_tensor import LiveTensor, Pieced, place
from apollo_worker.model.mapping import Exporter, Transport, map_views, open_transport
from apollo_worker.model.merged import (
    Merged,
    groups_of,
    merge_in_own_memory,
    merged_parameters,
    merged_pieces,
)
from apollo_worker.model.on_use import GatherOnUse
from apollo_worker.model.pieces import map_pieces, missing_parts

log = logging.getLogger(__name__)
_SHARD_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass
class LiveModel:
    """A model to train in place.

    tensors: checkpoint name -> live tensor; names: parameter -> checkpoint name; parts: parameter that
    transformers merges in loading -> the checkpoint tensors in it.
    exporter is None, and there are no transports (one a rank), offline, where the memory is our own. copies:
    checkpoint tensor that repeats a tied one (a redundant lm_head) -> the one that it repeats. gathering:
    where several ranks hold pieces; None where each parameter is a view.
    """

    model: PreTrainedModel
    model_dir: Path
    tensors: dict[str, LiveTensor]
    names: dict[str, str]
    boot_id: str
    exporter: Exporter | None = None
    transports: list[Transport] = dataclasses.field(default_factory=list)
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    gathering: GatherOnUse | None = None

    @property
    def num_parameters(self) -> int:
        return len(self.names) + len(self.parts)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def is_alive(self) -> bool:
        """Whether the process that owns the memory still runs."""
        return not self.has_ended()

    def has_ended(self, wait_s: float = 0.0) -> bool:
        """Whether that process has ended, or does so within `wait_s`."""
        return self.exporter is not None and not self.exporter.is_alive(wait_s)

    def weights_of(self, module: nn.Module | None) -> AbstractContextManager[None]:
        """For the block this module's own parameters may be read without calling it."""
        if module is None or self.gathering is None:
            return nullcontext()
        return self.gathering.weights_of(module)

    def forgetting(self) -> AbstractContextManager[None]:
        """Around a forward pass that has a backward pass, which then holds no gathered weights."""
        return nullcontext() if self.gathering is None else self.gathering.forgetting()

    def forget(self, *parameters: torch.Tensor) -> None:
        """Lets go of what a backward pass has gathered of these, or of all, and no update will use."""
        if self.gathering is not None:
            self.gathering.forget(*parameters)

    def trained_tensors(self) -> dict[str, LiveTensor]:
        """Checkpoint name -> live tensor, of the parameters that this model has.

        A tied tensor under each of its names: a checkpoint that holds a copy of it would else keep the old
        values there, and transformers and vLLM untie two tensors that differ.
        """
        own = {name: self.tensors[name] for name in self.names.values()}
        own |= {name: self.tensors[name] for names in self.parts.values() for name in names}
        return own | {copy: self.tensors[name] for copy, name in self.copies.items()}

    def grid_dtypes(self) -> dict[str, torch.dtype]:
        """Parameter -> dtype of its checkpoint tensor: what is written is exact there."""
        index = shard_index(self.model_dir)
        first = self.names | {name: parts[0] for name, parts in self.parts.items()}
        found = {n: _SHARD_DTYPES.get(index[c].dtype) for n, c in first.items() if c in index}
        return {name: dtype for name, dtype in found.items() if dtype is not None}

    def close(self) -> None:
        """Lets go of every byte of the weights, then of the mapping. There is no model afterwards.

        A parameter may be held from elsewhere (optimizer, a traceback), so each loses its memory rather than
        its place in the model. Its hooks go too: parameter -> hook -> optimizer -> parameter is a cycle
        through C++ that Python's collector never frees, and the optimizer's state is GPU memory that the next
        vLLM wants.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            # What register_post_accumulate_grad_hook fills.
            if hooks := parameter._post_accumulate_grad_hooks:
                hooks.clear()
            del parameter, hooks
        del self.model
        if self.gathering is not None:
            self.gathering.close()
        for tensor in self.tensors.values():
            if isinstance(tensor, Pieced):
                tensor.parts.clear()
        self.tensors.clear()
        gc.collect()
        for transport in self.transports:
            transport.close()
        if self.exporter is not None:
            self.exporter.close()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def attach(*manifests: Manifest, verify: bool, on_progress: Callable[[], None] = lambda: None) -> LiveModel:
    """Maps the weights that the manifests (one a rank of vLLM) describe into a model of transformers, all of
    them.

    verify: compare every view bit for bit with the checkpoint on disk (at the first attach to this vLLM).
    Raises AttachError, with nothing left mapped, that names each parameter in the way.
    """
    refused = dict.fromkeys((r.name, r.reason) for m in manifests for r in m.refused if r.blocks)
    if blocking := [f"{name}: {reason}" for name, reason in refused]:
        raise AttachError("this vLLM cannot be trained live: " + "; ".join(blocking[:5]), refused=blocking)
    exporter = Exporter(*manifests)
    transports: list[Transport] = []
    try:
        for manifest in reversed(manifests):  # the first one's device stays the current one
            transports.insert(0, open_transport(manifest))
        live = _build(manifests, transports, exporter)
        if not exporter.is_alive():  # else the pid was the exporter's all the time, and so is what we mapped
            raise AttachError("vLLM ended while the worker was attaching; waiting for the next one")
        if verify:
            check_equal(live, on_progress)
        return live
    except BaseException:
        for transport in transports:
            transport.close()
        exporter.close()
        raise


def _build(manifests: Sequence[Manifest], transports: list[Transport], exporter: Exporter) -> LiveModel:
    first = manifests[0]
    model_dir = Path(first.model_path)
    if not model_dir.is_dir():
        raise AttachError(f"the manifest's model directory {model_dir} is not visible to the worker")
    model = build_model(model_dir, getattr(torch, first.dtype))
    tensors: dict[str, LiveTensor] = {}
    if first.world_size == 1:
        tensors |= (views := map_views(first, transports[0]))
        names, missing = checkpoint_names(model, set(views))
        merged = merged_parameters(model, views, missing)
    else:
        tensors |= (pieces := map_pieces(manifests, transports))
        names, missing = checkpoint_names(model, set(pieces))
        merged = merged_pieces(model, pieces, missing)
    if missing := [name for name in missing if name not in merged]:
        reasons = {r.name: r.reason for manifest in manifests for r in manifest.refused}
        of_tensor = {name: reasons[v.tensor] for name, v in first.views.items() if v.tensor in reasons}
        of_tensor |= missing_parts(manifests)
        apart = {own: _why_apart(group.names) for own, group in groups_of(model, set(tensors)).items()}
        reasons = apart | of_tensor | reasons
        refused = [f"{name}: {_why(name, reasons)}" for name in missing]
        num_found = len(names) + len(merged)
        raise AttachError(
            f"{len(missing)} of {num_found + len(missing)} parameters cannot be mapped: "
            + "; ".join(refused[:5]),
            refused=refused,
        )
    gathering = _fill(model, tensors, names, merged)
    fill_buffers(model, model_dir, transports[0].device)
    model.eval()
    copies = tied_copies(model, set(shard_index(model_dir)), names)
    for copy, name in copies.items():
        if copy in tensors and place(tensors[copy]) != place(tensors[name]):
            raise _untied(copy, name)
    parts = {name: one.sources for name, one in merged.items()}
    return LiveModel(
        model, model_dir, tensors, names, first.boot_id, exporter, transports, copies, parts, gathering
    )


def _fill(
    model: PreTrainedModel,
    tensors: Mapping[str, LiveTensor],
    names: dict[str, str],
    merged: dict[str, Merged],
) -> GatherOnUse | None:
    """fill_parameters, the merged ones under names of their own; what is in pieces is gathered on use."""
    live = {**tensors, **{f"merged {name}": one.tensor for name, one in merged.items()}}
    names = names | {name: f"merged {name}" for name in merged}
    memory = {name: t.placeholder() if isinstance(t, Pieced) else t for name, t in live.items()}
    fill_parameters(model, memory, names)
    owners = {model.get_parameter(name): live[names[name]] for name in parameter_names(model)}
    pieced = {parameter: t for parameter, t in owners.items() if isinstance(t, Pieced)}
    return GatherOnUse(model, pieced) if pieced else None


def tied_copies(model: PreTrainedModel, stored: set[str], names: dict[str, str]) -> dict[str, str]:
    """Tensors of the checkpoint (`stored`) that repeat a tied parameter under another of its names."""
    again, _ = checkpoint_names(model, stored - set(names.values()))
    tied = {first for first, group in parameter_names(model).items() if len(group) > 1}
    return {copy: names[parameter] for parameter, copy in again.items() if parameter in tied}


def _untied(copy: str, name: str) -> AttachError:
    return AttachError(
        f"{copy} is not {name}, to which the model's configuration ties it, and would not be trained: set "
        "tie_word_embeddings to false in config.json",
        refused=[copy],
    )


def _why(name: str, reasons: dict[str, str]) -> str:
    """The export's reason for the checkpoint tensor behind a parameter, found by name or by its tail."""
    if name in reasons:
        return reasons[name]
    tail = name.partition(".")[2]
    owner = tail.rpartition(".")[0] + "."  # of what vLLM has merged: its own tensor of the same layer
    hits = [reason for other, reason in reasons.items() if tail and other.endswith(tail)]
    hits += [reason for other, reason in reasons.items() if len(owner) > 1 and owner in other]
    return hits[0] if hits else "vLLM has loaded no tensor of this name"


def _why_apart(names: list[str]) -> str:
    return (
        f"its {len(names)} checkpoint tensors ({names[0]}, ...) do not lie in vLLM's memory as transformers "
        "merges them"
    )


def check_equal(live: LiveModel, on_progress: Callable[[], None] = lambda: None) -> None:
    """Raises AttachError naming the live tensors that differ from the checkpoint on disk."""
    result = compare(live.model_dir, live.trained_tensors(), on_progress)
    if not result.is_equal:
        raise AttachError(
            f"{len(result.different)} of {live.num_parameters} served tensors differ from {live.model_dir}, "
            f"e.g. {', '.join(result.different[:3])}: was the directory changed after vLLM loaded it?",
            refused=[f"{name}: differs from the checkpoint" for name in result.different],
        )
    log.info("%d views equal the checkpoint bit for bit", result.num_equal)
    index = shard_index(live.model_dir)
    served = {name: t.dtype.itemsize for name, t in live.trained_tensors().items() if name in index}
    if num_rounded := sum(size < DTYPES[index[name].dtype].itemsize for name, size in served.items()):
        log.warning(
            "%d of them only after the cast of loading: their shards hold more bits than are served; a sync "
            "keeps these where nothing was trained, and rounds what was",
            num_rounded,
        )


def load_offline(model_dir: Path, device: torch.device | None = None) -> LiveModel:
    """The checkpoint itself in memory of our own: the same trainer, without a server.

    Raises AttachError for a directory that transformers cannot train.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = shard_index(model_dir)
    tensors: dict[str, torch.Tensor] = {}
    for shard in {t.shard for t in index.values()}:
        with safe_open(model_dir / shard, "pt", device=str(device)) as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    dtypes = [t.dtype for t in floating.values()]
    if not dtypes:
        raise AttachError(f"{model_dir} holds no floating point tensors")
    model = build_model(model_dir, max(set(dtypes), key=dtypes.count))
    names, missing = checkpoint_names(model, set(floating))
    merge_in_own_memory(model, floating, missing)
    merged = merged_parameters(model, floating, missing)
    if missing := [name for name in missing if name not in merged]:
        raise AttachError(
            f"{model_dir} lacks {len(missing)} parameters, e.g. {', '.join(missing[:5])}", refused=missing
        )
    _fill(model, floating, names, merged)
    fill_buffers(model, model_dir, device)
    model.eval()
    assert set(parameter_names(model)) == names.keys() | merged.keys()
    copies = tied_copies(model, set(floating), names)
    for copy, name in copies.items():
        if not torch.equal(floating.pop(copy), floating[name]):
            raise _untied(copy, name)
    parts = {name: one.sources for name, one in merged.items()}
    return LiveModel(model, model_dir, {**floating}, names, boot_id="offline", copies=copies, parts=parts)
