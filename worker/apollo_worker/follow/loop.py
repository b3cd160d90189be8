"""The follower's main loop, in the trainer's place: look at the source, fetch, write, publish, keep."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

from apollo_ipc.checkpoint import history, recover
from apollo_ipc.checkpoint.disk import WatchedDisk
from apollo_ipc.checkpoint.owner import hold_model
from apollo_ipc.checkpoint.record import Commit, Version, read_commit
from apollo_ipc.errors import ApolloError, AttachError, Conflict
from apollo_ipc.hold import Hold
from apollo_ipc.manifest import Manifest, read_ranks
from apollo_ipc.wire.replies import Following
from apollo_worker.follow.source import Source
from apollo_worker.follow.version import Follows, Frames
from apollo_worker.model.live_model import LiveModel, attach
from apollo_worker.process import use_idle_priority
from apollo_worker.sync.writer import CheckpointWriter
from apollo_worker.trainer.front_end import TrainerEnd
from apollo_worker.trainer.step_marks import LiveState, check_same_model, read_state, write_state

log = logging.getLogger(__name__)
WAIT_S = 0.25
RETRY_S = 5.0  # between two attempts at the same vLLM: each may read the whole model


class FollowLoop:
    """Nothing is trained here. What kills it in between leaves the next one tensors whose digests no version
    knows: they are fetched whole."""

    def __init__(self, end: TrainerEnd):
        self.config, self.front_end, self.board = end.config, end, end.board
        self.source = Source(end.config.follow.source)
        self.live: LiveModel | None = None
        self._follows: Follows | None = None
        self._writer: CheckpointWriter | None = None
        self._hold: Hold | None = None
        self._refused_boot: str | None = None
        self._tried: tuple[str, float] = ("", 0.0)  # the vLLM last tried, and when
        self._looked_at = -float("inf")
        self._is_writing = False

    def run(self) -> None:
        use_idle_priority(self.config)
        try:
            while not self.board.stopping.is_set():
                self.refuse_asked()
                if not self.ensure():
                    self.wait("waiting for vLLM")
                elif time.monotonic() - self._looked_at < self.config.follow.interval_s:
                    self.wait("idle")
                else:
                    self.look()
        finally:
            self.detach("the follower has ended")

    def wait(self, activity: str) -> None:
        self.board.show(activity)
        self.board.wake.wait(WAIT_S)
        self.board.wake.clear()

    def refuse_asked(self) -> None:
        while not self.board.asked.empty():
            error = Conflict(
                f"this server follows {self.source.url}; ask the machine that trains it", code="follows"
            )
            error.http_status = 409
            self.board.asked.get().done.set_exception(error)

    # --- the source ---

    def look(self) -> None:
        """One look; a version that is new is brought here. What goes wrong is shown and tried again."""
        self._looked_at = time.monotonic()
        try:
            commit = self.source.read_commit()
            if commit is None:
                self.show(error="nothing was synced there yet")
                return
            version = self.wanted(commit)
            assert self._follows is not None
            if self._follows.differs(version):
                self.bring(commit, version)
            self.show(version)
        except (ApolloError, OSError) as error:
            if self._is_writing:
                raise  # half written: the next process fetches what no version knows
            message = error.message if isinstance(error, ApolloError) else str(error)
            if self.board.state.following is None or self.board.state.following.error != message:
                log.warning("not followed: %s", message)
            self.show(error=message)

    def wanted(self, commit: Commit) -> Version:
        """The newest, or the one that is pinned here. Raises UserError naming those that are there."""
        pinned = self.config.follow.version
        return commit.version if pinned < 0 else history.find(commit, pinned)

    def bring(self, commit: Commit, version: Version) -> None:
        assert self._follows is not None
        started, bytes_before = time.monotonic(), self.source.num_bytes
        self.board.show("fetching")
        routes = self._follows.fetch(commit, version)
        fetched_s = time.monotonic() - started
        self.board.show("writing")
        self._is_writing = True
        self._follows.write(version, routes)
        self._is_writing = False
        own = max(self.board.state.weight_version + 1, version.weight_version)
        self.set_version(own)
        if not self.front_end.publish(own):
            log.info("weight version %d: no router has confirmed yet", own)
        log.info(
            "version %d of %s is served as %d: %d tensors, %d bytes in %.2f s, %.2f s in all",
            *(version.weight_version, self.source.url, own, len(routes)),
            *(self.source.num_bytes - bytes_before, fetched_s, time.monotonic() - started),
        )
        self.keep(own)

    def keep(self, own: int) -> None:
        """In the directory here, by a sync as any: the next vLLM loads it, and older versions can be had."""
        assert self._writer is not None
        self.board.show("syncing")
        try:
            done = self._writer.sync("delta", weight_version=own, applied_seq=0)
        except ApolloError as error:
            log.warning("version %d is served, not written to disk: %s", own, error.message)
            self.board.state.sync_error = error.message
        else:
            self.board.state.last_sync, self.board.state.durable_version = done, own
            self.board.state.sync_error = None

    def show(self, version: Version | None = None, error: str | None = None) -> None:
        before = self.board.state.following
        at = version.weight_version if version else before.weight_version if before else None
        committed = version.committed_at if version else before.committed_at if before else None
        self.board.state.following = Following(self.source.url, at, committed, self.source.num_bytes, error)
        self.board.show("idle")

    # --- vLLM ---

    def ensure(self) -> bool:
        if self.live is not None and self.live.is_alive():
            return True
        if self.live is not None:
            self.detach("vLLM has ended; waiting for the next one")
        ranks: list[Manifest] = []
        try:
            ranks = read_ranks(self.config.runtime_dir)
            if not ranks:
                self.board.state.attach_error = "vLLM has not started here yet (no weights manifest)"
            elif ranks[0].boot_id != self._refused_boot and self.may_try(ranks[0].boot_id):
                self.attach(ranks)
        except ApolloError as error:
            if isinstance(error, AttachError) and error.refused and ranks:
                self._refused_boot = ranks[0].boot_id
                self.board.state.refused = error.refused
            if error.message != self.board.state.attach_error:
                log.warning("not attached: %s", error.message)
            self.detach(error.message)
        return self.live is not None

    def may_try(self, boot_id: str) -> bool:
        now = time.monotonic()
        if self._tried[0] == boot_id and now - self._tried[1] < RETRY_S:
            return False
        self._tried = boot_id, now
        return True

    def attach(self, ranks: list[Manifest]) -> None:
        manifest = ranks[0]
        show = partial(self.board.show, "attaching")
        show()
        before = read_state(self.config.state_dir)
        check_same_model(before, manifest.model_path, self.config.state_dir)
        model_dir = Path(manifest.model_path)
        is_new_boot = before is None or before.boot_id != manifest.boot_id
        self._hold = hold_model(model_dir, "the follower")
        recover(model_dir, is_folding=False, disk=WatchedDisk(show))
        self.live = attach(
            *ranks, verify=is_new_boot and self.config.worker.verify_checkpoint, on_progress=show
        )
        tensors = self.live.trained_tensors()
        self._follows = Follows(self.source, tensors, Frames(self.config.state_dir / "follow"), show)
        self._writer = CheckpointWriter(model_dir, tensors, num_kept=self.config.checkpoint.history)
        commit, state = read_commit(model_dir), self.board.state
        known = before.weight_version if before else 0
        self.set_version(max(known, commit.weight_version if commit else 0))
        state.durable_version = commit.weight_version if commit else 0
        state.vllm_boot_id, state.vllm_pid = manifest.boot_id, manifest.pid
        state.model_path = manifest.model_path
        state.num_parameters = state.num_parameters_mapped = self.live.num_parameters
        state.attach_error, state.refused, state.attached = None, [], True
        log.info("attached to vLLM pid %d: %s follows %s", manifest.pid, manifest.model_path, self.source.url)

    def detach(self, reason: str) -> None:
        state, live, hold = self.board.state, self.live, self._hold
        state.attached, state.attach_error = False, reason
        state.vllm_boot_id = state.vllm_pid = None
        self.live = self._follows = self._writer = self._hold = None
        if live is not None:
            live.close()
        if hold is not None:
            hold.release()

    def set_version(self, version: int) -> None:
        assert self.live is not None
        self.board.state.weight_version = version
        state = LiveState(str(self.live.model_dir), self.live.boot_id, version)
        write_state(self.config.state_dir, state)
