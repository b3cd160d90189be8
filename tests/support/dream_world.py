"""What dreams need around them, without a model: a learner that learns by being trained, a dreamer by a
script, and a training interface that knows its idempotency keys."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager

import msgspec

from apollo_curation.chat_client import ChatAnswer, ChatClient
from apollo_curation.demo.scripted_model import ScriptedModel
from apollo_curation.dreams.bridge import Bridge
from apollo_curation.dreams.judge import Dreamer
from apollo_curation.dreams.seeds import Seed, seed_id
from apollo_curation.dreams.table import Dream, Dreams
from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moments
from apollo_curation.store import Store
from apollo_curation.training.batches import Batches
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import Message

GOOD = "I looked it up first:"
LESSON = "Look things up before you answer."


class Crash(Exception):
    """As if the process had died here."""


class Clockwork:
    """Raises Crash at call number `crash_at` (from 1) of all that is outside."""

    def __init__(self):
        self.crash_at = None
        self.num_calls = 0

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.crash_at:
            raise Crash


class Learner:
    """Answers well once it was trained on `needs` better responses; notes what it was asked and taught.
    is_cut_off: whether its answers are."""

    def __init__(self, clockwork: Clockwork, needs: int = 0):
        self.needs = needs
        self.is_cut_off = False
        self.taught: list[str] = []
        self.asked: list[list[Message]] = []
        self._clockwork = clockwork

    def answer(self, messages, *, max_tokens, temperature=0.0) -> ChatAnswer:
        self._clockwork.tick()
        self.asked.append(messages)
        has_learned = len(self.taught) >= self.needs or messages[0].role == "system"
        said = f"{GOOD if has_learned else 'I guess:'} {messages[-1].content[-20:]}"
        return ChatAnswer(Message("assistant", said), self.is_cut_off)


class FakeTraining:
    """Of /train: a job for each key, trained at once. end: the state in which jobs end."""

    def __init__(self, learner: Learner, clockwork: Clockwork):
        self.end = "applied"
        self.requests: dict[str, object] = {}
        self._learner = learner
        self._clockwork = clockwork

    def submit(self, request, idempotency_key: str) -> str:
        self._clockwork.tick()
        if idempotency_key not in self.requests:
            self.requests[idempotency_key] = request
            if self.end == "applied":
                self._learner.taught += [one.messages[-1].content for one in request.examples]
        assert self.requests[idempotency_key] == request
        self._clockwork.tick()
        return f"job-{idempotency_key}"

    def job(self, job_id: str) -> JobInfo:
        request = self.requests[job_id.removeprefix("job-")]
        num = len(request.examples)
        error = None if self.end == "applied" else "as told"
        return JobInfo(
            job_id, 1, self.end, time.time(), num, num, steps_done=num, weight_version=7, error=error
        )

    def wait(self, job_id: str, each=lambda job: None) -> JobInfo:
        self._clockwork.tick()
        each(msgspec.structs.replace(self.job(job_id), state="running"))
        return self.job(job_id)

    def cancel(self, job_id: str) -> None:
        self.end = "cancelled"


class TickingModel:
    """The dreamer's model, whose every call may crash."""

    def __init__(self, model: ChatClient, clockwork: Clockwork):
        self._model = model
        self._clockwork = clockwork

    def chat(self, *args, **kwargs) -> Message:
        self._clockwork.tick()
        return self._model.chat(*args, **kwargs)


def asks_for(body) -> str:
    """situation, verdict or better: what a request to the dreamer wants."""
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    return "situation" if "turns" in fields else "verdict" if "reason" in fields else "better"


class Script:
    """The dreamer: situations in words of their own, verdicts by the word GOOD, better responses. Each of the
    three can be replaced by a test."""

    def __init__(self):
        self.num_situations = 0

    def __call__(self, body):
        if "response_format" not in body:  # the learner's part, where a test has no other
            return f"{GOOD} {body['messages'][-1]['content']}"
        return getattr(self, asks_for(body))(body)

    def situation(self, body):
        self.num_situations += 1
        return {"turns": [new_text(self.num_situations)], "good": "It looks things up."}

    def verdict(self, body):
        text = body["messages"][-1]["content"]
        response = text.partition("<Response>")[2]
        return {"reason": "by the word", "good": GOOD in response, "confidence": 0.9}

    def better(self, body):
        text = body["messages"][-1]["content"].partition("<Conversation>\n")[2]
        return {"response": f"{GOOD} {text.splitlines()[0]}"}


def new_text(number: int) -> str:
    return " ".join(f"word{number}{letter}" for letter in "abcdefghij")


class World:
    """One store with everything around it. `restart()` is a new process on the same store."""

    def __init__(self, config, server: ScriptedModel, model: ChatClient, script: Script, needs: int):
        self.config = config
        self.server = server
        self._model = model
        self.script = script
        self.clockwork = Clockwork()
        self.learner = Learner(self.clockwork, needs)
        self.training = FakeTraining(self.learner, self.clockwork)
        self.each = lambda job: None
        self.store = None
        self.restart()

    def restart(self) -> None:
        if self.store is not None:
            self.store.close()
        self.store = Store(self.config.state_dir / "curation.sqlite")
        self.moments = Moments(self.store)
        self.dreams = Dreams(self.store)
        self.batches = Batches(self.store, self.moments, self.training, self.config)
        self.bridge = Bridge(
            dreams=self.dreams,
            moments=self.moments,
            learner=self.learner,
            dreamer=Dreamer(TickingModel(self._model, self.clockwork), self.config),
            train=lambda moments: self.batches.train("dream", moments, lambda job: self.each(job)),
            config=self.config,
        )

    def all_dreams(self) -> list[Dream]:
        """The newest first."""
        return self.dreams._select("ORDER BY position DESC")

    def jobs(self) -> list[list[str]]:
        """The answers of each job, in the order of training."""
        return [[one.messages[-1].content for one in job.examples] for job in self.training.requests.values()]


@contextmanager
def dream_world(config, needs: int = 0, **sections):
    """sections: changes of the configuration, {"dream": {"num_variations": 2}}. Patience is 0 s, and nothing
    is held beside what is trained."""
    sections = {"curation": {"patience_s": 0.0}, "tier_dream": {"hold": 0}, **sections}
    for name, changes in sections.items():
        section = msgspec.structs.replace(getattr(config, name), **changes)
        config = msgspec.structs.replace(config, **{name: section})
    server, model = _shared()
    script = Script()
    server.script = lambda body: script(body)
    server.requests.clear()
    model.patience_s = config.curation.patience_s
    world = World(config, server, model, script, needs)
    try:
        yield world
    finally:
        world.store.close()


@functools.cache
def _shared() -> tuple[ScriptedModel, ChatClient]:
    """One server and one client for all worlds of a process: making a client takes a tenth of a second."""
    server = ScriptedModel(lambda body: 500)
    server.__enter__()  # its threads are daemons
    return server, ChatClient(server.url, "scripted")


def make_seed(text: str = LESSON, at: float = 0.0) -> Seed:
    return Seed(seed_id(text), text, "habits", Origin("lessons.md", 1, 0), at)
