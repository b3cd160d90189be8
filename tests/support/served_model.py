"""Stands in for vLLM: a process that owns merged weights on a CPU or GPU and exports them as ours does.

No vllm is imported; what is under test (views.py, memory.py, the manifest) is the real code.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import uuid
from pathlib import Path
from types import SimpleNamespace

import torch
from apollo_router.memory import share_cpu, share_cuda
from apollo_router.views import derive_views, record_loading
from safetensors.torch import load_file
from torch import nn

from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.config import Config, load_config
from apollo_ipc.manifest import (
    MANIFEST_FORMAT,
    Manifest,
    SharedTensor,
    read_manifest,
    start_ticks,
    write_manifest,
)

# vLLM's fusions of a dense model: `packed_modules_mapping` in vllm/model_executor/models/qwen3.py.
MERGED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
SLEEPLESS = SimpleNamespace(
    model_config=SimpleNamespace(enable_sleep_mode=False, enable_cumem_allocator=False)
)


def merged_name(name: str) -> tuple[str, int]:
    """(vLLM's name, which part of it) of a checkpoint tensor."""
    module, _, last = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    target, part = MERGED.get(leaf, (leaf, 0))
    return f"{parent}.{target}.{last}".lstrip("."), part


class ServedModel(nn.Module):
    """The tensors of a checkpoint, merged as vLLM merges them, loaded by narrowed copies as vLLM loads."""

    def __init__(self, checkpoint: dict[str, torch.Tensor], device: torch.device):
        super().__init__()
        parts: dict[str, dict[int, str]] = {}
        for name in checkpoint:
            target, part = merged_name(name)
            parts.setdefault(target, {})[part] = name
        self._place: dict[str, tuple[str, int]] = {}
        for target, names in parts.items():
            rows = 0
            for _, name in sorted(names.items()):
                self._place[name] = (target, rows)
                rows += checkpoint[name].shape[0]
            like = checkpoint[next(iter(names.values()))]
            data = torch.empty(rows, *like.shape[1:], dtype=like.dtype, device=device)
            self.register_parameter(target.replace(".", "/"), nn.Parameter(data, requires_grad=False))

    def load_weights(self, weights) -> None:
        for name, loaded in weights:
            self.part(name, loaded.shape[0]).copy_(loaded)

    def part(self, name: str, num_rows: int) -> torch.Tensor:
        target, start = self._place[name]
        return self.get_parameter(target.replace(".", "/")).data.narrow(0, start, num_rows)


def make_manifest(model_dir: Path, parameters, memory, views, refused) -> Manifest:
    """As apollo_router.export writes it."""
    tensors = {}
    for name, p in parameters.items():
        if (place := memory.place(p)) is not None:
            dtype = str(p.dtype).removeprefix("torch.")
            tensors[name] = SharedTensor(dtype, list(p.shape), list(p.stride()), *place)
    return Manifest(
        format=MANIFEST_FORMAT, boot_id=uuid.uuid4().hex,
        pid=os.getpid(), pid_start_ticks=start_ticks(os.getpid()) or 0, rank=0, world_size=1,
        model_path=str(model_dir), served_model_name="served", vllm_version="none",
        torch_version=str(torch.__version__), transport=memory.transport, device_uuid=memory.device_uuid,
        dtype="bfloat16", max_model_len=128, segments=memory.segments, tensors=tensors,
        views=views, refused=refused + memory.refused,
    )  # fmt: skip


def export(model_dir: Path, runtime_dir: Path, device: torch.device) -> ServedModel:
    checkpoint = {
        name: tensor for shard in model_dir.glob("*.safetensors") for name, tensor in load_file(shard).items()
    }
    model = ServedModel(checkpoint, device)
    model.load_weights(checkpoint.items())
    recording = record_loading(model, shard_index(model_dir))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Before the memory moves: the recording knows the storages of the loading.
    views, refused = derive_views(recording, parameters)
    memory = share_cpu(model) if device.type == "cpu" else share_cuda(model, SLEEPLESS)
    manifest = make_manifest(model_dir, parameters, memory, views, refused)
    write_manifest(manifest, runtime_dir)
    model.keep = memory
    return model


def digest(tensor: torch.Tensor) -> str:
    elements = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(elements.view(torch.uint8).numpy().tobytes()).hexdigest()


def _serve(connection, model_dir: Path, runtime_dir: Path, device: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        model = export(model_dir, runtime_dir, torch.device(device))
    except BaseException as error:
        connection.send(repr(error))
        raise
    connection.send("ready")
    index = shard_index(model_dir)
    while True:
        command, name, value = connection.recv()
        part = model.part(name, index[name].shape[0])
        if command == "fill":
            part.fill_(value)
        connection.send(digest(part))


class Exporter:
    """The process. `with Exporter(...) as served`; killed at the end, as vLLM's worker is."""

    def __init__(self, model_dir: Path, runtime_dir: Path, device: str = "cpu"):
        self.model_dir, self.runtime_dir = model_dir, runtime_dir
        # A process that has used CUDA cannot fork a child that does.
        context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, model_dir, runtime_dir, device), daemon=True
        )

    def __enter__(self) -> Exporter:
        self._process.start()
        assert self._connection.poll(120), "the exporter did not start"
        answer = self._connection.recv()
        assert answer == "ready", answer
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def manifest(self) -> Manifest:
        manifest = read_manifest(self.runtime_dir)
        assert manifest is not None
        return manifest

    def digest(self, name: str) -> str:
        return self._ask("digest", name)

    def fill(self, name: str, value: float) -> str:
        return self._ask("fill", name, value)

    def _ask(self, command: str, name: str, value: float | None = None) -> str:
        self._connection.send((command, name, value))
        assert self._connection.poll(60), "the exporter does not answer"
        return self._connection.recv()

    def kill(self) -> None:
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        self._process.join(30)


def make_tiny_model(directory: Path, **changes) -> Path:
    """A Qwen3 checkpoint of some 100,000 parameters, tied, bf16."""
    from apollo_ipc.demo.models import make_model

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    return make_model(directory, "qwen3", **{**small, **changes})


def make_config(base: Path) -> Config:
    """Runtime and state directories in `base`; nothing of the machine's own configuration."""
    for name in ("run", "state"):
        (base / name).mkdir(mode=0o700, exist_ok=True)
    overrides = {"paths.runtime_dir": str(base / "run"), "paths.state_dir": str(base / "state")}
    return load_config(None, overrides, environ={})


def mapped_weights() -> list[str]:
    """This process's mappings of an exporter's memfd."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "apollo-weights" in line]
