"""The weights manifest: what the export inside vLLM tells the worker about the weights it shares.

Written by apollo_router.export, read by apollo_worker.attach. JSON, mode 0600, renamed into place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Literal

import msgspec

from apollo_ipc.errors import AttachError, NotReady
from apollo_ipc.sealed import Damaged, seal, unseal

MANIFEST_FORMAT = 1
MAX_MANIFEST_BYTES = 256 * 1024 * 1024


class Segment(msgspec.Struct, frozen=True):
    """A contiguous piece of memory that vLLM owns and others may map."""

    size_bytes: int
    # shm: `/proc/PID/fd/N` of the exporter's memfd.
    path: str | None = None
    # cuda_ipc: the 64 bytes of cudaIpcMemHandle_t, hex.
    handle: str | None = None


class SharedTensor(msgspec.Struct, frozen=True):
    """A tensor of the loaded vLLM model inside a segment."""

    dtype: str  # torch's name without the prefix: "bfloat16"
    shape: list[int]
    stride: list[int]  # in elements
    segment: int  # index into Manifest.segments
    offset_bytes: int


class View(msgspec.Struct, frozen=True):
    """Where the elements of one checkpoint tensor lie in a shared tensor, in the checkpoint's own order."""

    tensor: str  # vLLM's parameter name, key of Manifest.tensors
    shape: list[int]  # the checkpoint tensor's shape
    stride: list[int]  # in elements of the shared tensor's dtype
    offset: int  # in elements from the shared tensor's first element


class Piece(msgspec.Struct, frozen=True):
    """A box of one checkpoint tensor, and where its elements lie in a shared tensor of this rank."""

    tensor: str  # vLLM's parameter name, key of Manifest.tensors
    start: list[int]  # the box's first index along each dimension of the checkpoint tensor
    shape: list[int]  # the box's size along each
    stride: list[int]  # in elements of the shared tensor's dtype; 0 where the size is 1
    offset: int  # in elements from the shared tensor's first element


class Pieces(msgspec.Struct, frozen=True):
    """What one rank holds of a checkpoint tensor; the ranks' pieces together are all of it, some twice."""

    shape: list[int]  # the checkpoint tensor's
    pieces: list[Piece]


class Refusal(msgspec.Struct, frozen=True):
    """Something that cannot be shared, and why in words that a user understands."""

    name: str  # a checkpoint tensor, a vLLM tensor or a vLLM setting
    reason: str
    # True: training would not reach all that is served. False: matters only if the model needs this tensor.
    blocks: bool = True


class Serving(msgspec.Struct, frozen=True):
    """How this vLLM makes tokens of requests, where that is not what the model's directory says.

    tokenizer: the directory or name it was loaded from, empty for the model's own; tokenizer_mode: "hf", what
    renders by itself ("mistral", ...), or "auto" where nobody has looked yet; stop_ids: the ids of its
    generation configuration that end an answer, beside the tokenizer's own, None for what the directory says;
    chat_template and tool_chat_template (of requests with tools): --chat-template, its text; content_format
    and default_chat_template_kwargs: the options of those names.
    """

    tokenizer: str = ""
    tokenizer_mode: str = "auto"
    trust_remote_code: bool = False
    stop_ids: list[int] | None = None
    chat_template: str | None = None
    tool_chat_template: str | None = None
    content_format: Literal["auto", "string", "openai"] = "auto"
    default_chat_template_kwargs: dict[str, Any] = {}


class Manifest(msgspec.Struct, frozen=True):
    format: int
    boot_id: str  # new at every start of vLLM, one for all its ranks
    pid: int  # the process that owns the memory
    pid_start_ticks: int  # field 22 of /proc/PID/stat: tells a reused pid from the exporter
    rank: int
    world_size: int
    model_path: str
    served_model_name: str
    vllm_version: str
    torch_version: str
    transport: str  # "shm" | "cuda_ipc"
    device_uuid: str | None  # cuda_ipc only
    dtype: str  # the dtype that the model is served in
    max_model_len: int
    segments: list[Segment]
    tensors: dict[str, SharedTensor]
    views: dict[str, View]  # checkpoint tensor name -> view
    refused: list[Refusal]
    serving: Serving = Serving()
    # Where world_size > 1, in place of views: checkpoint tensor name -> what this rank holds of it.
    pieces: dict[str, Pieces] = {}


def manifest_path(runtime_dir: Path, rank: int = 0) -> Path:
    return runtime_dir / f"weights-{rank}.json"


def write_manifest(manifest: Manifest, runtime_dir: Path) -> Path:
    """Writes to a temporary name with mode 0600, then renames: a reader sees the old or the new one."""
    path = manifest_path(runtime_dir, manifest.rank)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(seal(manifest))
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    return path


def read_manifest(runtime_dir: Path, rank: int = 0) -> Manifest | None:
    """The manifest, or None where vLLM has not written one yet.

    Raises AttachError when the file is a symlink, belongs to another user, is readable or writable by
    others, or is not a manifest of this format: whoever can write it chooses what memory we write to.
    """
    path = manifest_path(runtime_dir, rank)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AttachError(f"{path}: refused: {error.strerror} (is it a symlink?)") from None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise AttachError(f"{path}: not a regular file")
        if info.st_uid != os.geteuid():
            raise AttachError(f"{path}: owned by uid {info.st_uid}, expected {os.geteuid()}")
        if mode := stat.S_IMODE(info.st_mode) & 0o077:
            raise AttachError(
                f"{path}: mode {stat.S_IMODE(info.st_mode):04o} lets others in (extra bits {mode:04o}); "
                "expected 0600: remove it and restart vLLM"
            )
        if info.st_size > MAX_MANIFEST_BYTES:
            raise AttachError(f"{path}: {info.st_size} bytes is no manifest")
        try:
            manifest = unseal(file.read(), Manifest)
        except Damaged as error:
            raise AttachError(f"{path}: not a weights manifest: {error}") from None
    if manifest.format != MANIFEST_FORMAT:
        raise AttachError(f"{path}: format {manifest.format}, this worker reads {MANIFEST_FORMAT}")
    return manifest


def read_ranks(runtime_dir: Path) -> list[Manifest]:
    """The manifests of all ranks of one vLLM, in their order; empty where it has not written the first yet.

    Raises AttachError like read_manifest, and NotReady while a rank's is missing or of another boot.
    """
    first = read_manifest(runtime_dir)
    if first is None:
        return []
    found = [first]
    for rank in range(1, first.world_size):
        manifest = read_manifest(runtime_dir, rank)
        if manifest is None or manifest.boot_id != first.boot_id:
            raise NotReady(
                f"vLLM has {first.world_size} ranks, and rank {rank} has not shared its weights yet; its log "
                "says why where it stays so"
            )
        found.append(manifest)
    return found


def start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot (proc(5), field 22), or None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name (field 2) may hold spaces and brackets: count from the last one.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie only waits for its parent


def is_running(manifest: Manifest) -> bool:
    """Whether the process that owns the memory still runs."""
    return start_ticks(manifest.pid) == manifest.pid_start_ticks


def is_served(runtime_dir: Path, model_dir: Path) -> bool:
    """Whether a vLLM that lives has this directory's weights in memory. Raises like read_manifest."""
    manifest = read_manifest(runtime_dir)
    if manifest is None or Path(manifest.model_path).resolve() != model_dir.resolve():
        return False
    return is_running(manifest)
