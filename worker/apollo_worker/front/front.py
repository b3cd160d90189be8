"""The worker's front: the process that is always there. It answers clients, and owns the trainer.

    clients <-- ZMQ --> Server | Admitter | JobQueue | StatusBoard    front, normal priority
                                     link (socket pair)
                        MainLoop | Attachment | JobQueue | StatusBoard    trainer, SCHED_IDLE on a CPU

Two processes, since two threads share the interpreter's lock: on a busy CPU a trainer in SCHED_IDLE was put
off for seconds while it held it, and status took as long (p99 1-2.6 s). No torch here, and no weights.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future
from typing import NoReturn

from apollo_ipc.config import Config, make_private_dir
from apollo_ipc.errors import AlreadyRunning, NotReady, UserError
from apollo_ipc.hold import Held, Hold
from apollo_ipc.process.notify import notify
from apollo_ipc.wire.remote import error_from
from apollo_ipc.wire.replies import RestoreResult, SyncResult
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.front.admission import Admitter
from apollo_worker.front.announce import Announcer
from apollo_worker.front.curves import CurveFeeds
from apollo_worker.front.post_sync import PostSyncRunner
from apollo_worker.front.server import Server
from apollo_worker.front.trainer_process import COMMAND, FOLLOWER, TrainerChild
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.link import (
    Answered,
    Ask,
    JobChanged,
    Link,
    ModelFacts,
    Publish,
    Published,
    Refused,
    State,
    Wake,
)
from apollo_worker.link.status_board import StatusBoard

log = logging.getLogger(__name__)
TICK_S = 0.1
TELL_INTERVAL_S = 1.0


class Front:
    """trainer_command: a program that speaks the trainer's part of link.link over the descriptor that it
    gets as its last argument."""

    def __init__(self, config: Config, trainer_command: tuple[str, ...] | None = None):
        """Raises AlreadyRunning where another worker has this state directory: its socket may be elsewhere,
        or gone (a runtime directory goes at logout)."""
        self._config = config
        trainer_command = trainer_command or (FOLLOWER if config.follow.source else COMMAND)
        make_private_dir(config.state_dir)
        try:
            self._hold = Hold(config.state_dir / "queue.lock", "the worker")
        except Held as held:
            raise AlreadyRunning(
                f"{held.who} already works on the jobs in {config.state_dir}; stop it first, or choose "
                "another paths.state_dir"
            ) from None
        self.board = StatusBoard()
        # Made and migrated here, before a trainer opens it.
        self.queue = JobQueue(config.state_dir / "queue.sqlite", config.worker.max_queued_jobs)
        self.admitter = Admitter(config.train, self.board, self.queue, config.runtime_dir)
        self.board.admit = self.admitter.admit
        self.board.preview = self.admitter.preview
        if config.follow.source:
            self.board.admit = self.board.preview = self._refuse_to_train
        self.server = Server(config, self.board, self.queue)
        self.trainer = TrainerChild(config, self._read, trainer_command)
        # Asked of the trainer, not answered yet.
        self._asked: dict[int, Future[SyncResult | RestoreResult]] = {}
        self._num_asked = 0
        self._post_sync = PostSyncRunner(
            config.checkpoint, lambda state: setattr(self.board, "post_sync", state)
        )
        self._announcer = Announcer(config, self.queue)
        self._curves = CurveFeeds(config)
        self._is_ready = False
        self._told_at = 0.0

    def _refuse_to_train(self, request: TrainRequest) -> NoReturn:
        raise UserError(
            f"this server follows {self._config.follow.source} and trains nothing itself; send it to the "
            "machine that trains",
            code="follows",
        )

    def run(self) -> None:
        """Until `board.stopping` is set. Raises AlreadyRunning or ConfigError before anything is touched."""
        self.server.start()
        self._announcer.start()
        self._curves.start()
        try:
            while not self.board.stopping.is_set():
                self.keep_trainer_running()
                self._curves.watch()
                self.pass_on()
                self.tell_supervisor()
                self.board.wake.wait(TICK_S)
        finally:
            self.stop()

    def keep_trainer_running(self) -> None:
        if self.trainer.is_hung():
            log.error("the trainer has not got on (%s): it is killed", self.board.state.progress.activity)
            self.trainer.kill()
        if self.trainer.has_ended():
            reason = self.trainer.reap()
            log.error("%s", reason)
            self._show_no_trainer(reason)
        if self.trainer.can_start():
            self.trainer.start(self.board.state)
        self.trainer.look()
        self.board.trainer_error = self.trainer.error
        self.board.trainer = self.trainer.seen()

    def pass_on(self) -> None:
        """What the server wants of the trainer."""
        if is_woken := self.board.wake.is_set():
            self.board.wake.clear()  # before looking: what comes in meanwhile sets it again
        link = self.trainer.open_link
        while not self.board.asked.empty():
            asked = self.board.asked.get()
            self._num_asked += 1
            self._asked[self._num_asked] = asked.done
            if link is None or not link.send(Ask(self._num_asked, asked.request)):
                del self._asked[self._num_asked]
                asked.done.set_exception(
                    NotReady(self.board.state.attach_error or "the trainer does not answer")
                )
        if is_woken and link is not None:
            link.note(Wake, Wake)

    def tell_supervisor(self) -> None:
        """systemd: ready after the first attach; then a sign of life while the trainer gets on, idles or is
        being started. One that hangs is killed by us: where even that fails, or where tokenising hangs, which
        no thread can end, systemd restarts everything."""
        if time.monotonic() - self._told_at < TELL_INTERVAL_S and self._is_ready:
            return
        self._told_at = time.monotonic()
        if self.board.state.attached and not self._is_ready:
            self._is_ready = True
            notify("READY=1")
        elif not self._is_ready:
            notify("EXTEND_TIMEOUT_USEC=30000000")  # vLLM may load for minutes
        stands_s, limit_s = self.admitter.busy.stands_since_s(), self._config.worker.step_timeout_s
        if stands_s > limit_s:
            log.error("tokenising has not got on for %.0f s", stands_s)
        elif not self.trainer.is_hung():
            notify("WATCHDOG=1")

    def stop(self) -> None:
        """The trainer first: it finishes its step and syncs what changed; clients may ask how far it is."""
        notify("STOPPING=1")
        self.trainer.stop(on_wait=lambda: notify("EXTEND_TIMEOUT_USEC=30000000"))
        self._post_sync.wait(on_wait=lambda: notify("EXTEND_TIMEOUT_USEC=30000000"))
        self._refuse_asked("the worker is stopping; send the request again", code="stopping")
        self.server.stop()
        self.admitter.stop()
        self._announcer.stop()
        self._curves.stop()
        self.queue.close()
        self._hold.release()
        log.info("worker %d stopped", os.getpid())

    def _show_no_trainer(self, reason: str) -> None:
        self.board.state.attached, self.board.state.attach_error = False, reason
        self.board.show("trainer restarting")
        self._refuse_asked(reason)

    def _refuse_asked(self, reason: str, code: str | None = None) -> None:
        while self._asked:
            self._asked.popitem()[1].set_exception(NotReady(reason, code=code))

    # --- from the trainer, in a thread of its own ---

    def _read(self, link: Link) -> None:
        while True:
            try:
                message = link.receive()
            except EOFError:
                return  # keep_trainer_running sees the process end
            try:
                self._handle(link, message)
            except Exception:
                # A bug in one message must not cut the trainer off.
                log.exception("a %s from the trainer failed", type(message).__name__)

    def _handle(self, link: Link, message: object) -> None:
        match message:
            case State():
                self.trainer.on_state(message.state)
                self.board.state = message.state
                self._post_sync.note(message.state.last_sync, message.state.model_path)
            case ModelFacts():
                self.admitter.learn(message)
            case JobChanged():
                self.server.note_change(message.job_id)
            case Publish():
                version = message.weight_version
                publishing = self.server.start_publishing(version)
                publishing.add_done_callback(lambda done: link.send(Published(version, _is_confirmed(done))))
            case Answered():
                result = message.sync or message.restore
                if (future := self._asked.pop(message.id, None)) and result:
                    future.set_result(result)
            case Refused():
                if future := self._asked.pop(message.id, None):
                    future.set_exception(error_from(message.error))


def _is_confirmed(publishing: Future[bool]) -> bool:
    return not publishing.cancelled() and publishing.exception() is None and publishing.result()
