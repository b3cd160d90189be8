"""Export: shares the weights of the model that vLLM has loaded. All that we run inside vLLM's engine is here,
in `views.py`, `pieces.py`, `derived.py`, `memory.py`, `ranks.py`, `cpu_layers.py` and `cpu_experts.py`.

A model loader registered as `apollo` (`--load-format apollo`) that delegates to vLLM's own and then, before
profiling, compilation and graph capture, publishes where every parameter lies. Leans on
vllm/model_executor/model_loader/{base_loader,default_loader}.py.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import vllm
from torch import nn
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from apollo_ipc.checkpoint import check_shards, loading, shard_index
from apollo_ipc.config import Config, make_private_dir
from apollo_ipc.config import load_config as read_config
from apollo_ipc.errors import AlreadyRunning, ApolloError
from apollo_ipc.manifest import (
    MANIFEST_FORMAT,
    Manifest,
    Refusal,
    SharedTensor,
    is_running,
    manifest_path,
    read_manifest,
    start_ticks,
    write_manifest,
)
from apollo_router.cpu_layers import compute_from_live_weights
from apollo_router.derived import ParameterWatch
from apollo_router.memory import share_cpu, share_cuda
from apollo_router.pieces import derive_pieces, without_changed
from apollo_router.ranks import shared_boot_id, unsupported_ranks
from apollo_router.serving_options import engine_serving
from apollo_router.views import Recording, derive_views, record_loading

logger = init_logger("vllm.apollo_ipc.export")
LOAD_FORMAT = "apollo"
LAST_ONE_WAIT_S = 20.0
T = TypeVar("T")


class ApolloLoader(BaseModelLoader):
    """Loads as `--load-format auto` does, then shares what was loaded. Draft models are only loaded."""

    def __init__(self, load_config):
        super().__init__(load_config)
        self._auto = DefaultModelLoader(dataclasses.replace(load_config, load_format="auto"))
        self._export: Export | None = None

    def download_model(self, model_config) -> None:
        self._auto.download_model(model_config)

    def get_all_weights(self, model_config, model):
        return self._auto.get_all_weights(model_config, model)

    def load_weights(self, model: nn.Module, model_config) -> None:
        export = self._export
        if export is None:  # a reload, or a model that is not shared
            self._auto.load_weights(model, model_config)
            return
        export.on_made(model)
        self._auto.load_weights(model, model_config)
        # Now, while every parameter still has its loader and the layout that its loader writes.
        export.on_loaded(model)

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        if model_config is not vllm_config.model_config:
            return self._auto.load_model(vllm_config, model_config, prefix)
        self._export = export = Export(vllm_config)
        try:
            # All of it of one version: no sync begins while the shards are being read.
            with export.checkpoint():
                model = super().load_model(vllm_config, model_config, prefix)
        finally:
            self._export = None
        export.on_ready(model)
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


def _running_exporter(runtime_dir: Path, rank: int) -> Manifest | None:
    try:
        manifest = read_manifest(runtime_dir, rank)
    except ApolloError as error:
        logger.warning("an earlier manifest is not read and is replaced: %s", error.message)
        return None
    is_other = manifest is not None and manifest.pid != os.getpid() and is_running(manifest)
    return manifest if is_other else None


class Export:
    """One load of one model. What goes wrong in it never stops vLLM: the manifest says why nothing is shared,
    and where not even that can be written, vLLM's log does.

    Only `checkpoint` raises (CheckpointError): shards that may be of two versions, or damaged, are not
    served.
    """

    def __init__(self, vllm_config):
        self._vllm_config = vllm_config
        self._boot_id = ""
        self._failed: str | None = None
        self._watch: ParameterWatch | None = None
        self._recording: Recording | None = None
        self._config: Config | None = self._try(read_config)
        self._runtime_dir = self._try(self._claim_runtime_dir)
        self._model_dir: Path | None = self._try(lambda: local_model_dir(vllm_config.model_config.model))

    def _try(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where it raises or something before it has."""
        if self._failed is not None:
            return None
        try:
            return work()
        except Exception as error:
            is_ours = isinstance(error, ApolloError)
            self._failed = error.message if is_ours else f"{type(error).__name__}: {error}"
            logger.critical(
                "apollo-ipc: this model CANNOT BE TRAINED: %s", self._failed, exc_info=not is_ours
            )
            return None

    def _claim_runtime_dir(self) -> Path:
        assert self._config is not None
        runtime_dir, rank = make_private_dir(self._config.runtime_dir), self._rank
        deadline = time.monotonic() + LAST_ONE_WAIT_S  # it may be ending, killed or told to
        while (other := _running_exporter(runtime_dir, rank)) is not None:
            if time.monotonic() >= deadline:
                raise AlreadyRunning(
                    f"another vLLM (process {other.pid}, {other.model_path}) shares its weights in "
                    f"{runtime_dir}; give this one a paths.runtime_dir of its own"
                )
            time.sleep(0.2)
        manifest_path(runtime_dir, rank).unlink(missing_ok=True)  # of an earlier boot
        return runtime_dir

    @property
    def _rank(self) -> int:
        return self._vllm_config.parallel_config.rank

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """For the block, the shards are those of one version. Raises CheckpointError.

        Whatever has failed in this rank, the others wait for it here. The first mends the directory.
        """
        with ExitStack() as locks:
            lock = nullcontext() if self._model_dir is None else self._locked(self._model_dir)
            if self._rank == 0:
                locks.enter_context(lock)
            self._boot_id = shared_boot_id(self._vllm_config.parallel_config)
            if self._rank > 0:
                locks.enter_context(lock)
            yield

    @contextmanager
    def _locked(self, model_dir: Path) -> Iterator[None]:
        with loading(model_dir) as recovery:
            if recovery:
                logger.info("checkpoint recovery in %s: %s", model_dir, recovery)
            if self._config is None or self._config.checkpoint.verify_at_load:
                check_shards(model_dir)
            yield

    def on_made(self, model: nn.Module) -> None:
        self._watch = self._try(lambda: ParameterWatch(model))

    def on_loaded(self, model: nn.Module) -> None:
        self._try(lambda: self._note_loaded(model))

    def _note_loaded(self, model: nn.Module) -> None:
        assert self._watch is not None
        assert self._model_dir is not None
        self._recording = record_loading(model, shard_index(self._model_dir))
        self._watch.loaded(model)
        if _on_cpu(model):
            compute_from_live_weights(model)

    def on_ready(self, model: nn.Module) -> None:
        """Re-homes (CPU) or takes handles of (CUDA) the parameters' memory and writes the manifest."""
        self._try(lambda: self._publish(self._share(model)))
        if (reason := self._failed) is not None and self._runtime_dir is not None:
            self._failed = None  # what has gone wrong so far must not keep this from being written
            self._try(lambda: self._publish(self._manifest(refused=[Refusal("the export in vLLM", reason)])))

    def _share(self, model: nn.Module) -> Manifest:
        assert self._watch is not None
        assert self._recording is not None
        parameters = dict(model.named_parameters(remove_duplicate=False))
        unshareable = self._watch.refusals(model)
        changed = {refusal.name: refusal.reason for refusal in unshareable}
        views, pieces = {}, {}
        if self._vllm_config.parallel_config.world_size == 1:
            views, refused = derive_views(self._recording, parameters)
        else:
            pieces, refused = derive_pieces(self._recording, parameters)
            pieces, lost = without_changed(pieces, changed)
            refused += lost
        settings = unsupported_settings(self._vllm_config)
        memory = share_cpu(model) if _on_cpu(model) else share_cuda(model, self._vllm_config)
        # The memory must live as long as the process: vLLM's own references keep CUDA's, this the memfd.
        model.__dict__["_apollo_shared_memory"] = memory
        return self._manifest(
            transport=memory.transport,
            device_uuid=memory.device_uuid,
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
            pieces=pieces,
            refused=refused + unshareable + settings + memory.refused,
            serving=engine_serving(self._vllm_config.model_config),
        )

    def _manifest(self, *, refused: list[Refusal], **shared: Any) -> Manifest:
        nothing = {"transport": "none", "device_uuid": None, "segments": [], "tensors": {}, "views": {}}
        model_config = self._vllm_config.model_config
        return Manifest(
            format=MANIFEST_FORMAT,
            boot_id=self._boot_id,
            pid=os.getpid(),
            pid_start_ticks=start_ticks(os.getpid()) or 0,
            rank=self._rank,
            world_size=self._vllm_config.parallel_config.world_size,
            model_path=str(self._model_dir or model_config.model),
            served_model_name=str(model_config.served_model_name),
            vllm_version=str(vllm.__version__),
            torch_version=str(torch.__version__),
            dtype=str(model_config.dtype).removeprefix("torch."),
            max_model_len=model_config.max_model_len,
            refused=refused,
            **{**nothing, **shared},
        )

    def _publish(self, manifest: Manifest) -> None:
        assert self._runtime_dir is not None
        path = write_manifest(manifest, self._runtime_dir)
        logger.info(
            "shared %d tensors as %d views over %s: %s (refused: %d)",
            *(len(manifest.tensors), len(manifest.views) or len(manifest.pieces), manifest.transport),
            *(path, len(manifest.refused)),
        )
        for refusal in manifest.refused[:20]:
            logger.warning("cannot be trained live: %s: %s", refusal.name, refusal.reason)


def unsupported_settings(vllm_config) -> list[Refusal]:
    """Settings under which one worker cannot hold all of the weights that are served, or nobody could ask it
    to, by what is true in the process that has loaded them."""
    found = unsupported_ranks(vllm_config.parallel_config)
    quantization = vllm_config.model_config.quantization
    if quantization is not None:
        reason = "quantized weights are a derived copy; serve the bf16 checkpoint"
        found.append(Refusal(f"quantization {quantization}", reason))
    if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
        reason = (
            "that front end has no /train and drops no prefix cache for new weights; start vLLM without it"
        )
        found.append(Refusal("VLLM_USE_RUST_FRONTEND", reason))
    return found + other_configurations(vllm_config.model_config)


def other_configurations(model_config) -> list[Refusal]:
    """What makes vLLM compute another model than config.json describes, which is what the worker computes.

    `architectures` alone only chooses vLLM's class (vllm/config/model.py, __post_init__).
    """
    found = []
    overrides = getattr(model_config, "hf_overrides", None) or {}
    if callable(overrides):
        overrides = {"what the function sets": overrides}
    if names := sorted(overrides.keys() - {"architectures"}):
        reason = f"the worker computes what config.json says: set {', '.join(names)} there instead"
        found.append(Refusal("--hf-overrides", reason))
    if (path := getattr(model_config, "hf_config_path", None)) not in (None, model_config.model):
        reason = (
            f"the worker computes what config.json says: put the one of {path} into the model's directory"
        )
        found.append(Refusal("--hf-config-path", reason))
    return found
