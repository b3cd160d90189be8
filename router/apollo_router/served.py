"""Which vLLM this API server belongs to: the manifest that *our* engine's worker wrote.

Two vLLMs may point at one runtime directory by mistake; the router speaks for its own only.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from apollo_ipc.errors import ApolloError
from apollo_ipc.manifest import manifest_path, read_manifest, start_ticks

MAX_DEPTH = 64  # of the process tree


class ServedBoot:
    """`refresh` looks (file system, /proc); `boot_id` and `reason` say what it saw last.

    boot_id: of this vLLM, or None, and then `reason` says why in words for a user.
    """

    def __init__(self, runtime_dir: Path):
        self.runtime_dir = runtime_dir
        self.boot_id: str | None = None
        self.reason = "not looked yet"
        self._file_seen: tuple[int, int, int] | None = None
        self._manifest: tuple[str, int, int] | None = None  # boot_id, pid, pid_start_ticks

    def refresh(self) -> None:
        """Blocking: off the event loop. The manifest (large for a large model) is read once per version."""
        try:
            self.boot_id = self._look()
        except ApolloError as error:
            self.boot_id, self.reason = None, error.message

    def _look(self) -> str:
        try:
            info = manifest_path(self.runtime_dir).lstat()
        except FileNotFoundError:
            raise ApolloError(
                f"vLLM has not shared its weights in {self.runtime_dir} (started with --load-format apollo?)"
            ) from None
        seen = (info.st_ino, info.st_mtime_ns, info.st_size)
        if seen != self._file_seen:
            manifest = read_manifest(self.runtime_dir)
            if manifest is None:
                raise ApolloError("the weights manifest has just gone")
            self._manifest = (manifest.boot_id, manifest.pid, manifest.pid_start_ticks)
            self._file_seen = seen
        assert self._manifest is not None
        boot_id, pid, ticks = self._manifest
        if start_ticks(pid) != ticks:
            raise ApolloError(f"process {pid}, which shared the weights, has ended")
        if not _is_below(pid, _root_pid()):
            raise ApolloError(f"the weights in {self.runtime_dir} are shared by another vLLM (process {pid})")
        return boot_id


def _root_pid() -> int:
    """The process below which our engine runs: this one, or the one that started us as one of several API
    servers beside the engine (APIServerProcessManager in vllm/v1/utils.py, by multiprocessing)."""
    parent = multiprocessing.parent_process()
    return parent.pid if parent is not None and parent.pid is not None else os.getpid()


def _is_below(pid: int, root: int) -> bool:
    """Whether `pid` is `root` or descends from it."""
    for _ in range(MAX_DEPTH):
        if pid == root:
            return True
        if pid <= 1:
            return False
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        pid = int(text.rpartition(")")[2].split()[1])  # field 4: the parent
    return False
