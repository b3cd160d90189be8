"""Host memory of a sync: who waits for whom, and whose it is afterwards."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from apollo_worker.sync import copy_out
from apollo_worker.sync.copy_out import ARENA_BYTES, SLOT_BYTES, Arenas, CopyOut, budget_for
from apollo_worker.sync.writer import CheckpointWriter
from safetensors.torch import save_file

from apollo_ipc.checkpoint.shards import BLOCK_BYTES
from apollo_ipc.errors import CheckpointError

NUM_BYTES = 3 * ARENA_BYTES


def lazily_free_bytes() -> int:
    """What of this process the kernel may take without writing it anywhere (MADV_FREE). Copies that an
    earlier test's traceback still holds are gone first: the collector would let go of them at any time."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree:"))


def big_model(directory: Path) -> dict[str, torch.Tensor]:
    live = {"a": torch.randn(NUM_BYTES // 4).bfloat16(), "b": torch.randn(NUM_BYTES // 4).bfloat16()}
    directory.mkdir()
    save_file(live, directory / "model.safetensors")
    return live


@pytest.mark.parametrize("end", ["committed", "failed"])
def test_after_a_sync_its_copy_is_the_kernels_for_the_taking(tmp_path, end):
    live = big_model(tmp_path / "model")
    writer = CheckpointWriter(tmp_path / "model", live)
    for tensor in live.values():
        tensor += 1
    if end == "failed":
        live["b"][-1] = torch.nan
    before = lazily_free_bytes()
    try:
        running = writer.start("full", weight_version=1, applied_seq=0)
        running.join()  # what holds `running` and `writer` holds no copy
    except CheckpointError:
        assert end == "failed"
    copied = NUM_BYTES - (BLOCK_BYTES if end == "failed" else 0)  # the block with the NaN is not copied
    assert lazily_free_bytes() - before >= copied * 0.9


def test_the_writer_begins_when_all_is_copied():
    copies, seen = CopyOut(ARENA_BYTES, Arenas()), []
    taking = threading.Thread(target=lambda: seen.extend(b.nbytes for b in copies.take("x")), daemon=True)
    taking.start()
    copies.put("x", iter([torch.zeros(SLOT_BYTES, dtype=torch.uint8)] * 3))
    taking.join(0.2)
    assert seen == []
    copies.all_put()
    taking.join(5)
    assert seen == [SLOT_BYTES] * 3


def test_memory_that_is_still_being_got_keeps_what_is_copied_into_it():
    for _ in range(5):
        arenas = Arenas()
        getting = threading.Thread(target=arenas.get, args=(4 * ARENA_BYTES,))
        getting.start()
        arenas.slots(0)[:] = 7
        arenas.slots(2)[:] = 9
        getting.join(30)
        assert arenas.slots(0).min() == arenas.slots(0).max() == 7
        assert arenas.slots(2).min() == arenas.slots(2).max() == 9


def test_memory_that_was_got_ahead_is_there_at_the_first_sync():
    arenas = Arenas()
    before = lazily_free_bytes()
    arenas.get(2 * ARENA_BYTES)
    assert lazily_free_bytes() - before >= 2 * ARENA_BYTES * 0.9
    assert np.all(arenas.slots(1) == 0)


def test_the_budget_is_all_where_memory_is_free_and_a_shard_where_it_is_not(monkeypatch):
    def free(num_bytes: int) -> None:
        monkeypatch.setattr(
            copy_out.Path, "read_text", lambda self: f"MemTotal: 9 kB\nMemAvailable: {num_bytes // 1024} kB\n"
        )

    sizes = [SLOT_BYTES, 1]
    free(100 * SLOT_BYTES)
    assert budget_for(sizes, least_bytes=0) == 2 * SLOT_BYTES
    assert budget_for([100 * SLOT_BYTES], least_bytes=0) == 25 * SLOT_BYTES
    assert budget_for([100 * SLOT_BYTES], least_bytes=50 * SLOT_BYTES) == 50 * SLOT_BYTES
