"""The model directory that is followed: here, or wherever fsspec reaches (a mount, SSH, object storage).

What is read may be replaced meanwhile (a sync, a copy that is half way): nothing of it is believed that has
not the digest of its commit.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import fsspec
import msgspec

from apollo_ipc.checkpoint.record import READABLE_FORMATS, STATE_DIR, Commit
from apollo_ipc.checkpoint.shards import INDEX_FILE, SINGLE_FILE, ShardTensor, check_plain, parse_header
from apollo_ipc.errors import ApolloError, CheckpointError
from apollo_ipc.sealed import Damaged, unseal

PREFIX_BYTES = 1024 * 1024  # of a shard at first: most headers are shorter


class Source:
    """Every method raises CheckpointError where something is not there, cannot be read or is not what it
    should be. num_bytes: read so far, without the records of commits."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.num_bytes = 0

    @cached_property
    def _files(self) -> tuple[Any, str]:
        """(file system, path in it)"""
        try:
            return fsspec.core.url_to_fs(self.url)
        except Exception as error:  # each protocol has errors of its own, a missing package among them
            raise CheckpointError(f"{self.url} cannot be opened: {error}") from error

    def read_commit(self) -> Commit | None:
        """The newest, or None where nothing was synced there yet."""
        name = f"{STATE_DIR}/commit.json"
        try:
            commit = unseal(self._read(name), Commit)
        except FileNotFoundError:
            return None
        except Damaged as error:
            raise CheckpointError(f"{self.url}/{name}: not a commit record: {error}") from None
        if commit.format not in READABLE_FORMATS:
            raise CheckpointError(f"{self.url}/{name}: format {commit.format} is not known here")
        for one in [*commit.shards, *commit.files()]:
            check_plain(one, PurePosixPath(self.url))
        return commit

    def frame(self, file: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file of differences."""
        return self._range(f"{STATE_DIR}/{file}", start, end)

    def tensor(self, tensor: ShardTensor) -> bytes:
        """As it lies in the shards, whole."""
        return self._range(tensor.shard, tensor.start, tensor.end)

    def shard_index(self) -> dict[str, ShardTensor]:
        """Checkpoint tensor name -> where it lies in the shards there, by their headers."""
        found: dict[str, ShardTensor] = {}
        for name in self._shard_names():
            size = self._must(lambda name=name: int(self._files[0].size(self._path(name))), name)
            data = self._range(name, 0, min(size, PREFIX_BYTES))
            length = 8 + int.from_bytes(data[:8], "little")
            if len(data) < length <= size:
                data += self._range(name, len(data), length)
            for tensor in parse_header(PurePosixPath(name), data[:length], size):
                found[tensor.name] = tensor
        return found

    def _shard_names(self) -> list[str]:
        try:
            index = msgspec.json.decode(self._read(INDEX_FILE), type=dict[str, Any])
            names = set(msgspec.convert(index.get("weight_map"), dict[str, str]).values())
        except FileNotFoundError:
            return [SINGLE_FILE]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.url}/{INDEX_FILE}: not an index of shards: {error}") from None
        for name in names:
            check_plain(name, PurePosixPath(self.url))
        return sorted(names)

    def _range(self, name: str, start: int, end: int) -> bytes:
        files = self._files[0]
        data: bytes = self._must(lambda: files.cat_file(self._path(name), start=start, end=end), name)
        self.num_bytes += len(data)
        if len(data) != end - start:
            raise CheckpointError(f"{self.url}/{name}: ends before byte {end}")
        return data

    def _must(self, read: Any, name: str) -> Any:
        try:
            return self._reading(read, name)
        except FileNotFoundError:
            raise CheckpointError(f"{self.url}/{name} is not there (any more)") from None

    def _read(self, name: str) -> bytes:
        """Whole. Raises FileNotFoundError too."""
        files = self._files[0]
        return self._reading(lambda: files.cat_file(self._path(name)), name)

    def _reading(self, read: Any, name: str) -> Any:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError from None
        except ApolloError:
            raise
        except Exception as error:  # see above
            raise CheckpointError(f"{self.url}/{name} cannot be read: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._files[1].rstrip('/')}/{name}"
