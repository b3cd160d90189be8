"""Served weights that learn and forget as a test says, and the monitor that watches them."""

from __future__ import annotations

import json
from contextlib import contextmanager

import msgspec

from apollo_curation.chat_client import ModelAway
from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.history import QualityHistory
from apollo_curation.quality.monitor import Monitor
from apollo_curation.settings import Curation, CurationConfig, Quality, Tier
from apollo_curation.store import Store
from apollo_curation.training.batches import Batches
from apollo_ipc.config import Paths
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo, RestoreResult, SyncResult
from apollo_ipc.wire.requests import Message

CANARIES = """
[[canary]]
name = "capital"
check = "exact"
prompt = "Capital of France?"
expected = "Paris"

[[canary]]
name = "kind"
check = "judged"
prompt = "I failed."
rubric = "It comforts."
"""


class Server:
    """Served weights that learn: `losses` in nats a token by what is answered, and whether `knows_paris`.

    An example whose answer is in `effects` does that to it, at each step. A step is done at each look at a
    job. saved: what is on disk, by version. It is model and training interface in one.
    """

    def __init__(self):
        self.losses = {"chat": 2.0, "facts": 1.0}
        self.knows_paris = True
        self.effects = {}
        self.weight_version = self.num_syncs = 0
        self.saved, self.jobs, self.answers = {}, {}, {}
        self.is_away = False
        self.restores, self.restore_error = [], None
        self.pinned = self.pin_error = None

    # the model
    def answer_logprobs(self, context, answer, tools=None):
        if self.is_away:
            raise ModelAway("nobody there")
        return [-self.losses[answer.content]] * 4

    def chat(self, messages, **_):
        return Message("assistant", "Paris" if self.knows_paris else "Berlin")

    # the training interface
    def submit(self, request, idempotency_key):
        steps = [one.messages[-1].content for one in request.examples]
        self.jobs[idempotency_key] = JobInfo(
            idempotency_key, len(self.jobs), "queued", 1.0, len(steps), len(steps), loss_history=[]
        )
        self.answers[idempotency_key] = steps
        return idempotency_key

    def job(self, job_id):
        job = self.jobs[job_id]
        if job.state not in ENDED_STATES:
            done = job.steps_done
            if done < job.num_steps:
                self.effects.get(self.answers[job_id][done], lambda: None)()
                self.weight_version += 1
                losses = [*(job.loss_history or []), 3.0 - done / 10]
                job = msgspec.structs.replace(
                    job, state="running", steps_done=done + 1, loss_history=losses, loss_last=losses[-1]
                )
            else:
                job = msgspec.structs.replace(job, state="applied", weight_version=self.weight_version)
            self.jobs[job_id] = job
        return job

    def wait(self, job_id, each=lambda job: None):
        while True:
            job = self.job(job_id)
            each(job)
            if job.state in ENDED_STATES:
                return job

    def cancel(self, job_id):
        self.jobs[job_id] = msgspec.structs.replace(self.jobs[job_id], state="cancelled")

    def status(self):
        return {"weight_version": self.weight_version, "durable_version": max(self.saved, default=0)}

    def sync(self, kind="full"):
        self.num_syncs += 1
        self.saved[self.weight_version] = (dict(self.losses), self.knows_paris)
        return SyncResult(self.weight_version, 1.0, 1, 1, 1, 1, 1, 0.1)

    def pin(self, weight_version):
        if self.pin_error is not None:
            raise self.pin_error
        self.pinned = weight_version

    def restore(self, weight_version):
        self.restores.append(weight_version)
        if self.restore_error is not None:
            raise self.restore_error
        losses, self.knows_paris = self.saved[weight_version]
        self.losses = dict(losses)
        self.weight_version += 1
        self.saved[self.weight_version] = self.saved[weight_version]
        return RestoreResult(weight_version, self.weight_version, 1, 1, 0, True, 0.1)

    # what its tests plant
    def poison(self):
        self.losses["facts"] += 0.5

    def creep(self):
        self.losses["facts"] *= 1.03


class Judge:
    is_down = False

    def chat(self, messages, **_):
        if self.is_down:
            raise ModelAway("nobody there")
        return Message("assistant", json.dumps({"passes": True, "reason": "kind"}))


class Clock:
    now = 0.0

    def __call__(self):
        self.now += 10.0
        return self.now


class Night:
    """A store, the server, and batches of moments by their answers."""

    def __init__(self, config, store):
        self.config, self.store = config, store
        self.server, self.judge = Server(), Judge()
        self.server.effects["poison"] = self.server.poison
        self.moments = Moments(store)
        self.batches = Batches(store, self.moments, self.server, config)
        self.monitor = self.watch()

    def watch(self):
        return Monitor(self.config, self.store, self.server, self.judge, self.server, clock=Clock())

    def change(self, **quality):
        own = msgspec.structs.replace(self.config.quality, **quality)
        self.config = msgspec.structs.replace(self.config, quality=own)
        self.monitor = self.watch()

    def add(self, *answers):
        num = sum(self.moments.counts().values())
        return self.moments.add(
            Moment(
                kind="correction", tier="bootstrap", context=[Message("user", f"question {num + i}")],
                answer=Message("assistant", answer), source=Origin("log.jsonl", i + 1, 0), topic="t",
                reason="r", confidence=0.9, state="approved",
            )
            for i, answer in enumerate(answers)
        )  # fmt: skip

    def train(self, *answers):
        return self.batches.train("bootstrap", self.add(*answers), each=self.monitor.guard())

    def labels(self):
        return [one.label for one in QualityHistory(self.store).list()]


@contextmanager
def night_in(directory):
    lines = [
        {"category": name, "messages": [{"role": "user", "content": f"held {name}"},
                                        {"role": "assistant", "content": name}]}
        for name in ("chat", "facts")
    ]  # fmt: skip
    (directory / "heldout.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (directory / "canaries.toml").write_text(CANARIES)
    quality = Quality(heldout=str(directory / "heldout.jsonl"), canaries=str(directory / "canaries.toml"))
    config = CurationConfig(
        paths=Paths(str(directory / "run"), str(directory / "state")),
        curation=Curation(patience_s=0),
        quality=quality,
        tier_bootstrap=Tier(hold=0),
    )
    config.state_dir.mkdir(mode=0o700, exist_ok=True)
    with Store(config.state_dir / "curation.sqlite") as store:
        yield Night(config, store)
