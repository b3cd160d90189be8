"""What lies where in a model directory's safetensors shards, without torch and without reading a tensor.

File format: 8 bytes of little-endian header length, a JSON header, then the tensors without gaps
(huggingface.co/docs/safetensors). Files come from strangers: every number is checked before it is used.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any

import msgspec
import xxhash

from apollo_ipc.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE)
BLOCK_BYTES = 8 * 1024 * 1024  # read and hashed at a time: small enough to stay in a core's cache

# Sizes in bytes; a dtype that is not here (sub-byte floats) is carried along unread.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class ShardTensor(msgspec.Struct, frozen=True):
    """Where one checkpoint tensor lies: bytes `start` to `end` of the file `shard`."""

    name: str
    shard: str
    dtype: str  # safetensors' name: "BF16"
    shape: list[int]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class Shard(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    mtime_ns: int
    mode: int  # permission bits
    header: bytes  # length prefix included: the file up to its first tensor
    tensors: list[ShardTensor]  # in file order, which covers the file without gap or overlap


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def shard_index(model_dir: Path) -> dict[str, ShardTensor]:
    """Checkpoint tensor name -> where it lies. Raises CheckpointError like read_shards."""
    return {tensor.name: tensor for shard in read_shards(model_dir).values() for tensor in shard.tensors}


def read_shards(model_dir: Path) -> dict[str, Shard]:
    """File name -> Shard, for a directory with model.safetensors or with an index.json and its shards.

    Reads headers only. Raises CheckpointError for a directory without safetensors, for one whose index and
    shards contradict each other, and for a file that is not well-formed safetensors.
    """
    shards = {name: read_shard(model_dir / name) for name in _shard_names(model_dir)}
    owner: dict[str, str] = {}
    for shard in shards.values():
        for tensor in shard.tensors:
            if tensor.name in owner:
                raise CheckpointError(
                    f"{model_dir}: tensor {tensor.name!r} is in {owner[tensor.name]} and in {shard.name}"
                )
            owner[tensor.name] = shard.name
    for tensor, name in _read_index(model_dir).items():
        if owner.get(tensor) != name:
            raise CheckpointError(f"{model_dir / INDEX_FILE}: {tensor!r} is not in {name}, as it says")
    return shards


def _shard_names(model_dir: Path) -> list[str]:
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory")
    single = (model_dir / SINGLE_FILE).exists()
    if names := sorted(set(_read_index(model_dir).values())):
        # transformers would load the single file and vLLM the index: two checkpoints in one directory.
        if single and SINGLE_FILE not in names:
            raise CheckpointError(f"{model_dir}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove one")
        return names
    if single:
        return [SINGLE_FILE]
    if names := sorted(path.name for path in model_dir.glob("*.safetensors")):
        return names
    other = next((path.name for path in model_dir.glob("*.bin")), None)
    raise CheckpointError(
        f"{model_dir}: needs safetensors, found {other or 'no weights at all'}; "
        "save the model again with save_pretrained"
    )


def _read_index(model_dir: Path) -> dict[str, str]:
    path = model_dir / INDEX_FILE
    if not path.exists():
        return {}
    try:
        index = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        weight_map = msgspec.convert(index.get("weight_map"), dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards: {error}") from None
    for name in weight_map.values():
        check_plain(name, path)
    return weight_map


def check_plain(name: str, source: PurePath) -> None:
    """A record may only name files of its own directory: model directories are downloaded from strangers."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise CheckpointError(f"{source}: {name!r} is not a plain file name")


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file; no tensor is read. Raises CheckpointError if it is not one."""
    with reading(path) as file:
        info = os.fstat(file.fileno())
        length = int.from_bytes(prefix := file.read(8), "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, info.st_size - 8):
            raise CheckpointError(f"{path}: not safetensors: header of {length} bytes in {info.st_size}")
        header = prefix + file.read(length)
    tensors = parse_header(path, header, info.st_size)
    mode = stat.S_IMODE(info.st_mode)
    return Shard(path.name, info.st_size, info.st_mtime_ns, mode, header, tensors)


def read_metadata(header: bytes) -> dict[str, str]:
    """`__metadata__` of a header that read_shard has accepted."""
    fields = msgspec.json.decode(header[8:], type=dict[str, msgspec.Raw])
    return msgspec.json.decode(fields.get("__metadata__", b"{}"), type=dict[str, str])


def parse_header(path: PurePath, header: bytes, file_bytes: int) -> list[ShardTensor]:
    """Of a file of `file_bytes`, length prefix included. Raises CheckpointError if it is not safetensors'."""
    try:
        fields = msgspec.json.decode(header[8:], type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        entries = [(name, msgspec.json.decode(raw, type=_HeaderEntry)) for name, raw in fields.items()]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not safetensors: {error}") from None
    tensors: list[ShardTensor] = []
    at = len(header)
    for name, entry in sorted(entries, key=lambda item: item[1].data_offsets):
        start, end = (len(header) + offset for offset in entry.data_offsets)
        element_bytes = DTYPE_BYTES.get(entry.dtype)
        fits = element_bytes is None or end - start == math.prod(entry.shape) * element_bytes
        if start != at or end < start or not fits or min(entry.shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: not safetensors: {name!r} ({entry.dtype} {entry.shape}) at {entry.data_offsets}"
            )
        tensors.append(ShardTensor(name, path.name, entry.dtype, entry.shape, start, end))
        at = end
    if at != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes} bytes, but its header describes {at}: cut short?")
    return tensors


def read_blocks(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """Bytes `start` to `end` of a file in pieces of at most BLOCK_BYTES; each is valid until the next."""
    buffer = memoryview(bytearray(min(BLOCK_BYTES, end - start)))
    with reading(path) as file:
        file.seek(start)
        while start < end:
            block = buffer[: end - start]
            if file.readinto(block) < len(block):
                raise CheckpointError(f"{path}: ends before byte {end}")
            yield block
            start += len(block)


def read_range(path: Path, start: int, end: int) -> bytearray:
    """Bytes `start` to `end` of a file."""
    data = bytearray(end - start)
    with reading(path) as file:
        file.seek(start)
        if file.readinto(data) < len(data):
            raise CheckpointError(f"{path}: ends before byte {end}")
    return data


@contextmanager
def reading(path: Path) -> Generator[BufferedReader]:
    """`path` open for reading; errors inside the block become CheckpointError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def file_digest(path: Path, start: int, end: int, on_progress: Callable[[], None] = lambda: None) -> str:
    """xxh3_128 (hex) of bytes `start` to `end`. on_progress: called after each block."""
    digest = xxhash.xxh3_128()
    for block in read_blocks(path, start, end):
        digest.update(block)
        on_progress()
    return digest.hexdigest()
