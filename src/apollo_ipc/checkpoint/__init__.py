"""The model directory, which is the checkpoint: no torch, so that vLLM, the worker and the CLI share it.

shards.py        what lies where in safetensors files
record.py        commit.json: what is committed
transaction.py   a sync as one commit; recovery after a crash
delta.py         differences between two versions of a tensor
fold.py          a delta worked into the shards
history.py       older versions: their bytes, how they differ
compact.py       shards kept whole become differences, and differences in a row one
pin.py           the version that stays restorable
snapshot.py      a directory that stands still while a command reads it
verify.py        every byte against its digest
disk.py          every durable file operation, in one layer that a crash simulator replaces
"""

from apollo_ipc.checkpoint.compact import compact
from apollo_ipc.checkpoint.pin import pin_version
from apollo_ipc.checkpoint.record import (
    STATE_DIR,
    Commit,
    Delta,
    DeltaTensor,
    FileRecord,
    ShardRecord,
    Undo,
    Version,
    is_current,
    read_commit,
)
from apollo_ipc.checkpoint.recovery import LOCK_WAIT_S, Mended, loading, recover
from apollo_ipc.checkpoint.restore import forget, restore_version
from apollo_ipc.checkpoint.shards import ShardTensor, shard_index
from apollo_ipc.checkpoint.snapshot import Snapshot, snapshot
from apollo_ipc.checkpoint.transaction import SPACE_MARGIN_BYTES, Transaction, begin
from apollo_ipc.checkpoint.verify import Problem, check_shards, rounded, verify

__all__ = [
    "LOCK_WAIT_S",
    "SPACE_MARGIN_BYTES",
    "STATE_DIR",
    "Commit",
    "Delta",
    "DeltaTensor",
    "FileRecord",
    "Mended",
    "Problem",
    "ShardRecord",
    "ShardTensor",
    "Snapshot",
    "Transaction",
    "Undo",
    "Version",
    "begin",
    "check_shards",
    "compact",
    "forget",
    "is_current",
    "loading",
    "pin_version",
    "read_commit",
    "recover",
    "restore_version",
    "rounded",
    "shard_index",
    "snapshot",
    "verify",
]
