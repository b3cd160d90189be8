"""One version of the source in the live weights: fetched and proven first, then written, tensor by tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
import xxhash

from apollo_ipc.checkpoint import delta as codec
from apollo_ipc.checkpoint.record import Commit, Version
from apollo_ipc.checkpoint.shards import ShardTensor
from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import ApolloError, CheckpointError
from apollo_worker.follow.route import Frame, Route, frames_of, route
from apollo_worker.follow.source import Source
from apollo_worker.model.host_buffer import DTYPE_NAMES, as_bytes
from apollo_worker.model.live_tensor import LiveTensor, whole, write


class Cannot(ApolloError):
    """This source can never be followed into this model: another model, or another dtype."""

    code = "cannot_follow"


class Frames:
    """Differences that were fetched, in a directory of our own: the next version's way begins with them, back
    to the shards, so they are not fetched twice."""

    def __init__(self, directory: Path):
        self._directory = directory
        make_private_dir(directory)
        self._index = directory / "frames.json"
        self.known: list[Frame] = []
        try:
            known = msgspec.json.decode(self._index.read_bytes(), type=list[Frame])
            self.known = [frame for frame in known if self._path(frame).exists()]
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            shutil.rmtree(directory)
            make_private_dir(directory)

    def read(self, frame: Frame, source: Source) -> bytes:
        """From here where it is here. Of a kept one that is damaged, the result's digest tells."""
        path = self._path(frame)
        if path.exists():
            return path.read_bytes()
        data = source.frame(frame.file, frame.start, frame.end)
        path.write_bytes(data)
        return data

    def keep(self, frames: list[Frame]) -> None:
        """These and no others."""
        kept = {self._path(frame): frame for frame in frames}
        self.known = [Frame(frame.name, frame.base, frame.result) for frame in kept.values()]
        self._index.write_bytes(msgspec.json.encode(self.known))
        for path in self._directory.iterdir():
            if path not in kept and path != self._index:
                path.unlink()

    def forget(self) -> None:
        self.keep([])

    def whole(self, name: str) -> Path:
        return self._directory / f"whole-{xxhash.xxh3_128_hexdigest(name.encode())}"

    def _path(self, frame: Frame) -> Path:
        told = "\0".join((frame.name, frame.base, frame.result))
        return self._directory / xxhash.xxh3_128_hexdigest(told.encode())


class Follows:
    """The live tensors (by checkpoint name) and how the source's versions come into them.

    digests: of each live tensor's bytes as they are; a follower that was killed while it wrote finds
    tensors that no version knows, and fetches them whole.
    """

    def __init__(
        self, source: Source, live: Mapping[str, LiveTensor], frames: Frames, on_progress: Callable[[], None]
    ):
        self._source, self._live, self._frames = source, live, frames
        self._on_progress = on_progress
        self.digests: dict[str, str] = {}
        for name, tensor in live.items():
            self.digests[name] = digest_of(tensor)
            on_progress()

    def differs(self, version: Version) -> list[str]:
        """Raises Cannot where the version does not have all the tensors."""
        if missing := [name for name in self._live if name not in version.tensors]:
            raise Cannot(f"{self._source.url} has no tensor {missing[0]!r}: it is another model")
        return [name for name in self._live if self.digests[name] != version.tensors[name]]

    def fetch(self, commit: Commit, version: Version) -> dict[str, Route]:
        """Fetches all that is missing, and computes and proves each tensor once; nothing live is touched.

        Raises CheckpointError where the source has changed meanwhile, or a copy of it is not whole.
        """
        there, known = frames_of(commit), self._frames.known
        kept_here: dict[str, list[Frame]] = {}
        for frame in known:
            kept_here.setdefault(frame.name, []).append(frame)
        index: dict[str, ShardTensor] = {}
        routes: dict[str, Route] = {}
        for name in self.differs(version):
            frames = [*kept_here.get(name, []), *there.get(name, [])]
            size, target = self._live[name].nbytes, version.tensors[name]
            way = route(self.digests[name], commit.in_shard(name), size, target, frames)
            if way is None:
                raise CheckpointError(
                    f"{self._source.url} keeps no way to {name!r} of version {version.weight_version}"
                )
            if way.is_whole:
                index = index or self._source.shard_index()
                self._fetch_whole(name, index)
            self._prove(self._bytes(name, way), name, target)
            routes[name] = way
            self._on_progress()
        return routes

    @torch.no_grad()
    def write(self, version: Version, routes: Mapping[str, Route]) -> None:
        """Into the live weights, in place, each tensor in one copy."""
        for name, way in routes.items():
            tensor, target = self._live[name], version.tensors[name]
            if digest_of(tensor) != target:  # of tied tensors the other name was written already
                data = self._bytes(name, way)
                self._prove(data, name, target)
                write(tensor, torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))
            self.digests[name] = target
            self._on_progress()
        used = [step.frame for way in routes.values() for step in way.steps]
        self._frames.keep(
            [f for f in [*self._frames.known, *used] if self.digests[f.name] in (f.base, f.result)]
        )

    def _fetch_whole(self, name: str, index: Mapping[str, ShardTensor]) -> None:
        tensor, live = index.get(name), self._live[name]
        if tensor is None:
            raise Cannot(f"no shard of {self._source.url} has {name!r}: it is another model")
        if tensor.shape != list(live.shape):
            raise Cannot(
                f"{self._source.url}: {name!r} is {tensor.shape}, here {list(live.shape)}: another model"
            )
        if tensor.dtype != DTYPE_NAMES.get(live.dtype):
            raise Cannot(
                f"{self._source.url}: {name!r} is {tensor.dtype}, served here as {live.dtype}; serve it in "
                "the checkpoint's own dtype (vLLM's --dtype)"
            )
        self._frames.whole(name).write_bytes(self._source.tensor(tensor))

    def _bytes(self, name: str, way: Route) -> bytearray:
        live = self._live[name]
        dtype = DTYPE_NAMES[live.dtype]
        data = bytearray(self._frames.whole(name).read_bytes()) if way.is_whole else bytes_of(live)
        for frame, is_reverse in way.steps:
            try:
                codec.apply(self._frames.read(frame, self._source), data, dtype, is_reverse=is_reverse)
            except CheckpointError as error:
                self._frames.forget()  # it may be one of ours that is damaged, or came damaged
                raise CheckpointError(f"{self._source.url}: {name!r}: {error.message}; read again") from None
        return data

    def _prove(self, data: bytearray, name: str, target: str) -> None:
        if (found := xxhash.xxh3_128_hexdigest(data)) != target:
            self._frames.forget()  # it may be one of ours that is damaged
            raise CheckpointError(
                f"{self._source.url}: {name!r} would get digest {found}, its commit says {target}; read again"
            )


def bytes_of(tensor: LiveTensor) -> bytearray:
    """A copy, in the checkpoint's order."""
    return bytearray(as_bytes(whole(tensor).cpu().contiguous().flatten()))


def digest_of(tensor: LiveTensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor))
