"""Older recovery points: which there are, their bytes, and how two of them differ.

    version 4 ---delta---> its shards ---undo---> next shards ---undo---> the shards in place

A version is read by starting at bytes that are whole (the shards in place, or shards kept beside) and going
back through differences. Each stage is checked by digest, so a wrong base is never taken for a right one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from apollo_ipc.checkpoint import delta as codec
from apollo_ipc.checkpoint.record import Commit, Delta, FileRecord, Undo, Version, read_commit, state_path
from apollo_ipc.checkpoint.shards import ShardTensor, file_digest, read_range, read_shard
from apollo_ipc.errors import CheckpointError, UserError
from apollo_ipc.wire.replies import History, VersionInfo


def versions(commit: Commit) -> list[Version]:
    """Every version that can be restored, oldest first; the last one is the present."""
    return [*commit.history, commit.version]


def find(commit: Commit, weight_version: int) -> Version:
    """The newest recovery point of that weight version. Raises UserError naming those that are there."""
    for version in reversed(versions(commit)):
        if version.weight_version == weight_version:
            return version
    known = ", ".join(str(version.weight_version) for version in versions(commit))
    raise UserError(f"version {weight_version} is not kept; there are: {known}", field="version")


def listing(model_dir: Path) -> History:
    """What can be restored, as every interface shows it. Raises UserError where nothing was synced yet."""
    commit = read_commit(model_dir)
    if commit is None:
        raise UserError(f"{model_dir}: nothing was synced here yet, so there are no versions")
    shown = [
        VersionInfo(
            weight_version=one.weight_version,
            serial=one.serial,
            committed_at=one.committed_at,
            kind="delta" if one.delta else "full",
            has_optimizer=one.optimizer is not None,
            applied_seq=one.applied_seq,
            restored_from=one.extra.get("restored_from"),
            is_present=one.serial == commit.serial,
            is_pinned=one.weight_version == commit.pinned,
        )
        for one in versions(commit)
    ]
    return History(str(model_dir), size_bytes(model_dir, commit), shown)


class BaseReader:
    """Tensors as the shards of an older base held them. Hold the checkpoint's lock, or expect a
    CheckpointError where a sync replaces what is being read."""

    def __init__(self, model_dir: Path, commit: Commit):
        self._model_dir = model_dir
        self._commit = commit

    def read(self, tensor: ShardTensor, base: int) -> bytearray:
        """The bytes of `tensor` (as it lies in the shards in place: their layout never changes) at `base`."""
        data, steps = self._whole(tensor, base)
        for delta in steps:
            self.apply(delta, tensor, data)
        return data

    def _whole(self, tensor: ShardTensor, base: int) -> tuple[bytearray, list[Delta]]:
        """Bytes that are stored whole, and the differences that lead from there to `base`."""
        steps: list[Delta] = []
        for undo in _undos_from(self._commit, base):
            if tensor.shard in undo.kept:
                path = state_path(self._model_dir, f"old-{undo.base}") / tensor.shard
                old = next(one for one in read_shard(path).tensors if one.name == tensor.name)
                return read_range(path, old.start, old.end), steps
            if undo.delta is not None and tensor.name in undo.delta.tensors:
                steps.insert(0, undo.delta)
        return read_range(self._model_dir / tensor.shard, tensor.start, tensor.end), steps

    def apply(self, delta: Delta, tensor: ShardTensor, data: bytearray) -> None:
        """Raises CheckpointError where `data` is not what the difference starts from."""
        base, result = delta.digests(tensor.name)
        found = digest(data)
        if found == result:  # a fold that was cut off has brought this shard there already
            return
        if found != base:
            raise CheckpointError(
                f"{self._model_dir}: {tensor.name!r} has digest {found}; the difference {delta.file.name} "
                f"leads from {base} to {result}: it is not applied to another tensor"
            )
        place = delta.tensors[tensor.name]
        frame = read_range(state_path(self._model_dir, delta.file.name), place.start, place.end)
        codec.apply(frame, data, tensor.dtype, is_reverse=delta.is_reverse)


class VersionReader:
    """Tensors of `version`, which `commit` can restore."""

    def __init__(self, model_dir: Path, commit: Commit, version: Version):
        self._model_dir = model_dir
        self._version = version
        self._shards = BaseReader(model_dir, commit)

    def read(self, tensor: ShardTensor) -> bytearray:
        """The bytes of `tensor`. Raises CheckpointError where they are not those that were committed."""
        version = self._version
        data = self._shards.read(tensor, version.base)
        if version.delta is not None and tensor.name in version.delta.tensors:
            self._shards.apply(version.delta, tensor, data)
        if (found := digest(data)) != (recorded := version.tensors.get(tensor.name)):
            raise CheckpointError(
                f"{self._model_dir}: {tensor.name!r} of version {version.weight_version} is damaged: "
                f"digest {found}, its commit says {recorded}"
            )
        return data


def _undos_from(commit: Commit, base: int) -> list[Undo]:
    """Those that lead from the shards in place back to base `base`, the oldest first."""
    at = base
    chain: list[Undo] = []
    by_base = {undo.base: undo for undo in commit.undos}
    while at != commit.base:
        if at not in by_base:
            raise CheckpointError(f"the record has no way back to the shards of commit {base}")
        chain.append(by_base[at])
        at = by_base[at].newer
    return chain


def keep(
    candidates: Iterable[Version], undos: Iterable[Undo], base: int, num_kept: int, pinned: int | None = None
) -> tuple[list[Version], list[Undo]]:
    """The newest `num_kept` versions that the undos reach from `base`, and the one of weight version
    `pinned` if it is none of them; and the undos that they need."""
    by_newer = {undo.newer: undo for undo in undos}
    chain: list[Undo] = []
    at, reachable = base, {base}
    while at in by_newer:
        chain.insert(0, by_newer[at])
        at = by_newer[at].base
        reachable.add(at)
    restorable = [version for version in candidates if version.base in reachable]
    kept = restorable[-num_kept:] if num_kept else []
    if pinned not in [version.weight_version for version in kept]:
        kept = [one for one in restorable if one.weight_version == pinned][-1:] + kept
    needed: set[int] = {version.base for version in kept}
    while chain and chain[0].base not in needed:
        chain.pop(0)
    return kept, chain


def size_bytes(model_dir: Path, commit: Commit) -> int:
    """What the history takes on disk beside the present version."""
    needed_now = {file.name for file in (commit.optimizer, commit.delta and commit.delta.file) if file}
    total = 0
    for name in commit.files() - needed_now:
        path = state_path(model_dir, name)
        files = path.iterdir() if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.exists())
    return total


class TensorDifference(msgspec.Struct, frozen=True):
    """How one tensor differs between two versions."""

    name: str
    num_elements: int
    num_changed: int
    max_steps: int  # largest distance in steps of the dtype's ordering
    relative_norm: float | None  # |B - A| / |A|, Frobenius; None for a dtype that numpy cannot read


def diff(model_dir: Path, commit: Commit, a: Version, b: Version) -> Iterator[TensorDifference]:
    """The tensors whose bytes differ, in the shards' order. Raises CheckpointError like VersionReader."""
    old, new = VersionReader(model_dir, commit, a), VersionReader(model_dir, commit, b)
    for name in commit.shards:
        for tensor in read_shard(model_dir / name).tensors:
            if a.tensors.get(tensor.name) != b.tensors.get(tensor.name):
                yield _difference(tensor, old.read(tensor), new.read(tensor))


def _difference(tensor: ShardTensor, old: bytearray, new: bytearray) -> TensorDifference:
    num_elements = num_changed = max_steps = 0
    for d in codec.changes(old, new, tensor.dtype):
        num_elements += d.size
        num_changed += int(np.count_nonzero(d))
        max_steps = max(max_steps, int(d.max()), -int(d.min()))
    changed, whole = 0.0, 0.0
    for x, y in zip(_floats(old, tensor.dtype), _floats(new, tensor.dtype), strict=True):
        changed += float(np.square(y - x).sum())
        whole += float(np.square(x).sum())
    is_readable = tensor.dtype in _FLOATS
    norm = (changed / whole) ** 0.5 if is_readable and whole > 0 else None
    return TensorDifference(tensor.name, num_elements, num_changed, max_steps, norm)


_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": None}


def _floats(data: bytearray, dtype: str) -> Iterator[np.ndarray]:
    if dtype not in _FLOATS:
        return
    for piece in codec.pieces(data, dtype):
        if dtype == "BF16":
            yield (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        else:
            yield piece.view(_FLOATS[dtype]).astype(np.float64)


def is_intact(model_dir: Path, file: FileRecord) -> bool:
    path = state_path(model_dir, file.name)
    return path.exists() and file_digest(path, 0, path.stat().st_size) == file.digest


def digest(data: bytes | bytearray | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class RunningDigest:
    """xxh3_128 of what is written to a file, and how much that is."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        self.num_bytes += len(data)
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
