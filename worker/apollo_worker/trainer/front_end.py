"""The trainer's end of the link: a StatusBoard that the front mirrors, and what the front asks for."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from apollo_ipc.config import Config
from apollo_ipc.hold import Held, Hold
from apollo_ipc.wire.remote import error_info
from apollo_ipc.wire.replies import JobInfo, RestoreResult, SyncResult
from apollo_worker.link.link import (
    ENDED,
    Answered,
    Ask,
    JobChanged,
    Link,
    ModelFacts,
    Publish,
    Published,
    Refused,
    Start,
    State,
    Stop,
    Wake,
)
from apollo_worker.link.status_board import StatusBoard

logger = logging.getLogger(__name__)
# The front itself gives up after 5 s and the distance to the publish before, or 121 s later.
PUBLISH_TIMEOUT_S = 127.0
LOCK_LOOK_S = 0.25


class TrainerEnd:
    """`start` it in the trainer; then the main loop works with `board`, and `publish` and `tell_model`."""

    def __init__(self, link: Link, start: Start):
        self.config = start.config
        self.board = StatusBoard(on_show=self._note_state)
        self._link = link
        self._front_pid = os.getppid()
        self._is_alone = self._is_finishing = False
        self._confirmed = threading.Condition()
        self._answer: Published | None = None
        self.board.state = start.state
        self.board.show("starting")

    @property
    def has_front(self) -> bool:
        # By the parent too: SIGTERM for its death may be here before the end of file was read.
        return not self._is_alone and os.getppid() == self._front_pid

    def start(self) -> None:
        self._link.beat(State, self._state)
        threading.Thread(target=self._read, name="apollo-front", daemon=True).start()

    def on_change(self, job: JobInfo) -> None:
        """For JobQueue.on_change."""
        job_id = job.job_id
        self._link.note(job_id, lambda: JobChanged(job_id))

    def tell_model(self, facts: ModelFacts) -> None:
        self._link.send(facts)

    def publish(self, weight_version: int, timeout_s: float | None = None) -> bool:
        """Call it after the last write of this version and after setting `board.state.weight_version`.

        True once a router has confirmed that it dropped its prefix cache. False where none did, or without a
        front: heartbeats go on telling routers the version.
        """
        if timeout_s is None:
            timeout_s = PUBLISH_TIMEOUT_S + self.config.train.publish_distance_s
        self._note_state()
        with self._confirmed:
            self._answer = None
            if not self._link.send(Publish(weight_version)):
                return False
            answered = self._confirmed.wait_for(
                lambda: (
                    not self.has_front or (self._answer and self._answer.weight_version == weight_version)
                ),
                timeout_s,
            )
            return bool(answered and self._answer and self._answer.ok)

    def say_error(self, message: str) -> None:
        """What ends this process, for the status: the front shows it until a trainer is steady again."""
        self.board.state.attached, self.board.state.attach_error = False, message
        self.board.show(ENDED)

    def finish(self) -> None:
        """The last state goes out before the process ends."""
        self._is_finishing = True
        self._link.finish(timeout_s=1.0)

    def stop(self) -> None:
        self.board.stopping.set()
        self.board.wake.set()

    def _note_state(self) -> None:
        self._link.note(State, self._state)

    def _state(self) -> State:
        return State(self.board.state)

    def _read(self) -> None:
        while True:
            try:
                message = self._link.receive()
            except EOFError:
                self._on_front_gone()
                return
            match message:
                case Wake():
                    self.board.wake.set()
                case Stop():
                    self.stop()
                case Ask():
                    self._on_ask(message)
                case Published():
                    with self._confirmed:
                        self._answer = message
                        self._confirmed.notify_all()

    def _on_ask(self, ask: Ask) -> None:
        def answer(done: Future[SyncResult | RestoreResult]) -> None:
            if error := done.exception():
                self._link.send(Refused(ask.id, error_info(error)))
                return
            match result := done.result():
                case SyncResult():
                    self._link.send(Answered(ask.id, sync=result))
                case RestoreResult():
                    self._link.send(Answered(ask.id, restore=result))

        self.board.ask(ask.request).add_done_callback(answer)

    def _on_front_gone(self) -> None:
        if self._is_finishing:
            return
        logger.warning("the front has ended: stopping after this step")
        self._is_alone = True
        self.stop()
        with self._confirmed:
            self._confirmed.notify_all()
        # Nobody else could end a step that hangs, and the next trainer waits for our lock. The default action
        # of SIGALRM needs no interpreter.
        signal.setitimer(signal.ITIMER_REAL, self.config.worker.step_timeout_s)


@contextmanager
def trainer_lock(board: StatusBoard, config: Config) -> Iterator[bool]:
    """Held by the one process that may write to the weights. Waits for a trainer that outlives its front.

    In the state directory, beside the queue that it protects: a runtime directory goes at logout.
    False, without the lock: `board.stopping` was set while waiting. The kernel frees it however we end.
    """
    hold = _wait_for(config.state_dir / "trainer.lock", board)
    if hold is None:
        yield False
        return
    with hold:
        yield True


def _wait_for(path: Path, board: StatusBoard) -> Hold | None:
    while not board.stopping.is_set():
        try:
            hold = Hold(path, "the trainer")
        except Held as held:
            board.state.attach_error = f"waiting for {held.who}, the one before this, to finish its step"
            board.show("waiting for the old trainer")
            board.wake.wait(LOCK_LOOK_S)
            board.wake.clear()
        else:
            board.state.attach_error = None
            return hold
    return None
