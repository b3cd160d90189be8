"""A model of two tiny shards whose every version is known, synced without torch and without a worker."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from apollo_ipc.checkpoint import (
    Commit,
    Delta,
    DeltaTensor,
    FileRecord,
    begin,
    history,
    is_current,
    read_commit,
    verify,
)
from apollo_ipc.checkpoint import delta as codec
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.checkpoint.history import RunningDigest
from apollo_ipc.checkpoint.shards import read_range, read_shards

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": 48, "b": 32},  # tensor -> number of elements, BF16
    "model-00002-of-00002.safetensors": {"c": 64, "d": 40},
}
OTHERS = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {tensor: shard for shard, some in SHARDS.items() for tensor in some}}
    ).encode(),
}


class Known(NamedTuple):
    """A version: what its shards, its optimizer file and its record hold."""

    weights: int  # the version whose weights these are: another one after a restore
    applied_seq: int
    optimizer: bytes | None

    @cache  # noqa: B019 - versions are few
    def tensors(self) -> dict[str, bytes]:
        """Every version differs from every other in each tensor, by a few steps of bf16 in some elements."""
        found = {}
        for name, size in (item for some in SHARDS.values() for item in some.items()):
            values = np.random.default_rng(ord(name)).integers(0, 2**16, size).astype(np.uint16)
            values[self.weights % 3 :: 3] += self.weights
            found[name] = values.tobytes()
        return found

    @cache  # noqa: B019 - versions are few
    def shards(self) -> dict[str, bytes]:
        tensors = self.tensors()
        return {name: _shard_bytes({one: tensors[one] for one in some}) for name, some in SHARDS.items()}


class Outcome(NamedTuple):
    """What a recovery has left, all of it checked: the weight version, and those that can be restored."""

    version: int | None  # None: no record
    kept: tuple[int, ...]
    weights: int
    pinned: int | None = None


def known(version: int) -> Known:
    if version == 0:
        return Known(0, 0, None)
    return Known(version, 10 * version, f"moments of version {version}; ".encode() * 3)


def _shard_bytes(tensors: dict[str, bytes]) -> bytes:
    header, end = {}, 0
    for name, data in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


STRANGERS_SHARD = known(7).shards()[next(iter(SHARDS))]
STRANGERS_FILE = "mine.tmp"
MADE_NS = 1_600_000_000 * 10**9
STRANGER = Outcome(None, (), 7)  # the first shard is not ours any more, and must stay so


def make_model(model_dir: Path) -> Path:
    model_dir.mkdir()
    for name, data in {**known(0).shards(), **OTHERS}.items():
        (model_dir / name).write_bytes(data)
        os.utime(model_dir / name, ns=(MADE_NS, MADE_NS))
    return model_dir


def sync(model_dir: Path, version: int, kind: str, *, num_kept: int = 0, disk: Disk) -> Commit:
    """As the worker does it (apollo_worker.sync.sync_task), with whole tensors in memory."""
    new = known(version).tensors()
    with begin(model_dir, disk=disk, lock_wait_s=0.0) as transaction:
        shards = read_shards(model_dir)
        index = [tensor for shard in shards.values() for tensor in shard.tensors]
        old = {
            tensor.name: read_range(model_dir / tensor.shard, tensor.start, tensor.end) for tensor in index
        }
        delta = None
        if kind == "delta":
            name, whole, places = f"delta-{transaction.serial}", RunningDigest(), {}
            with transaction.create_state(name) as file:
                for tensor in index:
                    before = codec.pieces(old[tensor.name], tensor.dtype)
                    start = whole.num_bytes
                    for data in codec.encode(before, codec.pieces(new[tensor.name], tensor.dtype), "BF16"):
                        whole.update(data)
                        transaction.write(file, data)
                    ends = digest(old[tensor.name]), digest(new[tensor.name])
                    places[tensor.name] = DeltaTensor(start, whole.num_bytes, *ends)
            delta = Delta(FileRecord(name, whole.num_bytes, whole.hexdigest()), places)
        else:
            for shard in shards.values():
                with transaction.create(shard.name, shard.mode) as file:
                    transaction.write(file, shard.header)
                    for tensor in shard.tensors:
                        transaction.write(file, new[tensor.name])
        optimizer = known(version).optimizer
        name = f"optimizer-{transaction.serial}.safetensors"
        with transaction.create_state(name) as file:
            transaction.write(file, optimizer)
        return transaction.commit(
            weight_version=version,
            applied_seq=known(version).applied_seq,
            shards=shards,
            tensors={name: digest(data) for name, data in new.items()},
            optimizer=FileRecord(name, len(optimizer), digest(optimizer)),
            delta=delta,
            in_shards={name: digest(data) for name, data in old.items()},
            num_kept=num_kept,
        )


def examine(
    model_dir: Path,
    truth: dict[int, Known],
    *,
    is_folded: bool = True,
    is_clean: bool = True,
    are_times_kept: bool = True,
) -> Outcome:
    """What a recovered directory is. Raises AssertionError or CheckpointError where it is nothing whole.

    is_folded: the shards are the version; else they are so together with the delta. is_clean: nothing is left
    over.
    """
    in_place = {name: (model_dir / name).read_bytes() for name in SHARDS}
    if STRANGERS_SHARD in in_place.values():
        return STRANGER
    for name, data in OTHERS.items():
        assert (model_dir / name).read_bytes() == data, f"{name} has changed"
    found = {path.name for path in model_dir.iterdir()}
    assert found - {".apollo", STRANGERS_FILE} == {*SHARDS, *OTHERS}, f"leftovers among the shards: {found}"
    commit = read_commit(model_dir)
    state_files = {path.name for path in model_dir.glob(".apollo/*")}
    if commit is None:
        weights = [one.weights for one in truth.values() if one.shards() == in_place]
        assert weights, "no record, and shards that are torn"
        assert state_files <= {"lock"} or not is_clean, f"leftovers: {state_files}"
        return Outcome(None, (), weights[0])
    expected = commit.files() | {"commit.json", "lock"}
    state_files = state_files if is_clean else state_files & expected
    # The lock is made by whoever needs it, and nobody flushes its name.
    assert state_files | {"lock"} == expected, f"in .apollo {state_files}, expected {expected}"
    here = truth[commit.weight_version]
    if is_folded:
        assert commit.delta is None
        torn = [name for name, data in here.shards().items() if in_place[name] != data]
        assert not torn, f"version {commit.weight_version}: {torn} hold something else"
    assert commit.applied_seq == here.applied_seq
    if are_times_kept:
        assert is_current(model_dir, commit), "the record does not know the shards in place"
    assert verify(model_dir) == []
    index = [tensor for shard in read_shards(model_dir).values() for tensor in shard.tensors]
    for version in history.versions(commit):
        expected = truth[version.weight_version]
        reader = history.VersionReader(model_dir, commit, version)
        assert {tensor.name: bytes(reader.read(tensor)) for tensor in index} == expected.tensors()
        assert version.applied_seq == expected.applied_seq
        optimizer = version.optimizer and (model_dir / ".apollo" / version.optimizer.name).read_bytes()
        assert optimizer == expected.optimizer, f"optimizer state of {version.weight_version}"
    kept = tuple(version.weight_version for version in commit.history)
    return Outcome(commit.weight_version, kept, here.weights, commit.pinned)


def digest(data: bytes | bytearray) -> str:
    return xxhash.xxh3_128_hexdigest(data)
