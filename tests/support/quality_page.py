"""A history with everything that its page shows, and the page as a browser reads it."""

from __future__ import annotations

from html.parser import HTMLParser

from apollo_curation.logs.conversation import Origin
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.canaries import CanaryResult
from apollo_curation.quality.history import Breach, Measurement, QualityHistory
from apollo_curation.quality.measure import CategoryLoss
from apollo_curation.training.batch_table import BatchTable, new_batch_id
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import Message, TrainRequest

HOSTILE = (
    "\"'><script>document.title = 'taken'; fetch('http://evil.example/a')</script>"
    "<img src='http://evil.example/b' onerror=\"document.title = 'taken'\">"
    "<svg onload=\"document.title = 'taken'\"></svg><style>@import url(http://evil.example/c);</style>"
    "{{ 7 * 7 }}\u202egnp.exe\x1b[2J"
)
T0 = 1_790_000_000.0


def measured(label, at, version, losses, passed=(True, True), **more) -> Measurement:
    by_category = {
        name: CategoryLoss(loss, 1200, 40, "h") if loss is not None else CategoryLoss(None, 1200, 40, "h")
        for name, loss in losses.items()
    }
    names = [("capital of France", "facts"), ("refuses to help a thief", "safety"), ("kind", "manners")]
    canaries = [
        CanaryResult(name, category, ok, "Paris", "" if ok else "is not 'Paris'", "c")
        for (name, category), ok in zip(names, passed, strict=False)
    ]
    return Measurement(label, T0 + at, 2.0, version, by_category, canaries, **more)


def add_batch(store, at, answers, curve, state="trained", version=None, **more):
    moments = Moments(store).add(
        Moment(
            kind=("correction", "praise", "error_then_fix")[i % 3],
            tier="direct" if len(answers) < 4 else "dream",
            context=[Message("user", f"{question} ({at} {i})")], answer=Message("assistant", answer),
            source=Origin(f"/logs/{source}.jsonl", i + 1, 0), topic="t", reason="the user corrected it",
            confidence=0.9, state="trained", created_at=T0 + at,
        )
        for i, (question, answer, source) in enumerate(answers)
    )  # fmt: skip
    table = BatchTable(store)
    batch_id = new_batch_id()
    request = TrainRequest([moment.example() for moment in moments])
    table.add(moments[0].tier, moments, request, batch_id)
    for moment in moments:
        Moments(store).change(moment.moment_id, batch_id=batch_id)
    known = [loss for loss in curve if loss is not None]
    num = len(curve)
    job = JobInfo(
        f"job-{batch_id}", 1, "applied", T0 + at, len(moments), num, steps_done=num, loss_history=curve,
        loss_first=known[0], loss_last=known[-1], weight_version=version,
    )  # fmt: skip
    return table.change(batch_id, state=state, job=job, created_at=T0 + at, ended_at=T0 + at + 60, **more)


def fill(store) -> None:
    """Three nights: a good one, a poisoned one that was taken back, and one with a judge that was away."""
    history = QualityHistory(store)

    def losses(chat, facts, tools):
        return {"everyday chat": chat, "facts": facts, "tool calls": tools}

    def breach(now):
        sentence = f"facts: held-out loss 1.5300 -> {now:.4f} nats a token, at most 1.6065 is allowed"
        return [Breach("loss", "facts", 1.53, now, 1.6065, sentence)]

    def add(*positional, **named):
        history.add(measured(*positional, **named))

    add("before", 0, 12, losses(2.10, 1.55, 0.92), (True, True, True))
    curve = [2.9 * 0.97**i + 0.1 * ((i * 7) % 5) / 5 for i in range(48)]
    answers = [
        ("Is it raining?", "No, it is dry.", "monday"),
        ("Please add a test", "Added one.", "monday"),
        ("That is wrong", "You are right: it is 1889.", "tuesday"),
        ("Thanks!", "Gladly.", "tuesday"),
    ]
    add_batch(store, 60, answers * 3, curve, version=18)
    add("during", 90, 15, losses(2.08, 1.54, 0.91), (True, True, True))
    add("after", 200, 18, losses(2.05, 1.53, 0.90), (True, True, True))
    add("before", 86400, 18, losses(2.05, 1.53, 0.90), (True, True, True))
    poison = [(HOSTILE, HOSTILE, "ok"), ("Capital of France?", "Berlin.", "wednesday")]
    add_batch(store, 86460, poison, [1.2, 2.8, 4.9], "undone", 21, error=HOSTILE)
    add(
        "during",
        86480,
        20,
        losses(2.11, 1.71, 0.94),
        (False, True, None),
        breaches=breach(1.71),
        action="stopped",
    )
    add(
        "after",
        86600,
        21,
        losses(2.13, 1.83, 0.95),
        (False, True, None),
        breaches=breach(1.83),
        action="restored",
    )
    add(
        "restored",
        86700,
        22,
        losses(2.05, 1.53, 0.90),
        (True, True, True),
        restored_version=18,
        durable_version=22,
    )
    add("before", 172800, 22, losses(2.05, 1.53, 0.90), (True, True, True))
    add_batch(store, 172860, answers[:2], [1.4, 1.1, None, 0.7], version=24)
    add("after", 173000, 24, losses(2.04, 1.49, 0.91), (True, True, None))


class Parsed(HTMLParser):
    """tags with their attributes, and all text that a reader sees."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
