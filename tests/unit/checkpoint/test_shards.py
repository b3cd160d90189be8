"""What the shards hold, and which shards are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_checkpoint import NAMES, OLD, make_model, safetensors_bytes, sync

from apollo_ipc import checkpoint
from apollo_ipc.checkpoint import read_commit, recover, shard_index
from apollo_ipc.checkpoint.shards import read_shard
from apollo_ipc.errors import CheckpointError


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def test_the_index_gives_each_tensor_its_bytes(model_dir):
    index = shard_index(model_dir)
    assert index.keys() == {"a", "b", "c"}
    for name, tensors in OLD.items():
        data = (model_dir / name).read_bytes()
        for tensor, expected in tensors.items():
            where = index[tensor]
            assert (where.shard, where.dtype, where.shape) == (name, "U8", [len(expected)])
            assert data[where.start : where.end] == expected


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="U8", shape=(4,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{\xff}",
        (90_000).to_bytes(8, "little") + b"[" * 90_000,
        b"\x80\x04\x95" + b"pickle" * 10,
        header(a=entry()) + b"123",
        header(a=entry()) + b"12345",
        header(a=entry(shape=(5,))) + b"1234",
        header(a=entry(shape=(-2, -2))) + b"1234",
        header(a=entry(shape=(2**62, 2**62))) + b"1234",
        header(a=entry(offsets=(4, 0))) + b"1234",
        header(a=entry(offsets=(-4, 0))) + b"1234",
        header(a=entry(), b=entry(offsets=(2, 6))) + b"123456",
        header(a=entry(), b=entry(offsets=(6, 10))) + b"1234567890",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        shard_index(tmp_path)


def test_an_unknown_dtype_and_empty_tensors_are_carried_along(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        header(a=entry("F4", (8,)), b=entry("F32", (0, 7), (4, 4)), c=entry("I64", (), (4, 12))) + bytes(12)
    )
    assert shard_index(tmp_path)["a"].size_bytes == 4
    assert shard_index(tmp_path)["b"].size_bytes == 0
    assert shard_index(tmp_path)["c"].shape == []


def test_a_directory_of_bin_files_needs_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"needs safetensors, found pytorch_model\.bin"):
        shard_index(tmp_path)


def test_an_index_that_contradicts_its_shards_is_refused(model_dir):
    path = model_dir / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": NAMES[1]}, "'a' is not in"),
        ({"z": NAMES[0]}, "'z' is not in"),
        ({"a": "../elsewhere.safetensors"}, "not a plain file name"),
        ({"a": "model-3.safetensors"}, "cannot read"),
        ([], "not an index"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            shard_index(model_dir)


def test_two_checkpoints_in_one_directory_are_refused(model_dir):
    (model_dir / "model.safetensors").write_bytes(safetensors_bytes({"a": b"1"}))
    with pytest.raises(CheckpointError, match="holds both"):
        shard_index(model_dir)


def test_a_tensor_in_two_shards_is_refused(model_dir):
    (model_dir / NAMES[1]).write_bytes(safetensors_bytes({"c": b"1", "a": b"2"}))
    with pytest.raises(CheckpointError, match="'a' is in"):
        shard_index(model_dir)


def test_the_header_is_kept_byte_for_byte(model_dir):
    assert (model_dir / NAMES[0]).read_bytes().startswith(header := read_shard(model_dir / NAMES[0]).header)
    sync(model_dir)
    assert read_shard(model_dir / NAMES[0]).header == header


def test_a_commit_is_current_until_a_shard_is_replaced_or_touched(model_dir):
    sync(model_dir)
    commit = read_commit(model_dir)
    assert checkpoint.is_current(model_dir, commit)
    recover(model_dir)
    assert checkpoint.is_current(model_dir, commit)
    path, info = model_dir / NAMES[0], (model_dir / NAMES[0]).stat()
    for replace in (
        lambda: path.write_bytes(path.read_bytes() + b"x"),
        lambda: os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1)),
        path.unlink,
    ):
        data = path.read_bytes()
        replace()
        assert not checkpoint.is_current(model_dir, commit)
        path.write_bytes(data)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert checkpoint.is_current(model_dir, commit)
