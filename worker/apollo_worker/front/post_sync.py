"""The operator's command after a commit: it reads a snapshot, and no sync ever waits for it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint import snapshot
from apollo_ipc.checkpoint.snapshot import Snapshot, command_for
from apollo_ipc.config import Checkpoint
from apollo_ipc.errors import ApolloError, CheckpointError
from apollo_ipc.wire.replies import PostSync, SyncResult

log = logging.getLogger(__name__)
OUTPUT_TAIL_BYTES = 500
SNAPSHOT_WAIT_S = 3600.0  # for a sync that is being written
LOOK_S = 0.2


class PostSyncRunner:
    """Runs `checkpoint.post_sync_command` after each commit, one at a time; commits that come while it runs
    are one more run afterwards. on_change: called with what status shows, from a thread."""

    def __init__(self, config: Checkpoint, on_change: Callable[[PostSync], None]):
        self._command, self._timeout_s = config.post_sync_command, config.post_sync_timeout_s
        self._on_change = on_change
        self._seen_at = 0.0  # `committed_at` of the newest sync that was noted
        self._next: tuple[SyncResult, Path] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self, sync: SyncResult | None, model_dir: str | None) -> None:
        """What the trainer says of its last sync; the same one may be said often."""
        if not self._command or sync is None or model_dir is None or sync.committed_at == self._seen_at:
            return
        self._seen_at = sync.committed_at
        with self._lock:
            self._next = sync, Path(model_dir)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="apollo-post-sync", daemon=True)
                self._thread.start()

    def wait(self, on_wait: Callable[[], None]) -> None:
        """Until no command runs or waits. on_wait: called now and then."""
        while (thread := self._thread) is not None and thread.is_alive():
            on_wait()
            thread.join(LOOK_S)

    def _run(self) -> None:
        try:
            while (asked := self._take()) is not None:
                self._run_once(*asked)
        finally:
            with self._lock:  # however it ended: the next commit starts another
                if self._thread is threading.current_thread():
                    self._thread = None

    def _take(self) -> tuple[SyncResult, Path] | None:
        """None: nothing waits, and this thread is no longer the one that a new commit is left to."""
        with self._lock:
            asked, self._next = self._next, None
            if asked is None:
                self._thread = None
            return asked

    def _run_once(self, sync: SyncResult, model_dir: Path) -> None:
        state = PostSync(sync.weight_version, started_at=time.time())
        self._on_change(state)
        error = None
        try:
            with snapshot(model_dir, lock_wait_s=SNAPSHOT_WAIT_S) as taken:
                version = taken.commit.weight_version if taken.commit else sync.weight_version
                state = msgspec.structs.replace(state, weight_version=version)
                self._call(taken, model_dir, sync)
        except Exception as failure:  # of the system too: told, and the next one runs
            is_ours = isinstance(failure, ApolloError)
            error = failure.message if is_ours else f"{type(failure).__name__}: {failure}"
            log.error(
                "the command after the sync of version %d failed: %s",
                *(state.weight_version, error),
                exc_info=None if is_ours else failure,
            )
        else:
            log.info("the command after the sync of version %d has ended well", state.weight_version)
        self._on_change(msgspec.structs.replace(state, ended_at=time.time(), error=error))

    def _call(self, taken: Snapshot, model_dir: Path, sync: SyncResult) -> None:
        """Raises CheckpointError where the command does not end with status 0 in time."""
        command, environment = command_for(self._command, taken, model_dir)
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=taken.path,
                    env={**os.environ, **environment, "APOLLO_SYNC_KIND": sync.kind},
                    pass_fds=[taken.held_by],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise CheckpointError(f"cannot run {command[0]}: {error.strerror}") from error
            try:
                status = process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise CheckpointError(
                    f"{command[0]} took more than {self._timeout_s:g} s (checkpoint.post_sync_timeout_s)"
                ) from None
            if status:
                output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_TAIL_BYTES))
                said = output.read().decode(errors="replace").strip()
                raise CheckpointError(f"{command[0]} ended with status {status}: {said or 'it said nothing'}")
