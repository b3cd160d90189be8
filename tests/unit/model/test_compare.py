"""Live tensors against the shards, optimizer state, and the largest magnitude."""

from __future__ import annotations

import math

import pytest
import torch
from apollo_worker.model import host_buffer as hostcopy
from apollo_worker.model.compare import compare
from apollo_worker.sync.optimizer_file import read_optimizer
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import load_file, save_file
from saved_model import EMBED, LAST_MLP, NORM, bits, state_files, stored

from apollo_ipc.checkpoint import read_commit
from apollo_ipc.errors import CheckpointError


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
