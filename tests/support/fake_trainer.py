"""A trainer without a model, for tests of the front: the real link, lock and queue; steps only sleep.

    python fake_trainer.py DIRECTORY SECONDS_PER_STEP FD

It writes its pid to DIRECTORY/trainers at start, `PID STEP begin|end` to DIRECTORY/steps, and
`PID HAS_FRONT` to DIRECTORY/ends. A CRASH job kills it in its first step, a FULL_DISK job ends it by an
error, the first time; a HANG job stops it from getting
on, while its link lives.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from pathlib import Path

from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.link import ModelFacts
from apollo_worker.trainer import __main__ as training_process

from apollo_ipc.wire.replies import SyncResult

CRASH, HANG, FULL_DISK, NORMAL = 66, 77, 88, 1  # the first context id says what the job does


def note(name, text):
    with (DIRECTORY / name).open("a") as file:
        file.write(f"{text}\n")


class FakeWorker:
    def __init__(self, end):
        self.end, self.board = end, end.board
        self.queue = JobQueue(end.config.state_dir / "queue.sqlite", 1000)
        self.queue.on_change = end.on_change
        note("trainers", os.getpid())

    def run(self):
        board = self.board
        board.state.vllm_boot_id, board.state.vllm_pid, board.state.model_path = "boot-a", 1, str(DIRECTORY)
        board.state.num_parameters = board.state.num_parameters_mapped = 3
        board.state.attached = True
        self.end.tell_model(ModelFacts(str(DIRECTORY), 100, 16, {"a": 8, "b": 128}))
        while not board.stopping.is_set():
            self.answer_syncs()
            if (job := self.queue.take()) is not None:
                self.train(job)
                continue
            board.show("idle")
            board.wake.wait(0.25)
            board.wake.clear()
        note("ends", f"{os.getpid()} {self.end.has_front}")
        self.queue.close()

    def train(self, job):
        job_id, text = job.info.job_id, job.plan.examples[0].input_ids[0]
        for step in range(job.info.steps_done + 1, job.info.num_steps + 1):
            if self.board.stopping.is_set():
                self.queue.release(job_id)
                return
            if self.queue.is_cancel_requested(job_id):
                self.queue.finish(job_id, "cancelled")
                return
            self.answer_syncs()
            note("steps", f"{os.getpid()} {step} begin")
            if text == CRASH:
                os.kill(os.getpid(), signal.SIGKILL)
            if text == FULL_DISK and not (DIRECTORY / "full").exists():
                (DIRECTORY / "full").touch()
                raise sqlite3.OperationalError("database or disk is full")
            time.sleep(1000 if text == HANG else STEP_S)
            note("steps", f"{os.getpid()} {step} end")
            self.queue.record_step(job_id, step, 1.0 / step)
            self.board.show("training", job_id=job_id, steps_done=step, num_steps=job.info.num_steps)
        self.board.state.weight_version += 1
        self.end.publish(self.board.state.weight_version, timeout_s=2.0)
        self.queue.finish(job_id, "applied", weight_version=self.board.state.weight_version)

    def answer_syncs(self):
        while not self.board.asked.empty():
            version = self.board.state.weight_version
            self.board.asked.get().done.set_result(SyncResult(version, 1.0, 1, 1, 1, 10, 10, 0.1))


if __name__ == "__main__":
    DIRECTORY, STEP_S = Path(sys.argv[1]), float(sys.argv[2])
    sys.exit(training_process.run(int(sys.argv[3]), FakeWorker))
