"""A server that stands in for vLLM, a worker, a model directory and who trains, for the page at /train/ui.

Routes, worker front, queue, stores and files are the real ones; model, trainer and teacher are scripted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import generate_latest
from router_harness import TRAIN_KEY, FakeWorker, Server
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from synced_weights import Live, make_model

from apollo_ipc.hold import Hold
from apollo_ipc.memory_plan import Item, MemoryPlan
from apollo_ipc.teaching.facts import Fact
from apollo_ipc.teaching.store import TeachJob, TeachStore, store_path, teacher_lock
from apollo_ipc.wire.messages import RestoreVersion
from apollo_ipc.wire.replies import RestoreResult

UI = "/train/ui"
HOSTILE = (
    "\"'><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    "\u202egnp.exe\x1b[2J {{ 7 * 7 }}"
)
# Elements beyond the right edge of the window, but for what scrolls by itself.
TOO_WIDE = """document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll') &&
    one.getBoundingClientRect().right > innerWidth).map((one) => one.outerHTML.slice(0, 80))"""


class Model:
    """vLLM's chat route: it says what it learned, and is surer of any answer then."""

    def __init__(self):
        self.says, self.surer = HOSTILE, 0.0

    async def chat(self, request: Request):
        body = await request.json()
        words = re.findall(r"\S+\s*", body["messages"][-1]["content"])
        if body.get("continue_final_message"):
            scored = [
                None,
                *({"7": {"logprob": 0.0, "rank": 1, "decoded_token": "prompt "}} for _ in range(3)),
            ]
            scored += [
                {"8": {"logprob": -2.0 + self.surer, "rank": 1, "decoded_token": word}} for word in words
            ]
            return {
                "choices": [{"message": {"content": "x"}}],
                "usage": {"prompt_tokens": 9},
                "prompt_logprobs": scored,
            }
        return {
            "choices": [{"message": {"role": "assistant", "content": self.says}}],
            "usage": {"prompt_tokens": 4},
        }


class World:
    """A server, a worker and a model directory with two versions, and who trains what is queued."""

    def __init__(self, config, tmp_path):
        self.model, self.restored = Model(), []
        self.model_dir = make_model(tmp_path / "model")
        live = Live(self.model_dir)
        for _ in range(2):
            live.train()
            live.sync()
        self.server, self.worker = Server(), FakeWorker(config)
        app = self.server.app
        app.add_api_route("/v1/chat/completions", self.model.chat, methods=["POST"])
        app.add_api_route("/metrics", lambda: PlainTextResponse(generate_latest()))
        app.state.apollo_forecast = self
        self.stopping, self.held = threading.Event(), threading.Event()
        self.config, self.examines = config, examined_well

    def __enter__(self) -> World:
        self.worker.board.state.model_path = str(self.model_dir)
        self.worker.board.state.attached = True
        self.worker.board.state.weight_version = self.worker.board.state.durable_version = 2
        self.worker.__enter__()
        self.server.__enter__()
        self.thread = threading.Thread(target=self.train, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.held.clear()
        self.thread.join(10)
        self.server.__exit__()
        self.worker.__exit__()

    async def get(self, gateway: object) -> MemoryPlan:
        """In place of `plan`'s process."""
        item = Item("state", 855_000_000)
        return MemoryPlan("m", "bfloat16", 1, "d", 2, 0.9, [], [item], [], 1, item.bytes, 8, True, None, [])

    def train(self) -> None:
        """What the trainer does: steps, with losses that fall; restores that are asked for."""
        board, queue = self.worker.board, self.worker.queue
        while not self.stopping.is_set():
            while not board.asked.empty():
                asked = board.asked.get()
                assert isinstance(asked.request, RestoreVersion)
                self.restored.append(asked.request.weight_version)
                queue.restored(0, 1000, asked.request.weight_version, 9)
                board.state.weight_version = board.state.durable_version = 9
                asked.done.set_result(RestoreResult(asked.request.weight_version, 9, 1, 1, 0, False, 0.1))
            if (job := queue.take()) is None:
                board.show("idle")
                time.sleep(0.02)
                continue
            self.train_job(job)

    def train_job(self, job) -> None:
        board, queue, info = self.worker.board, self.worker.queue, job.info
        for step in range(info.steps_done + 1, info.num_steps + 1):
            while self.held.is_set() and not queue.is_cancel_requested(info.job_id):
                time.sleep(0.01)
            if queue.is_cancel_requested(info.job_id):
                queue.finish(info.job_id, "cancelled")
                return
            queue.record_step(info.job_id, step, 3.0 / step)
            board.show(
                "training", job_id=info.job_id, steps_done=step, num_steps=info.num_steps, loss=3.0 / step
            )
            time.sleep(0.02)
        board.state.weight_version += 1
        self.model.says, self.model.surer = "It is <b>Turin</b>.", 1.8
        queue.finish(info.job_id, "applied", weight_version=board.state.weight_version)


def enter(looked, key=TRAIN_KEY) -> None:
    page = looked.page
    page.goto(UI)
    page.get_by_label("Train key").fill(key)
    page.get_by_role("button", name="Log in").click()


WRONG_KEY = ("/train/ui/login", 403)


def assert_clean(looked, *refused: tuple[str, int]) -> None:
    """refused: the answers of 400 and more that the test itself has made, and may be."""
    assert looked.problems == []
    assert not (others := looked.refused - {*refused}), others
    assert looked.hosts == {looked.url.partition("//")[2]}
    assert looked.page.title() == "apollo-ipc: what the model learns"
    assert looked.page.evaluate(TOO_WIDE) == []


def over(looked) -> set[tuple[str, int]]:
    """What a session that is over is refused, whatever the page asks then."""
    return {(path, status) for path, status in looked.refused if status == 401}


# --- a teacher, where a test wants one ---


def examined_well(fact: Fact) -> str:
    """The phase in which a lesson ends."""
    return "applied"


@contextmanager
def teaching(world: World) -> Iterator[TeachStore]:
    """Takes on what comes to POST /teach, a phase at a time; waits in `training` while `world.held`."""
    stopping = threading.Event()
    with Hold(teacher_lock(world.config), "a teacher"), TeachStore(store_path(world.config)) as store:

        def run() -> None:
            while not stopping.wait(0.02):
                if (job := store.first_unfinished()) is not None:
                    advance(world, store, job)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            stopping.set()
            world.held.clear()
            thread.join(10)


def advance(world: World, store: TeachStore, job: TeachJob) -> None:
    if job.is_cancelled:
        store.advance(job, "cancelled", report=report_of(job, "cancelled", "somebody cancelled it"))
    elif job.phase == "preparing":
        store.advance(job, "training", round=1)
    elif job.phase == "training" and not world.held.is_set():
        store.advance(job, "checking")
        world.model.says, world.model.surer = "It is Turin.", 1.8
    elif job.phase == "checking":
        end = world.examines(job.request.facts[0])
        reason = "" if end == "applied" else "60% of the near misses name the fact, above 50%"
        store.advance(job, end, report=report_of(job, end, reason))


def report_of(job: TeachJob, state: str, reason: str) -> dict:
    fact = job.request.facts[0]

    def answers(words: str, *right: bool) -> list[dict]:
        return [
            {"question": f"{words} {i}: {HOSTILE}", "before": HOSTILE, "after": f"{one} <i>", "is_right": one}
            for i, one in enumerate(right)
        ]

    one = {
        "fact": {"question": fact.question, "answer": fact.answer, "key": fact.key},
        "taught": answers("taught", True)[0],
        "paraphrased": answers("put otherwise", True, True, False),
        "reversed": answers("the other way round", False),
        "not_it": answers("of another", False, True),
    }
    return {
        **{"state": state, "reason": reason, "known": 0.6, "hits": 0.5, "rise": 0.123456},
        **{"facts": [one], "jobs": ["job-1"], "version_before": 2},
        "writing": {"reason": "the model answers 1 of 5 questions about it: rules alone"},
    }
