"""Live tensors into the checkpoint, with a tiny model that transformers saves and loads."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from apollo_worker import hostcopy
from apollo_worker import sync_thread as sync_module
from apollo_worker.compare import compare
from apollo_worker.hostcopy import HostBuffer, flat_pieces
from apollo_worker.optimizer_file import read_optimizer
from apollo_worker.sync import CheckpointWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stepped_disk import Crash, SteppedDisk
from transformers import AutoModelForCausalLM, Qwen3Config

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.checkpoint.disk import Disk
from apollo_ipc.checkpoint.shards import read_shards, shard_index
from apollo_ipc.errors import CheckpointError

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAST_MLP = "model.layers.1.mlp.down_proj.weight"


def save_model(model_dir: Path, *, shard_size: str, tied: bool = False) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(model_dir, max_shard_size=shard_size)
    return model_dir


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {
        "single": save_model(base / "single", shard_size="1GB"),
        "multi": save_model(base / "multi", shard_size="100KB"),
        "tied": save_model(base / "tied", shard_size="1GB", tied=True),
    }


@pytest.fixture
def single(templates, tmp_path) -> Path:
    return shutil.copytree(templates["single"], tmp_path / "single")


@pytest.fixture
def multi(templates, tmp_path) -> Path:
    return shutil.copytree(templates["multi"], tmp_path / "multi")


def stored(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the shards, as safetensors' own reader sees it."""
    return {
        name: t for path in sorted(model_dir.glob("*.safetensors")) for name, t in load_file(path).items()
    }


def shard_of(model_dir: Path, tensor: str) -> Path:
    return next(path for path in model_dir.glob("*.safetensors") if tensor in load_file(path))


def shard_bytes(model_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_dir.glob("*.safetensors")}


def state_files(model_dir: Path) -> set[str]:
    return {path.name for path in (model_dir / ".apollo").iterdir()} - {"lock"}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_loads_as(model_dir: Path, live: dict[str, torch.Tensor]) -> None:
    """from_pretrained gives `live`, bit for bit."""
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).state_dict()
    assert loaded.keys() >= live.keys()
    for name, tensor in live.items():
        assert bits(loaded[name]) == bits(tensor), name


# --- what is written ---


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_from_pretrained_gives_the_live_weights_after_a_sync(kind, request):
    model_dir = request.getfixturevalue(kind)
    headers = {name: shard.header for name, shard in read_shards(model_dir).items()}
    live = stored(model_dir)
    for tensor in live.values():
        tensor += torch.randn(tensor.shape)
    result = CheckpointWriter(model_dir, live).sync(weight_version=5, applied_seq=9)
    assert_loads_as(model_dir, live)
    assert verify(model_dir) == []
    assert {name: shard.header for name, shard in read_shards(model_dir).items()} == headers
    assert (result.num_tensors, result.num_tensors_changed) == (len(live), len(live))
    assert result.num_shards_written == len(headers) == {"single": 1, "multi": 3}[kind]
    assert result.bytes_written == sum(map(len, shard_bytes(model_dir).values()))
    assert result.bytes_compared == sum(tensor.nbytes for tensor in live.values())
    commit = read_commit(model_dir)
    assert (commit.weight_version, commit.applied_seq) == (5, 9)


def test_only_the_changed_shard_is_rewritten(multi):
    live = stored(multi)
    writer = CheckpointWriter(multi, live)
    for version in (1, 2):  # the first compares with the shards' bytes, the second with the record's digests
        before = {path: path.stat() for path in multi.glob("*.safetensors")}
        live[LAST_MLP][3, 5] += 1
        result = writer.sync(weight_version=version, applied_seq=0)
        assert (result.num_tensors_changed, result.num_shards_written) == (1, 1)
        changed = {
            path
            for path, old in before.items()
            if (path.stat().st_ino, path.stat().st_mtime_ns) != (old.st_ino, old.st_mtime_ns)
        }
        assert changed == {shard_of(multi, LAST_MLP)}
        assert bits(stored(multi)[LAST_MLP]) == bits(live[LAST_MLP])
        assert verify(multi) == []


def test_a_sync_without_change_writes_no_shard_but_advances_the_record(multi):
    live = stored(multi)
    writer = CheckpointWriter(multi, live)
    before = {path: path.stat().st_ino for path in multi.glob("*.safetensors")}
    for version in (1, 2):
        moments = {"m": torch.full((2, 3), float(version))}
        result = writer.sync(
            weight_version=version,
            applied_seq=10 * version,
            optimizer=(moments, {"step": version}),
            extra={"k": [1]},
        )
        assert (result.num_tensors_changed, result.num_shards_written) == (0, 0)
        commit = read_commit(multi)
        assert (commit.weight_version, commit.applied_seq, commit.extra) == (
            version,
            10 * version,
            {"k": [1]},
        )
        tensors, state = read_optimizer(multi, commit.optimizer)
        assert torch.equal(tensors["m"], moments["m"])
        assert state == {"step": version}
        assert state_files(multi) == {"commit.json", commit.optimizer.name}
    assert before == {path: path.stat().st_ino for path in multi.glob("*.safetensors")}
    assert verify(multi) == []


def test_the_second_sync_compares_with_the_record_and_not_with_the_shards(multi, monkeypatch):
    writer = CheckpointWriter(multi, stored(multi))
    writer.sync(weight_version=1, applied_seq=0)
    monkeypatch.setattr(sync_module, "file_digest", lambda *args: pytest.fail("read a shard"))
    assert writer.sync(weight_version=2, applied_seq=0).num_shards_written == 0


def test_a_shard_that_someone_replaced_is_read_again_and_written_over(multi):
    live = stored(multi)
    writer = CheckpointWriter(multi, live)
    writer.sync(weight_version=1, applied_seq=0)
    path = shard_of(multi, LAST_MLP)
    tensors = load_file(path)
    tensors[LAST_MLP] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert writer.sync(weight_version=2, applied_seq=0).num_shards_written == 1
    assert bits(stored(multi)[LAST_MLP]) == bits(live[LAST_MLP])
    assert verify(multi) == []


def test_tied_weights_are_written_once_under_the_name_in_the_shard(templates, tmp_path):
    model_dir = shutil.copytree(templates["tied"], tmp_path / "tied")
    live = stored(model_dir)
    assert HEAD not in live
    live[EMBED] += 1
    live[HEAD] = live[EMBED]
    assert CheckpointWriter(model_dir, live).sync(weight_version=1, applied_seq=0).num_tensors_changed == 1
    assert_loads_as(model_dir, live)
    assert compare(model_dir, live).missing == [HEAD]


def test_a_live_tensor_without_a_place_in_the_shards_is_refused(templates):
    live = stored(templates["tied"])
    live[HEAD] = live[EMBED].clone()
    with pytest.raises(CheckpointError, match=r"no shard has a place for lm_head\.weight"):
        CheckpointWriter(templates["tied"], live)


def test_a_live_tensor_of_another_shape_is_refused(templates):
    live = stored(templates["single"])
    live[EMBED] = live[EMBED][:-1]
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[320, 64\].*live \[319, 64\]"):
        CheckpointWriter(templates["single"], live)


def test_tensors_that_are_not_live_are_copied_from_the_old_shard(single):
    live = {LAST_MLP: stored(single)[LAST_MLP] + 1}
    old = stored(single)
    CheckpointWriter(single, live).sync(weight_version=1, applied_seq=0)
    assert {name for name, tensor in stored(single).items() if bits(tensor) != bits(old[name])} == {LAST_MLP}
    assert verify(single) == []


def test_a_damaged_tensor_is_not_copied_into_a_new_shard(single):
    live = {LAST_MLP: stored(single)[LAST_MLP]}
    writer = CheckpointWriter(single, live)
    writer.sync(weight_version=1, applied_seq=0)
    path = single / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:  # as a failing disk does it: without a new mtime
        file.seek(shard_index(single)[EMBED].start)
        file.write(b"rot!")
    os.utime(path, ns=times)
    live[LAST_MLP] += 1
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' is damaged on disk"):
        writer.sync(weight_version=2, applied_seq=0)
    assert read_commit(single).weight_version == 1


def test_an_fp32_live_tensor_is_rounded_to_the_shards_bf16(single):
    live = stored(single)
    live[NORM] = live[NORM].float()
    writer = CheckpointWriter(single, live)
    assert writer.sync(weight_version=1, applied_seq=0).num_tensors_changed == 0
    live[NORM] += 2**-12  # below half a step of bf16 at 1.0 (2**-9): not in the checkpoint
    assert writer.sync(weight_version=2, applied_seq=0).num_tensors_changed == 0
    live[NORM] *= 1.01
    assert writer.sync(weight_version=3, applied_seq=0).num_tensors_changed == 1
    assert bits(stored(single)[NORM]) == bits(live[NORM].to(torch.bfloat16))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t().contiguous().t(),  # transposed in memory
        lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],  # a column range of a merged tensor
        lambda t: torch.stack([t, t], dim=-1)[..., 1],  # every second element
    ],
)
def test_views_of_any_stride_are_written_in_the_checkpoints_order(single, view, monkeypatch):
    """With a buffer of 1 KiB (512 elements), so that tensors take many pieces."""
    monkeypatch.setattr(hostcopy, "BLOCK_BYTES", 1024)
    expected = stored(single)
    for tensor in expected.values():
        tensor += 1
    live = {name: view(t) if t.dim() == 2 else t for name, t in expected.items()}
    assert not live[EMBED].is_contiguous()
    CheckpointWriter(single, live).sync(weight_version=1, applied_seq=0)
    assert_loads_as(single, expected)
    assert compare(single, live).is_equal


def test_pieces_cover_a_tensor_in_order_whatever_its_shape():
    for shape in [(), (0,), (5,), (3, 0), (7, 11), (3, 5, 7), (2, 3, 4, 5)]:
        tensor = torch.randn(shape)
        for permuted in (tensor, tensor.permute(tuple(reversed(range(tensor.dim()))))):
            for max_elements in (1, 4, 30, 1000):
                pieces = list(flat_pieces(permuted, max_elements))
                assert all(piece.dim() == 1 and 0 < piece.numel() <= max_elements for piece in pieces)
                assert torch.equal(torch.cat([torch.empty(0), *pieces]), permuted.reshape(-1))


def test_at_most_a_block_of_the_model_is_in_host_memory():
    tensor = torch.zeros(3 * hostcopy.BLOCK_BYTES, dtype=torch.uint8)
    host = HostBuffer(pinned=False)
    in_place = [block.data_ptr() for block in host.blocks(tensor, torch.uint8)]
    assert in_place == [tensor.data_ptr() + i * hostcopy.BLOCK_BYTES for i in range(3)]
    assert len({block.data_ptr() for block in host.blocks(tensor, torch.float16)}) == 1


# --- refusals ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_tensor_refuses_the_whole_sync(multi, bad):
    old = shard_bytes(multi)
    live = stored(multi)
    for tensor in live.values():
        tensor += 1
    live[NORM].view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds non-finite"):
        CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=0)
    assert shard_bytes(multi) == old
    assert read_commit(multi) is None
    assert state_files(multi) == set()


def test_a_value_that_overflows_the_shards_dtype_is_refused(tmp_path):
    save_file({"w": torch.ones(4, dtype=torch.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'w' holds non-finite values as F16"):
        CheckpointWriter(tmp_path, {"w": torch.full((4,), 1e6)}).sync(weight_version=1, applied_seq=0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["write", "fdatasync"])
def test_a_failing_disk_leaves_the_old_and_the_next_sync_succeeds(multi, monkeypatch, error, function):
    old, live = shard_bytes(multi), stored(multi)
    for tensor in live.values():
        tensor += 1
    writer = CheckpointWriter(multi, live)
    real, calls = getattr(os, function), []

    def fail(fd, *args):
        if "pending-1/model-00002" not in os.readlink(f"/proc/self/fd/{fd}"):
            return real(fd, *args)
        calls.append(fd)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        writer.sync(weight_version=1, applied_seq=0)
    monkeypatch.undo()
    assert len(calls) == 1
    assert shard_bytes(multi) == old
    assert state_files(multi) == set()
    writer.sync(weight_version=1, applied_seq=0)
    assert_loads_as(multi, live)


def test_space_is_checked_before_anything_is_written(multi, monkeypatch):
    live = stored(multi)
    live[LAST_MLP] += 1
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 65 * 1024 * 1024)
    CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=0)
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 64 * 1024 * 1024)
    CheckpointWriter(multi, live).sync(weight_version=2, applied_seq=0)  # nothing changed: needs nothing
    live[LAST_MLP] += 1
    needed = shard_of(multi, LAST_MLP).stat().st_size
    with pytest.raises(CheckpointError, match=f"needs {needed:,}"):
        CheckpointWriter(multi, live).sync(weight_version=3, applied_seq=0)


# --- crashes ---


OLD_STATE = ({"m": torch.zeros(3)}, {"version": 1})
NEW_STATE = ({"m": torch.ones(3)}, {"version": 2})


def test_a_sync_that_stops_at_any_operation_leaves_the_old_or_the_new_weights(multi, tmp_path):
    live = stored(multi)
    CheckpointWriter(multi, live).sync(weight_version=1, applied_seq=1, optimizer=OLD_STATE)
    old = shard_bytes(multi)
    live[LAST_MLP] += 1
    live[EMBED] += 1

    def sync_copy(name: str, disk: SteppedDisk) -> Path:
        model_dir = shutil.copytree(multi, tmp_path / name)
        try:
            writer = CheckpointWriter(model_dir, live, disk=disk)
            writer.sync(weight_version=2, applied_seq=2, optimizer=NEW_STATE)
        except Crash:
            recover(model_dir)
        return model_dir

    complete = SteppedDisk()
    new = shard_bytes(sync_copy("complete", complete))
    num_changed = sum(old[name] != new[name] for name in old)
    assert num_changed == 2
    versions = []
    for stop_at in range(len(complete.steps)):
        model_dir = sync_copy(f"stop-{stop_at}", SteppedDisk(stop_at))
        commit = read_commit(model_dir)
        versions.append(commit.weight_version)
        assert shard_bytes(model_dir) == {1: old, 2: new}[commit.weight_version]
        assert commit.applied_seq == commit.weight_version
        assert read_optimizer(model_dir, commit.optimizer)[1] == {"version": commit.weight_version}
        assert verify(model_dir) == []
        assert state_files(model_dir) == {"commit.json", commit.optimizer.name}
        shutil.rmtree(model_dir)
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


SYNC_FOREVER = """
import sys
from pathlib import Path
import torch
from apollo_worker.sync import CheckpointWriter
from safetensors.torch import load_file
model_dir = Path(sys.argv[1])
live = {n: t for p in model_dir.glob("*.safetensors") for n, t in load_file(p).items()}
writer = CheckpointWriter(model_dir, live)
for version in range(1, 100_000):
    for tensor in live.values():
        tensor.fill_(version % 256)
    writer.sync(weight_version=version, applied_seq=version, optimizer=({"v": torch.tensor([version])}, {}))
    print(version, flush=True)
"""


def test_a_killed_sync_leaves_the_old_or_the_new_checkpoint(multi):
    command = [sys.executable, "-c", SYNC_FOREVER, str(multi)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert lines == ["1\n", "2\n", "3\n"]
    recover(multi)
    commit = read_commit(multi)
    assert verify(multi) == []
    assert {t.float().unique().item() for t in stored(multi).values()} == {commit.weight_version}
    assert read_optimizer(multi, commit.optimizer)[0]["v"].item() == commit.weight_version


def test_a_reader_that_has_a_shard_open_keeps_the_weights_it_began_with(single):
    live = stored(single)
    old = {name: tensor.clone() for name, tensor in live.items()}
    with safe_open(single / "model.safetensors", framework="pt") as reader:
        live[EMBED] += 1
        live[LAST_MLP] += 1
        CheckpointWriter(single, live).sync(weight_version=1, applied_seq=0)
        assert all(bits(reader.get_tensor(name)) == bits(tensor) for name, tensor in old.items())


# --- comparison and optimizer state ---


def test_compare_tells_equal_from_different_bit_for_bit(multi):
    live = stored(multi)
    result = compare(multi, live)
    assert (result.num_equal, result.different, result.missing, result.unmapped) == (len(live), [], [], [])
    assert result.is_equal
    live[NORM].view(torch.int16)[7] ^= 1
    live[EMBED] = live[EMBED][:, :-1]
    del live[LAST_MLP]
    live["extra"] = torch.zeros(1)
    result = compare(multi, live)
    assert set(result.different) == {NORM, EMBED}
    assert (result.missing, result.unmapped) == (["extra"], [LAST_MLP])
    assert not result.is_equal


def test_compare_sees_a_difference_after_the_first_block(single, monkeypatch):
    monkeypatch.setattr(hostcopy, "BLOCK_BYTES", 1024)
    live = stored(single)
    live[EMBED].view(torch.int16)[-1, -1] ^= 1
    assert compare(single, live).different == [EMBED]


def test_compare_takes_a_wider_live_dtype_as_equal_only_when_it_holds_the_shards_values(single):
    live = stored(single)
    live[NORM] = live[NORM].float()
    assert compare(single, live).is_equal
    live[NORM][0] += 2**-20
    assert compare(single, live).different == [NORM]


def test_negative_zero_is_not_zero(tmp_path):
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert compare(tmp_path, {"w": -torch.zeros(4)}).different == ["w"]


def test_optimizer_state_comes_back_bit_for_bit(single):
    tensors = {
        "w.m": torch.randn(4, 9).t(),
        "w.step": torch.tensor(2**40),
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3).to(torch.bfloat16),
        "empty": torch.empty(0, 5),
    }
    state = {"lr": 1e-5, "seed": 2**61 + 1, "names": ["a", None], "limit": float("inf")}
    CheckpointWriter(single, {}).sync(weight_version=1, applied_seq=0, optimizer=(tensors, state))
    commit = read_commit(single)
    loaded, loaded_state = read_optimizer(single, commit.optimizer)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)
    path = single / ".apollo" / commit.optimizer.name
    assert load_file(path).keys() == tensors.keys()  # the library reads it too
    assert path.stat().st_size == commit.optimizer.size_bytes


def test_a_damaged_optimizer_file_is_refused(single):
    CheckpointWriter(single, {}).sync(weight_version=1, applied_seq=0, optimizer=({"m": torch.zeros(4)}, {}))
    commit = read_commit(single)
    path = single / ".apollo" / commit.optimizer.name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        read_optimizer(single, commit.optimizer)
    for length in (0, 4, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=str(path.name)):
            read_optimizer(single, commit.optimizer)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_optimizer(single, commit.optimizer)


def test_a_commit_without_optimizer_has_none(single):
    writer = CheckpointWriter(single, {})
    writer.sync(weight_version=1, applied_seq=0, optimizer=({"m": torch.zeros(4)}, {}))
    writer.sync(weight_version=2, applied_seq=0)
    assert read_optimizer(single, read_commit(single).optimizer) is None
    assert state_files(single) == {"commit.json"}


@pytest.mark.parametrize("dtype", sorted(set(hostcopy.DTYPES) - {"BOOL"}))
def test_the_largest_magnitude_is_that_of_abs_and_max_whatever_the_signs(dtype):
    torch_dtype = hostcopy.DTYPES[dtype]
    if not torch_dtype.is_floating_point:
        assert hostcopy.max_abs(torch.ones(3).to(torch_dtype)) == 0
        return
    generator = torch.Generator().manual_seed(0)
    # One element, and more than one part of MAX_BYTES with a rest.
    for num in (1, hostcopy.MAX_BYTES + 3):
        values = torch.randn(num, generator=generator)
        for block in (values, values.abs(), -values.abs(), torch.zeros(num), -torch.zeros(num)):
            block = block.to(torch_dtype)
            assert hostcopy.max_abs(block) == block.double().abs().max().item()
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            block = values.to(torch_dtype)
            block[num // 2] = bad
            is_finite = bool(block.double().isfinite().all())  # F8_E4M3 has no infinity
            assert math.isfinite(hostcopy.max_abs(block)) == is_finite, bad
