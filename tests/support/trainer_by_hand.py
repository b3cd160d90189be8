"""The trainer on weights that another process serves, its main loop turned by hand.

The exporter stands in for vLLM (served_model.py); all else is real: attach, training, queue, marks, files.
"""

from __future__ import annotations

import msgspec
import torch
from apollo_worker.front.admission import load
from apollo_worker.jobs.example import request_digest
from apollo_worker.jobs.job_plan import JobPlan, plan
from apollo_worker.link.status_board import StatusBoard
from apollo_worker.model.live_tensor import whole
from apollo_worker.trainer.attachment import model_facts
from apollo_worker.trainer.loop import MainLoop

from apollo_ipc.config import Config
from apollo_ipc.wire.messages import RestoreVersion
from apollo_ipc.wire.requests import Example, TrainOptions, TrainRequest


class Killed(BaseException):
    """Where it is raised the process would have ended."""


class End:
    """The trainer's end of the link, without a front."""

    has_front = True

    def __init__(self, config: Config):
        self.config, self.board = config, StatusBoard()

    def on_change(self, job) -> None:
        pass

    def tell_model(self, facts) -> None:
        pass

    def publish(self, version: int) -> bool:
        return True


class Trainer:
    """A trainer process's main loop, turned by hand. `kill` leaves everything as a SIGKILL would."""

    def __init__(self, config: Config):
        self.config = config
        self.worker = MainLoop(End(config))
        self.board, self.queue = self.worker.board, self.worker.queue

    def __enter__(self) -> Trainer:
        assert self.worker.attachment.ensure(), self.board.state.attach_error
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        if (writer := self.worker.attachment.writer) is not None:
            writer.wait()
        self.worker.attachment.detach("killed")
        self.queue.close()
        self.worker.marks.close()

    def submit(self, text: str, *, key: str | None = None, **options) -> str:
        request = TrainRequest(
            examples=[Example(prompt="The harbour is called", completion=text)],
            options=TrainOptions(**{"lr": 1e-3, **options}),
        )
        key = key or f"{text} {options.get('epochs', 1)}"
        return self.queue.submit(self.plan(request), request_digest(request), idempotency_key=key).job_id

    def plan(self, request: TrainRequest) -> JobPlan:
        """As the front makes it."""
        attached = self.worker.attachment
        facts = model_facts(attached.require_live(), attached.trainer, self.config)
        return plan(request, load(facts), self.config.train, self.queue.known_examples)

    def train(self) -> list[str]:
        """Every job that waits."""
        done = []
        while (job := self.queue.take()) is not None:
            self.worker.train(job)
            done.append(job.info.job_id)
        return done

    def sync(self, kind: str = "full") -> None:
        self.worker.syncing.start(kind)
        self.worker.syncing.wait()

    def live(self) -> dict[str, torch.Tensor]:
        live = self.worker.attachment.require_live()
        return {name: whole(t).clone() for name, t in live.trained_tensors().items()}

    def steps(self) -> set[int]:
        """Of every parameter's optimizer state."""
        tensors = self.worker.attachment.trainer.main_optimizer.state_tensors()
        return {int(value) for key, value in tensors.items() if key.endswith(".step")}

    def state(self, job_id: str) -> str:
        return self.queue.get(job_id).state


def with_train(config: Config, **changes) -> Config:
    return msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, **changes))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name].to(a[name].dtype))] == []


def kill_in_backward(trainer: Trainer, at_step: int) -> None:
    """The process ends in the middle of that step: some tensors are written, some are not."""
    engine, real = trainer.worker.attachment.trainer, trainer.worker.attachment.trainer.step_on
    steps = iter(range(1, 1000))

    def step_on(*args, **kwargs):
        if next(steps) < at_step:
            return real(*args, **kwargs)
        next(iter(trainer.worker.attachment.live.trained_tensors().values()))[0] += 1
        raise Killed

    engine.step_on = step_on


def make_versions(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    """Versions 0 to 3: as loaded, a full sync, a delta, a full one."""
    weights = [trainer.live()]
    for text, kind in (("one", "full"), ("two", "delta"), ("three", "full")):
        trainer.submit(text)
        trainer.train()
        trainer.sync(kind)
        weights.append(trainer.live())
    return weights


def restore(trainer: Trainer, version: int):
    asked = trainer.board.ask(RestoreVersion("", version))
    trainer.worker.do_what_is_asked()
    return asked.result(0)
