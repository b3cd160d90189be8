"""Stands in for the ranks of a vLLM: each holds a part of every weight, cut, merged and padded as vLLM does.

As layers/linear.py and vocab_parallel_embedding.py of vllm/model_executor do it, models/qwen3_next.py (the
bands of a gated delta net) and layers/fused_moe/layer.py (w13, w2; experts whole where they are spread).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from apollo_router.memory import share_cpu
from apollo_router.pieces import derive_pieces
from apollo_router.views import derive_views, record_loading
from safetensors.torch import load_file
from served_model import make_manifest, merged_name
from torch import nn
from transformers import AutoConfig

from apollo_ipc.checkpoint.shards import shard_index
from apollo_ipc.manifest import Manifest, Pieces, View, write_manifest

Box = tuple[slice, ...]
ROWS = {
    "q_proj", "gate_proj", "up_proj", "in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias",
}  # fmt: skip
COLUMNS = {"o_proj", "down_proj", "out_proj"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


class ServedRank(nn.Module):
    """One rank's tensors of a checkpoint, loaded by narrowed copies as vLLM loads."""

    def __init__(self, model_dir: Path, rank: int, num_ranks: int, *, spreads_experts: bool = False):
        super().__init__()
        self.rank, self.num_ranks, self.spreads_experts = rank, num_ranks, spreads_experts
        self.config = AutoConfig.from_pretrained(model_dir).get_text_config()
        self.checkpoint = {
            name: t
            for shard in sorted(model_dir.glob("*.safetensors"))
            for name, t in load_file(shard).items()
        }
        self._places: dict[str, list[tuple[Box, str, Box]]] = {}
        parts: dict[str, dict[int, str]] = {}
        for name in self.checkpoint:
            if not EXPERT.fullmatch(name):
                target, part = merged_name(name)
                parts.setdefault(target, {})[part] = name
        for target, names in parts.items():
            self._lay_out(target, [name for _, name in sorted(names.items())])
        self._lay_out_experts()
        self.load_weights(self.checkpoint.items())

    def half(self, size: int, start: int = 0) -> slice:
        each = size // self.num_ranks
        return slice(start + self.rank * each, start + (self.rank + 1) * each)

    def boxes(self, name: str, shape: torch.Size) -> list[Box]:
        """Of the checkpoint tensor; they lie one after the other in this rank's part of the merged tensor."""
        leaves, config = name.split("."), self.config
        leaf = leaves[-2] if leaves[-1] in ("weight", "bias") else leaves[-1]
        if leaf in ("embed_tokens", "lm_head"):
            rows = self.padded(shape[0])
            return [(slice(self.rank * rows, min(shape[0], (self.rank + 1) * rows)),)]
        if leaf in ("k_proj", "v_proj"):
            if config.num_key_value_heads >= self.num_ranks:
                return [(self.half(shape[0]),)]
            head = self.rank * config.num_key_value_heads // self.num_ranks
            rows = shape[0] // config.num_key_value_heads
            return [(slice(head * rows, (head + 1) * rows),)]
        if leaf in ("in_proj_qkv", "conv1d"):
            keys = config.linear_num_key_heads * config.linear_key_head_dim
            bands = (0, keys), (keys, keys), (2 * keys, shape[0] - 2 * keys)
            return [(self.half(size, start),) for start, size in bands]
        if leaf in COLUMNS:
            return [(slice(None), self.half(shape[1]))]
        return [(self.half(shape[0]),)] if leaf in ROWS else [(slice(None),)]

    def padded(self, num_rows: int) -> int:
        return -(-num_rows // 64) * 64 // self.num_ranks

    def _lay_out(self, target: str, names: list[str]) -> None:
        row = 0
        for name in names:
            tensor = self.checkpoint[name]
            for box in self.boxes(name, tensor.shape):
                size = tensor[box].shape
                self._places.setdefault(name, []).append((box, target, (slice(row, row + size[0]),)))
                row += size[0]
        if target.endswith(("embed_tokens.weight", "lm_head.weight")):
            row = self.padded(tensor.shape[0])
        self._register(target, (row, *size[1:]), torch.float32 if target.endswith("A_log") else tensor.dtype)

    def _lay_out_experts(self) -> None:
        found = [match for name in self.checkpoint if (match := EXPERT.fullmatch(name))]
        num = 1 + max((int(match[2]) for match in found), default=-1)
        mine = self.half(num) if self.spreads_experts else slice(0, num)
        for match in found:
            tensor, at = self.checkpoint[match[0]], int(match[2]) - mine.start
            if not mine.start <= int(match[2]) < mine.stop:
                self._places[match[0]] = []
                continue
            dim = 1 if match[3] == "down_proj" else 0
            cut = slice(None) if self.spreads_experts else self.half(tensor.shape[dim])
            box = (slice(None), cut) if dim else (cut,)
            size = tensor[box].shape
            rows = slice(size[0], 2 * size[0]) if match[3] == "up_proj" else slice(0, size[0])
            target = f"{match[1]}.{'w2' if dim else 'w13'}_weight"
            self._places[match[0]] = [(box, target, (slice(at, at + 1), rows))]
            shape = (mine.stop - mine.start, size[0] * (1 if dim else 2), *size[1:])
            self._register(target, shape, tensor.dtype)

    def _register(self, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if target.replace(".", "/") not in self._parameters:
            data = torch.zeros(shape, dtype=dtype)
            self.register_parameter(target.replace(".", "/"), nn.Parameter(data, requires_grad=False))

    def load_weights(self, weights) -> None:
        for name, loaded in weights:
            for box, target, place in self._places[name]:
                held = self.get_parameter(target.replace(".", "/")).data[place]
                held.copy_(loaded[box].view(held.shape))

    def share(self, model_dir: Path, boot_id: str) -> Manifest:
        """Moves its tensors into memory that others may map."""
        recording = record_loading(self, shard_index(model_dir))
        parameters = dict(self.named_parameters())
        views: dict[str, View] = {}
        pieces: dict[str, Pieces] = {}
        if self.num_ranks == 1:
            views, refused = derive_views(recording, parameters)
        else:
            pieces, refused = derive_pieces(recording, parameters)
        memory = self.__dict__["memory"] = share_cpu(self)
        return msgspec.structs.replace(
            make_manifest(model_dir, parameters, memory, views, refused),
            rank=self.rank, world_size=self.num_ranks, boot_id=boot_id, pieces=pieces,
        )  # fmt: skip


class ServedRanks:
    """All ranks in this process. `manifests`; `models` keep their memory."""

    def __init__(self, model_dir: Path, num_ranks: int = 2, *, spreads_experts: bool = False):
        self.models = [
            ServedRank(model_dir, rank, num_ranks, spreads_experts=spreads_experts)
            for rank in range(num_ranks)
        ]
        boot_id = uuid.uuid4().hex
        self.manifests = [model.share(model_dir, boot_id) for model in self.models]

    def close(self) -> None:
        """Lets go of the memory."""
        for model in self.models:
            for parameter in model.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype)
            model.__dict__["memory"] = None


def _serve(connection, model_dir: Path, runtime_dir: Path, rank: int, num_ranks: int, boot_id: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    model = ServedRank(model_dir, rank, num_ranks)
    write_manifest(model.share(model_dir, boot_id), runtime_dir)
    connection.send("ready")
    while True:
        name = connection.recv()
        held = [(box, place) for box, *place in model._places[name]]
        connection.send(
            [
                (box, model.get_parameter(target.replace(".", "/")).data[at].float().numpy())
                for box, (target, at) in held
            ]
        )


class RankProcesses:
    """Each rank in a process of its own, as vLLM's workers are; killed at the end of the `with`."""

    def __init__(self, model_dir: Path, runtime_dir: Path, num_ranks: int = 2):
        self.model_dir, self.runtime_dir, self.boot_id = model_dir, runtime_dir, uuid.uuid4().hex
        context, self._started = multiprocessing.get_context("fork"), []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, model_dir, runtime_dir, rank, num_ranks, self.boot_id)
            self._started.append((context.Process(target=_serve, args=arguments, daemon=True), ours))

    def __enter__(self) -> RankProcesses:
        for rank in range(len(self._started)):
            self.start(rank)
        return self

    def start(self, rank: int) -> None:
        process, connection = self._started[rank]
        process.start()
        assert connection.poll(120), "the rank did not start"
        assert connection.recv() == "ready"

    def __exit__(self, *_: object) -> None:
        for rank in range(len(self._started)):
            self.kill(rank)

    def kill(self, rank: int) -> None:
        process, _ = self._started[rank]
        if process.pid is not None:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join(30)

    def assert_serves(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Every rank's process holds these values."""
        for _, connection in self._started:
            for name, tensor in tensors.items():
                connection.send(name)
                assert connection.poll(60), "a rank does not answer"
                for box, values in connection.recv():
                    assert torch.equal(torch.from_numpy(values), tensor[box].float()), name
