"""Export: shares the weights of the model that vLLM has loaded. All that we run inside vLLM's engine is here
and in `views.py`.

A model loader registered as `apollo` (`--load-format apollo`) that delegates to vLLM's own and then, before
profiling, compilation and graph capture, publishes where every parameter lies. Leans on
vllm/model_executor/model_loader/{base_loader,default_loader}.py and layers/linear.py,
layers/vocab_parallel_embedding.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import uuid
from pathlib import Path

import torch
import vllm
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from apollo_ipc.checkpoint import check_shards, loading, shard_index
from apollo_ipc.config import load_config as read_config
from apollo_ipc.config import make_private_dir
from apollo_ipc.manifest import (
    MANIFEST_FORMAT,
    Manifest,
    Refusal,
    SharedTensor,
    manifest_path,
    start_ticks,
    write_manifest,
)
from apollo_router.memory import share_cpu, share_cuda
from apollo_router.views import derive_views, record_loading

logger = init_logger("vllm.apollo_ipc.export")
LOAD_FORMAT = "apollo"


class LiveLinearMethod(UnquantizedLinearMethod):
    """vLLM's linear layer, computing from the live weight: no packed copy that training would not reach."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.cpu_linear = nn.functional.linear  # pyright: ignore[reportArgumentType]


class LiveEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The same for embeddings and lm_head, which vLLM's CPU backend packs as well."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.cpu_linear = nn.functional.linear  # pyright: ignore[reportArgumentType]


class ApolloLoader(BaseModelLoader):
    """Loads as `--load-format auto` does, then shares what was loaded. Draft models are only loaded."""

    def __init__(self, load_config):
        super().__init__(load_config)
        self._auto = DefaultModelLoader(dataclasses.replace(load_config, load_format="auto"))
        self._record = None

    def download_model(self, model_config) -> None:
        self._auto.download_model(model_config)

    def get_all_weights(self, model_config, model):
        return self._auto.get_all_weights(model_config, model)

    def load_weights(self, model: nn.Module, model_config) -> None:
        self._auto.load_weights(model, model_config)
        if self._record is None:  # a reload, or a model that is not shared
            return
        # Now, while every parameter still has its loader and the layout that its loader writes.
        self._record(model)
        if model_config.dtype is not None and _on_cpu(model):
            compute_from_live_weights(model)

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        if model_config is not vllm_config.model_config:
            return self._auto.load_model(vllm_config, model_config, prefix)
        config = read_config()
        runtime_dir = make_private_dir(config.runtime_dir)
        rank = vllm_config.parallel_config.rank
        manifest_path(runtime_dir, rank).unlink(missing_ok=True)  # of an earlier boot
        model_dir = local_model_dir(model_config.model)

        recorded = {}

        def record(model: nn.Module) -> None:
            recorded["events"] = record_loading(model, shard_index(model_dir))
            recorded["layout"] = {name: _layout(p) for name, p in model.named_parameters()}
            recorded["attributes"] = _tensor_attributes(model)

        self._record = record
        # All of it of one version: no sync begins while the shards are being read.
        with loading(model_dir) as recovery:
            if recovery:
                logger.info("checkpoint recovery in %s: %s", model_dir, recovery)
            if config.checkpoint.verify_at_load:
                check_shards(model_dir)
            try:
                model = super().load_model(vllm_config, model_config, prefix)
            finally:
                self._record = None
        export(model, vllm_config, model_dir, runtime_dir, rank, recorded)
        return model


def register() -> None:
    """Idempotent: vLLM calls plugins several times and in every process."""
    from vllm.model_executor import model_loader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not ApolloLoader:
        register_model_loader(LOAD_FORMAT)(ApolloLoader)


def local_model_dir(model: str) -> Path:
    """The directory that holds the checkpoint; a hub name is looked up in the local cache only."""
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())


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
    _unpack_causal_conv()


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


def export(model, vllm_config, model_dir: Path, runtime_dir: Path, rank: int, recorded: dict) -> None:
    """Re-homes (CPU) or takes handles of (CUDA) the parameters' memory and writes the manifest.

    Never raises for what cannot be shared: vLLM goes on serving, and the manifest names what and why.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    views, refused = derive_views(recorded["events"], parameters)
    unshareable = _changed_after_loading(recorded["layout"], parameters)
    unshareable += _derived_copies(recorded["attributes"], model)
    unshareable += _unsupported_settings(vllm_config)
    memory = share_cpu(model) if _on_cpu(model) else share_cuda(model, vllm_config)
    refused += unshareable + memory.refused
    changed = {r.name for r in unshareable}
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        boot_id=uuid.uuid4().hex,
        pid=os.getpid(),
        pid_start_ticks=start_ticks(os.getpid()) or 0,
        rank=rank,
        world_size=vllm_config.parallel_config.world_size,
        model_path=str(model_dir),
        served_model_name=str(vllm_config.model_config.served_model_name),
        vllm_version=str(vllm.__version__),
        torch_version=str(torch.__version__),
        transport=memory.transport,
        device_uuid=memory.device_uuid,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        max_model_len=vllm_config.model_config.max_model_len,
        segments=memory.segments,
        tensors={
            name: SharedTensor(
                dtype=str(p.dtype).removeprefix("torch."),
                shape=list(p.shape),
                stride=list(p.stride()),
                segment=place[0],
                offset_bytes=place[1],
            )
            for name, p in parameters.items()
            if (place := memory.place(p)) is not None
        },
        views={name: view for name, view in views.items() if view.tensor not in changed},
        refused=refused,
    )
    path = write_manifest(manifest, runtime_dir)
    # The memory must live as long as the process: vLLM's own references keep CUDA's, this keeps the memfd.
    model._apollo_shared_memory = memory
    logger.info(
        "shared %d tensors as %d views over %s: %s (refused: %d)",
        len(manifest.tensors),
        len(manifest.views),
        manifest.transport,
        path,
        len(refused),
    )
    for refusal in refused[:20]:
        logger.warning("cannot be trained live: %s: %s", refusal.name, refusal.reason)


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr()


def _changed_after_loading(before: dict[str, tuple], parameters: dict[str, nn.Parameter]) -> list[Refusal]:
    """Parameters that vLLM repacked, cast or dropped after loading: their views no longer hold."""
    gone = []
    for name, layout in before.items():
        if name not in parameters:
            reason = "vLLM replaced it after loading (quantization or a packed kernel layout)"
            gone.append(Refusal(name, reason, blocks=False))
        elif _layout(parameters[name]) != layout and parameters[name].device.type != "meta":
            dtype, shape = layout[0], layout[1]
            now = parameters[name]
            hint = "; try --moe-backend triton" if "experts" in name else ""
            gone.append(
                Refusal(
                    name,
                    f"vLLM repacked it after loading, from {dtype} {list(shape)} to {now.dtype} "
                    f"{list(now.shape)}: the kernel reads a derived layout{hint}",
                    blocks=False,
                )
            )
    return gone


def _tensor_attributes(model: nn.Module) -> dict[str, int]:
    """Plain tensors (neither parameters nor buffers) that modules hold, by name: their address."""
    return {
        f"{prefix}.{name}": value.data_ptr()
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1
    }


def _derived_copies(before: dict[str, int], model: nn.Module) -> list[Refusal]:
    """Tensors that vLLM computed from weights after loading, e.g. MLA's absorbed W_UV and W_UK_T."""
    addresses = {p.data_ptr() for p in model.parameters()}
    return [
        Refusal(
            name,
            "vLLM computed this tensor from the weights after loading; it would not follow training "
            "(MLA models: their absorbed projections are such copies)",
        )
        for name, address in _tensor_attributes(model).items()
        if before.get(name) != address and address not in addresses
    ]


def _unsupported_settings(vllm_config) -> list[Refusal]:
    """Settings under which one worker cannot hold the whole model's weights."""
    found = []
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        found.append(
            Refusal(
                f"--data-parallel-size {parallel.data_parallel_size}",
                "each engine has a copy of the weights of its own; live training reaches one",
            )
        )
    if parallel.world_size > 1:
        found.append(
            Refusal(
                f"--tensor-parallel-size/--pipeline-parallel-size (world size {parallel.world_size})",
                "each process holds a part of every weight; live training needs one process with all of them",
            )
        )
    if vllm_config.model_config.quantization is not None:
        found.append(
            Refusal(
                f"quantization {vllm_config.model_config.quantization}",
                "quantized weights are a derived copy; serve the bf16 checkpoint",
            )
        )
    return found
