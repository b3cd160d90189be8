"""A small model directory and live weights that are synced into it, each version remembered."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file, save_file

from apollo_ipc.checkpoint import history as versions
from apollo_ipc.checkpoint import read_commit, verify
from apollo_ipc.checkpoint.disk import DISK, Disk

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_model(model_dir: Path) -> Path:
    torch.manual_seed(0)
    model_dir.mkdir()
    tensors = {
        SHARDS[0]: {"a": torch.randn(40, 30).bfloat16(), "still": torch.randn(8)},
        SHARDS[1]: {"b": torch.randn(64, 16).bfloat16(), "c": torch.randn(7, 5)},
    }
    for name, some in tensors.items():
        save_file(some, model_dir / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, some in tensors.items() for tensor in some}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model_dir / "config.json").write_text("{}")
    (model_dir / "original").mkdir()
    (model_dir / "original" / "params.json").write_text("{}")
    return model_dir


def stored(model_dir: Path) -> dict[str, torch.Tensor]:
    return {
        name: t for path in sorted(model_dir.glob("*.safetensors")) for name, t in load_file(path).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Live:
    """Weights in memory that are trained and synced; remembers each version."""

    def __init__(self, model_dir: Path, *, num_kept: int = 4, disk: Disk = DISK):
        self.model_dir = model_dir
        self.tensors = {name: t for name, t in stored(model_dir).items() if name != "still"}
        self.versions = {0: stored(model_dir)}
        self.writer = CheckpointWriter(model_dir, self.tensors, num_kept=num_kept, disk=disk, lock_wait_s=0.5)

    def restarted(self, *, num_kept: int) -> Live:
        """The same weights and memory in a worker of other settings."""
        live = Live(self.model_dir, num_kept=num_kept)
        for name, tensor in self.tensors.items():
            live.tensors[name].copy_(tensor)
        live.versions = self.versions
        return live

    def train(self, *names: str) -> None:
        for name in names or self.tensors:
            bits = self.tensors[name].view(-1).view(torch.uint8).numpy()
            flat = bits.view("i2") if self.tensors[name].dtype == torch.bfloat16 else bits.view("i4")
            flat[:: len(self.versions) + 1] += 1

    def sync(self, kind: str = "full") -> int:
        version = len(self.versions)
        moments = {"m": torch.full((3,), float(version))}
        self.writer.sync(
            kind, weight_version=version, applied_seq=10 * version, optimizer=(moments, {"version": version})
        )
        self.versions[version] = {**self.versions[0], **{n: t.clone() for n, t in self.tensors.items()}}
        return version

    def read(self, version: int) -> dict[str, torch.Tensor]:
        """By the history's own reader, whatever lies in the shards."""
        commit = read_commit(self.model_dir)
        reader = versions.VersionReader(self.model_dir, commit, versions.find(commit, version))
        found = {}
        for shard in commit.shards:
            for tensor in versions.read_shard(self.model_dir / shard).tensors:
                dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[tensor.dtype]
                found[tensor.name] = torch.frombuffer(reader.read(tensor), dtype=dtype).view(tensor.shape)
        return found

    def assert_all_readable(self, *expected: int) -> None:
        commit = read_commit(self.model_dir)
        assert [one.weight_version for one in versions.versions(commit)] == list(expected)
        for version in expected:
            assert_same(self.read(version), self.versions[version])
            record = versions.find(commit, version)
            if version:
                assert read_optimizer(self.model_dir, record.optimizer)[1] == {"version": version}
                assert record.applied_seq == 10 * version
        assert verify(self.model_dir) == []


def state_files(model_dir: Path) -> set[str]:
    return {path.name for path in (model_dir / ".apollo").iterdir()} - {"lock"}
