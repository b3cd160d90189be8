"""Whether every byte on disk is the one that was committed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import history
from apollo_ipc.checkpoint.record import Commit, pending_dir, read_commit, state_path
from apollo_ipc.checkpoint.shards import ShardTensor, file_digest, read_blocks, read_shard
from apollo_ipc.errors import CheckpointError

MAX_THREADS = 8
MAX_NAMED = 3


class Problem(msgspec.Struct, frozen=True):
    shard: str
    tensor: str | None
    message: str


def verify(
    model_dir: Path, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Reads every shard, delta and optimizer file and compares each digest with the commit record. on_tensor:
    called with how many tensors of the shards were read, and of how many.

    Writes and locks nothing; if a sync commits meanwhile, starts again. Raises CheckpointError where there
    is no record to compare with.
    """
    while True:
        commit = read_commit(model_dir)
        if commit is None:
            raise CheckpointError(f"{model_dir}: nothing was synced here yet, so there is nothing to verify")
        problems = list(_problems(model_dir, commit, on_tensor))
        latest = read_commit(model_dir)
        if not problems or latest == commit:
            return problems


def rounded(model_dir: Path) -> tuple[int, int]:
    """(those that hold no more than bf16 can, all) of the F32 tensors that the last sync left: what was
    trained in bf16 a sync rounds."""
    commit = read_commit(model_dir)
    shards = [read_shard(model_dir / name) for name in (commit.shards if commit else ())]
    tensors = [tensor for shard in shards for tensor in shard.tensors if tensor.dtype == "F32"]
    return sum(_is_bf16(model_dir, tensor) for tensor in tensors), len(tensors)


def _is_bf16(model_dir: Path, tensor: ShardTensor) -> bool:
    """Whether the lower half of each number (little-endian) is zero. Read until it is not."""
    blocks = map(bytes, read_blocks(model_dir / tensor.shard, tensor.start, tensor.end))
    return all(not block[at::4].strip(b"\0") for block in blocks for at in (0, 1))


def check_shards(model_dir: Path) -> None:
    """Before the shards are loaded, under their lock and recovered: each tensor against the last commit.

    Several threads, and the bytes are read into the page cache, from where the load takes them. A directory
    that was never synced is taken as it is. Raises CheckpointError naming tensors that are not as committed.
    """
    commit = read_commit(model_dir)
    if commit is None:
        return
    shards = [read_shard(model_dir / name) for name in commit.shards]
    tensors = [tensor for shard in shards for tensor in shard.tensors]

    def is_good(tensor: ShardTensor) -> bool:
        found = file_digest(model_dir / tensor.shard, tensor.start, tensor.end)
        return found == commit.in_shard(tensor.name)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        bad = [tensor for tensor, good in zip(tensors, pool.map(is_good, tensors), strict=True) if not good]
    if bad:
        names = ", ".join(f"{tensor.name} in {tensor.shard}" for tensor in bad[:MAX_NAMED])
        more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        raise CheckpointError(
            f"{model_dir}: {names}{more}: not the bytes that the last sync wrote (version "
            f"{commit.weight_version}). Damaged: bring the files back from a copy. Replaced on purpose: "
            f"`apollo-ipc checkpoint forget {model_dir}` starts from the files as they are"
        )


def _problems(model_dir: Path, commit: Commit, on_tensor: Callable[[int, int], None]) -> Iterator[Problem]:
    if (pending := pending_dir(model_dir, commit.serial)).is_dir():
        yield Problem(pending.name, None, "committed, but not all of its files are in place: run recover")
    seen: set[str] = set()
    for name in commit.shards:
        try:
            shard = read_shard(model_dir / name)
        except CheckpointError as error:
            yield Problem(name, None, error.message)
            continue
        for tensor in shard.tensors:
            seen.add(tensor.name)
            yield from _tensor_problems(model_dir, commit, tensor)
            on_tensor(len(seen), len(commit.tensors))
        if (size := commit.shards[name].size_bytes) != shard.size_bytes:
            yield Problem(name, None, f"{shard.size_bytes} bytes, the commit says {size}")
    for name in sorted(commit.tensors.keys() - seen):
        yield Problem("?", name, "in the commit, but in no readable shard")
    yield from _file_problems(model_dir, commit)


def _tensor_problems(model_dir: Path, commit: Commit, tensor: ShardTensor) -> Iterator[Problem]:
    found = file_digest(model_dir / tensor.shard, tensor.start, tensor.end)
    recorded = commit.in_shard(tensor.name)
    if found == recorded:
        return
    if commit.delta and found == commit.tensors.get(tensor.name):
        yield Problem(tensor.shard, tensor.name, "a delta was worked in, but not everywhere: run recover")
    else:
        yield Problem(
            tensor.shard, tensor.name, f"digest {found}, the commit says {recorded or 'no such tensor'}"
        )


def _file_problems(model_dir: Path, commit: Commit) -> Iterator[Problem]:
    present = {one.name for one in (commit.optimizer, commit.delta and commit.delta.file) if one}
    optimizers = [version.optimizer for version in history.versions(commit) if version.optimizer]
    files = {file.name: file for file in (*optimizers, *(delta.file for delta in commit.deltas()))}
    for name, file in files.items():
        if not history.is_intact(model_dir, file):
            what = "optimizer state" if name.startswith("optimizer") else "differences"
            whose = "" if name in present else " of older versions"
            yield Problem(name, None, f"missing or damaged {what}{whose}")
    for undo in commit.undos:
        for name in undo.kept:
            path = state_path(model_dir, f"old-{undo.base}") / name
            try:
                read_shard(path)
            except CheckpointError as error:
                yield Problem(path.parent.name, None, error.message)
