"""Two shards of plain bytes, and a sync of them without torch."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import begin, read_commit, recover, verify
from apollo_ipc.checkpoint.disk import DISK, Disk
from apollo_ipc.checkpoint.shards import read_shards

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD = {NAMES[0]: {"a": b"old-a-" * 10, "b": b"old-b-" * 20}, NAMES[1]: {"c": b"old-c-" * 30}}
NEW = {name: {t: data.replace(b"old", b"new") for t, data in shard.items()} for name, shard in OLD.items()}


def safetensors_bytes(tensors: dict[str, bytes], **fields) -> bytes:
    header, end = dict(fields), 0
    for name, data in tensors.items():
        start, end = end, end + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def make_model(model_dir: Path) -> Path:
    model_dir.mkdir()
    for name, tensors in OLD.items():
        (model_dir / name).write_bytes(safetensors_bytes(tensors, __metadata__={"format": "pt"}))
    weight_map = {tensor: name for name, tensors in OLD.items() for tensor in tensors}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model_dir


def sync(
    model_dir: Path, content=NEW, *, version: int = 1, disk: Disk = DISK, optimizer: bytes = b""
) -> None:
    """Writes every shard of `content`, and `optimizer` where there is one."""
    with begin(model_dir, disk=disk, lock_wait_s=0.1) as transaction:
        shards = read_shards(model_dir)
        digests = {
            name: digest(data) for shard in {**OLD, **content}.values() for name, data in shard.items()
        }
        for name, tensors in content.items():
            with transaction.create(name, shards[name].mode) as file:
                transaction.write(file, shards[name].header)
                for tensor in shards[name].tensors:
                    transaction.write(file, tensors[tensor.name])
        record = None
        if optimizer:
            name = f"optimizer-{transaction.serial}.safetensors"
            with transaction.create_state(name) as file:
                transaction.write(file, optimizer)
            record = checkpoint.FileRecord(name, len(optimizer), digest(optimizer))
        transaction.commit(
            weight_version=version, applied_seq=version, shards=shards, tensors=digests, optimizer=record
        )


def digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def contents(model_dir: Path) -> dict[str, bytes]:
    return {name: (model_dir / name).read_bytes() for name in NAMES}


def state_files(model_dir: Path) -> set[str]:
    return {path.name for path in (model_dir / ".apollo").iterdir()} - {"lock"}


OLD_OPTIMIZER, NEW_OPTIMIZER = b"moments of 1", b"moments of 2"


def make_synced(model_dir: Path) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """A model that was synced once without change of its shards; its bytes, and those of the next sync."""
    old = contents(make_model(model_dir))
    sync(model_dir, {}, version=1, optimizer=OLD_OPTIMIZER)
    return model_dir, old, {name: data.replace(b"old", b"new") for name, data in old.items()}


def assert_old_or_new(model_dir: Path, old: dict[str, bytes], new: dict[str, bytes]) -> int:
    """Exactly one of the two checkpoints, with its own record and optimizer; returns its version."""
    version = read_commit(model_dir).weight_version
    assert contents(model_dir) == {1: old, 2: new}[version]
    assert verify(model_dir) == []
    name = f"optimizer-{version}.safetensors"
    assert state_files(model_dir) == {"commit.json", name}
    expected = {1: OLD_OPTIMIZER, 2: NEW_OPTIMIZER}[version]
    assert (model_dir / ".apollo" / name).read_bytes() == expected
    assert recover(model_dir) == checkpoint.Mended()
    return version
