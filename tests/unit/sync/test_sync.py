"""Live tensors into the checkpoint, with a tiny model that transformers saves and loads."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from apollo_worker.model import host_buffer as hostcopy
from apollo_worker.model.compare import compare
from apollo_worker.model.host_buffer import HostBuffer, flat_pieces
from apollo_worker.sync import sync_task as sync_module
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file, save_file
from saved_model import (
    EMBED,
    HEAD,
    LAST_MLP,
    NORM,
    assert_loads_as,
    bits,
    shard_bytes,
    shard_of,
    state_files,
    stored,
)

from apollo_ipc.checkpoint import read_commit, recover, rounded, verify
from apollo_ipc.checkpoint.shards import read_shards, shard_index
from apollo_ipc.errors import CheckpointError


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


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_an_fp32_checkpoint_served_in_bf16_keeps_its_bits_where_nothing_was_trained(single, kind):
    exact = {name: torch.randn(tensor.shape) for name, tensor in stored(single).items()}
    save_file(exact, single / "model.safetensors", metadata={"format": "pt"})
    live = {name: tensor.bfloat16() for name, tensor in exact.items()}
    writer = CheckpointWriter(single, live)
    assert writer.sync(kind, weight_version=1, applied_seq=0).num_tensors_changed == 0
    live[NORM][0] += 1
    assert writer.sync(kind, weight_version=2, applied_seq=0).num_tensors_changed == 1
    recover(single)  # works a delta in
    assert verify(single) == []
    assert rounded(single) == (1, len(exact))
    now = stored(single)
    assert bits(now[NORM]) == bits(live[NORM].float())  # trained: what is served
    assert [name for name in exact if bits(now[name]) != bits(exact[name])] == [NORM]
    assert CheckpointWriter(single, live).sync(weight_version=3, applied_seq=0).num_tensors_changed == 0


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
