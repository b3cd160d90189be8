"""A trainer whose weights say which steps are in them: a step writes its job's number into every tensor.

All weights are zero at first. Step n of the whole writes the number of its job to element n of each tensor,
so a step that is lost, done twice, out of order or half written is seen in the weights, live or on disk. All
else is real: attach, loop, queue, marks, sync, restore, over the tests' stand-in for vLLM.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from apollo_worker.jobs.example import TokenisedExample
from apollo_worker.jobs.job_plan import JobPlan
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.model import live_model
from apollo_worker.model.mapping import map_views, open_transport
from apollo_worker.step.forward import Forward
from apollo_worker.step.loss_guard import Before
from apollo_worker.step.step import StepResult, Trainer
from apollo_worker.trainer import loop
from apollo_worker.trainer.loop import MainLoop
from faults import Faults, Point, device_error
from safetensors.torch import load_file, save_file
from served_model import Exporter, make_config, make_tiny_model
from trainer_by_hand import End

from apollo_ipc.checkpoint import read_commit, recover, verify
from apollo_ipc.errors import UserError
from apollo_ipc.manifest import write_manifest
from apollo_ipc.wire.messages import RestoreVersion, SyncCheckpoint
from apollo_ipc.wire.replies import JobInfo

NUM_PLACES = 16  # the smallest tensor's elements
HARMFUL_LOSS = 1000.0
MAX_WAITS = 12


class Torn(AssertionError):
    """The tensors do not agree on which steps are in them."""


class Guard:
    """As the loss guard, of a job whose number says that it harms."""

    before = Before((), None, 0.0)

    def __init__(self) -> None:
        self.is_harmed = False

    def look(self, step: int, loss: float, *, is_written: bool) -> None:
        self.is_harmed |= loss >= HARMFUL_LOSS
        if step == 2:
            self.check()

    def check(self) -> None:
        if self.is_harmed:
            raise UserError("the job harms the model", code="loss_spike")


def steps_in(tensors: dict[str, torch.Tensor]) -> list[int]:
    """The job's number of each step, in order. Raises Torn."""
    rows = {tuple(int(value) for value in tensor.flatten()[:NUM_PLACES]) for tensor in tensors.values()}
    if len(rows) != 1:
        raise Torn(f"tensors hold different steps: {sorted(rows)}")
    row = rows.pop()
    steps = [value for value in row if value]
    if steps != list(row[: len(steps)]) or any(
        bool(t.flatten()[NUM_PLACES:].any()) for t in tensors.values()
    ):
        raise Torn(f"written past the end: {row}")
    return steps


class World:
    """One vLLM, a state directory and a model directory; `save` and `reset` bring them back to a moment."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch, harmful: int = 0):
        self.base, self.model_dir = base, make_tiny_model(base / "model", num_hidden_layers=1, tied=True)
        for shard in self.model_dir.glob("*.safetensors"):
            save_file({n: torch.zeros_like(t) for n, t in load_file(shard).items()}, shard, {"format": "pt"})
        config = make_config(base)
        self.config = msgspec.structs.replace(
            config,
            worker=msgspec.structs.replace(config.worker, idle_priority=False),
            train=msgspec.structs.replace(config.train, on_spike="restore"),
            checkpoint=msgspec.structs.replace(config.checkpoint, sync_interval_s=0.0, history=4),
        )
        self.faults, self.harmful = Faults(), harmful
        self.numbers: dict[str, int] = {}  # job id -> number
        self.worker: MainLoop | None = None
        self._exporter = Exporter(self.model_dir, self.config.runtime_dir)
        self._patch(monkeypatch)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self

        def step_on(trainer, examples, lr, *args, **kwargs) -> StepResult:
            number, tensors = round(lr * 1000), trainer.live.trained_tensors()
            place = int((next(iter(tensors.values())).flatten()[:NUM_PLACES] != 0).sum())
            for tensor in tensors.values():
                world.faults.reach("device write", device_error)
                tensor.view(-1)[place] = number
            return StepResult(HARMFUL_LOSS if number == world.harmful else 1.0, is_bad=False)

        monkeypatch.setattr(Trainer, "step_on", step_on)
        # No forward pass is done; and nothing is large.
        monkeypatch.setattr(Forward, "_head_is_exact", lambda forward: True)
        monkeypatch.setattr(Forward, "_mask_is_exact", lambda forward: True)
        monkeypatch.setattr(live_model, "gc", SimpleNamespace(collect=lambda: None))
        monkeypatch.setattr(loop, "guard_of", lambda *args, **kwargs: Guard())
        self.faults.install(monkeypatch)
        monkeypatch.setattr(End, "publish", self.faults.wrap("publish", End.publish, device_error))

    def __enter__(self) -> World:
        self._exporter.__enter__()
        self._transport = open_transport(self._exporter.manifest)
        self._memory = [self._transport.open(one) for one in self._exporter.manifest.segments]
        return self

    def __exit__(self, *_: object) -> None:
        self._exporter.kill()

    @property
    def live(self) -> dict[str, torch.Tensor]:
        return map_views(self._exporter.manifest, self._transport)

    # --- to and fro ---

    def save(self) -> None:
        self._saved = [memory.clone() for memory in self._memory]
        for name in ("model", "state", "run"):
            shutil.copytree(self.base / name, self.base / "saved" / name, copy_function=shutil.copy2)

    def reset(self) -> None:
        for memory, saved in zip(self._memory, self._saved, strict=True):
            memory.copy_(saved)
        for name in ("model", "state", "run"):
            shutil.rmtree(self.base / name)
            shutil.copytree(self.base / "saved" / name, self.base / name, copy_function=shutil.copy2)

    def start_vllm_again(self) -> None:
        """The next vLLM has the weights of the last checkpoint."""
        recover(self.model_dir)
        for name, tensor in self.on_disk().items():
            if name in self.live:
                self.live[name].copy_(tensor)
        manifest = msgspec.structs.replace(self._exporter.manifest, boot_id=uuid.uuid4().hex)
        write_manifest(manifest, self.config.runtime_dir)

    # --- doing ---

    def submit(self, number: int, num_steps: int) -> str:
        """A job whose steps write `number`."""
        plan = JobPlan(
            examples=[TokenisedExample([1, 2, 3], [False, True, True])],
            hashes=[bytes([number]) * 32],
            num_examples=1,
            num_steps=num_steps,
            lr=number / 1000,
            weight_decay=0.0,
            schedule="constant",
            warmup_fraction=0.0,
        )
        with self.faults.paused():
            queue = JobQueue(self.config.state_dir / "queue.sqlite", 100)
            job = queue.submit(plan, bytes([number]) * 16, idempotency_key=str(number))
            queue.close()
        self.numbers[job.job_id] = number
        return job.job_id

    def run(
        self,
        at: Point | None = None,
        *,
        error: BaseException | None = None,
        when_idle: Sequence[Callable[[MainLoop], object]] = (),
        syncs: Mapping[tuple[int, int], str] | None = None,
        is_counted: bool = True,
    ) -> BaseException | None:
        """A trainer from its start until it has nothing to do, or until it raises, which is returned.

        at: where it shall raise; when_idle: what is done then, one after the other; syncs: (number of a job,
        steps done) -> kind of the sync that is asked for then.
        """
        todo, self.worker = list(when_idle), None
        with self.faults.raising(at, error) if is_counted else self.faults.paused():
            try:
                self.worker = worker = MainLoop(End(self.config))
                self._drive(worker, todo, syncs or {})
                worker.run()
            except BaseException as raised:
                return raised
            finally:
                with self.faults.paused():
                    self._end()
        return None

    def _drive(self, worker: MainLoop, todo: list, syncs: Mapping[tuple[int, int], str]) -> None:
        between_steps, num_waits, done = worker.between_steps, 0, set()

        def wait(activity: str) -> None:
            nonlocal num_waits
            num_waits += 1
            worker.attachment._tried = None  # at once, not in five seconds
            if activity == "idle" and todo:
                todo.pop(0)(worker)
            elif activity != "waiting for vLLM" or num_waits > MAX_WAITS:
                worker.board.stopping.set()

        def between(job_id: str, guard) -> None:
            with self.faults.paused():
                place = self.numbers[job_id], worker.queue.get(job_id).steps_done
                if place in syncs and place not in done:
                    done.add(place)
                    worker.board.ask(SyncCheckpoint("", syncs[place]))
            between_steps(job_id, guard)
            worker.syncing.wait()

        worker.wait, worker.between_steps = wait, between

    def _end(self) -> None:
        """What the kernel does with a process that has ended."""
        if self.worker is None:
            return
        if (writer := self.worker.attachment.writer) is not None:
            writer.wait()
        with suppress(RuntimeError):
            self.worker.attachment.detach("ended")
        self.worker.queue.close()
        self.worker.marks.close()

    # --- looking ---

    def on_disk(self) -> dict[str, torch.Tensor]:
        shards = self.model_dir.glob("*.safetensors")
        return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}

    def jobs(self) -> list[JobInfo]:
        queue = JobQueue(self.config.state_dir / "queue.sqlite", 100)
        try:
            return queue.list()[::-1]
        finally:
            queue.close()

    def attempts(self) -> dict[str, int]:
        queue = JobQueue(self.config.state_dir / "queue.sqlite", 100)
        try:
            with queue.reading() as db:
                return dict(tuple(row) for row in db.execute("SELECT job_id, attempts FROM jobs"))
        finally:
            queue.close()

    def check(self, *, may_fail: frozenset[int], is_step: bool) -> None:
        """After a trainer that nothing disturbed: nothing torn, lost, twice or out of order; live and on disk
        the same. may_fail: jobs that fail, or are cancelled, by themselves; is_step: a step was disturbed."""
        live, (jobs, attempts) = steps_in(self.live), (self.jobs(), self.attempts())
        recover(self.model_dir)
        assert (problems := verify(self.model_dir)) == [], problems
        assert steps_in(self.on_disk()) == live, "live and disk differ"
        assert live == sorted(live), f"out of order: {live}"
        num_failed = 0
        for job in jobs:
            number = self.numbers[job.job_id]
            found, what = live.count(number), f"job {number}: {job.state} ({job.error}), steps {live}"
            if job.state == "durable":
                assert found == job.num_steps, what
            elif job.state == "undone":
                assert found == 0, what
            elif job.state == "cancelled":
                assert found == job.steps_done, what
            else:
                assert job.state == "failed", what
                assert found < job.num_steps, what
                num_failed += number not in may_fail
            assert attempts[job.job_id] == 0, f"{what}: {attempts[job.job_id]} attempts are counted"
        assert num_failed <= is_step, f"a job has failed: {[(j.state, j.error) for j in jobs]}"
        commit = read_commit(self.model_dir)
        assert commit is not None
        assert commit.applied_seq == len(jobs)


def restore_to(version: int) -> Callable[[MainLoop], object]:
    return lambda worker: worker.board.ask(RestoreVersion("", version))
