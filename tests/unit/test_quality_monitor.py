"""The guard beside training: when it stops, what it restores, and what it does when it cannot."""

from __future__ import annotations

import json
import logging
import math

import msgspec
import pytest
from fake_vllm import FakeVllm

from apollo_ipc.config import Config, Curation, Paths, Quality
from apollo_ipc.curation.batches import Batches
from apollo_ipc.curation.conversation import Source
from apollo_ipc.curation.moments import Moment, Moments
from apollo_ipc.curation.quality import watch
from apollo_ipc.curation.quality.history import History
from apollo_ipc.curation.quality.monitor import Monitor
from apollo_ipc.curation.quality.watch import QualityBroken, watched
from apollo_ipc.curation.served_model import ModelAway
from apollo_ipc.curation.store import Store
from apollo_ipc.curation.training import Training
from apollo_ipc.errors import ConfigError, Conflict, NotReady, UserError
from apollo_ipc.messages import ENDED_STATES, JobInfo, Reply, RestoreResult, SyncResult
from apollo_ipc.requests import Message

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
        return RestoreResult(weight_version, self.weight_version, 1, 1, True, 0.1)

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
                answer=Message("assistant", answer), source=Source("log.jsonl", i + 1, 0), topic="t",
                reason="r", confidence=0.9, state="approved",
            )
            for i, answer in enumerate(answers)
        )  # fmt: skip

    def train(self, *answers):
        return self.batches.train("bootstrap", self.add(*answers), each=self.monitor.guard())

    def labels(self):
        return [one.label for one in History(self.store).list()]


@pytest.fixture
def night(tmp_path):
    lines = [
        {"category": name, "messages": [{"role": "user", "content": f"held {name}"},
                                        {"role": "assistant", "content": name}]}
        for name in ("chat", "facts")
    ]  # fmt: skip
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "canaries.toml").write_text(CANARIES)
    quality = Quality(heldout=str(tmp_path / "heldout.jsonl"), canaries=str(tmp_path / "canaries.toml"))
    config = Config(
        paths=Paths(str(tmp_path / "run"), str(tmp_path / "state")),
        curation=Curation(patience_s=0),
        quality=quality,
    )
    config.state_dir.mkdir(mode=0o700, exist_ok=True)
    with Store(config.state_dir / "curation.sqlite") as store:
        yield Night(config, store)


def test_a_good_night_is_measured_before_during_and_after(night):
    assert night.monitor.before().may_go_on
    batch = night.train(*["fine"] * 6)
    report = night.monitor.after()
    assert batch.state == "trained"
    assert report.ok
    assert report.may_go_on
    assert night.labels() == ["before", "during", "during", "after"]
    first, *_, last = History(night.store).list()
    assert first.durable_version == 0
    assert (first.weight_version, last.weight_version) == (0, 6)
    assert last.batch_ids == [batch.batch_id]
    assert last.losses["facts"].loss == 1.0
    assert last.loss == 1.5
    assert [(one.name, one.passed) for one in last.canaries] == [("capital", True), ("kind", True)]
    assert night.server.restores == []
    assert History(night.store).curve(batch.job_id) == pytest.approx([3.0, 2.9, 2.8, 2.7, 2.6, 2.5])


@pytest.fixture
def watching(night, monkeypatch):
    """`watched` of the commands, on the night's server."""
    night.server.close = night.judge.close = lambda: None
    monkeypatch.setattr(watch, "learner", lambda config, stop: night.server)
    monkeypatch.setattr(watch, "judging", lambda config, stop: night.judge)
    return lambda: watched(night.config, night.store, night.server)


def test_training_by_command_is_watched_and_says_what_became_worse(night, watching):
    with watching() as each:
        night.batches.train("bootstrap", night.add("fine"), each=each)
    assert night.labels() == ["before", "after"]
    night.change(on_breach="restore")
    with (
        pytest.raises(QualityBroken, match=r"facts: held-out loss.*weight version 1 is restored as"),
        watching() as each,
    ):
        night.batches.train("bootstrap", night.add("poison"), each=each)
    assert night.server.losses["facts"] == 1.0
    assert night.labels()[2:] == ["before", "after", "restored"]


def test_training_by_command_is_not_begun_where_the_model_is_worse_already(night, watching):
    with watching():
        pass
    night.server.poison()
    with pytest.raises(QualityBroken, match="worse than when it was last good"), watching():
        pytest.fail("it was begun")


def test_without_a_heldout_set_training_by_command_is_not_watched(night, watching):
    night.change(enabled=False)
    with watching() as each:
        night.batches.train("bootstrap", night.add("poison"), each=each)
    assert night.labels() == []


def test_poison_in_a_long_job_stops_it_on_the_way_and_nothing_more_is_trained(night):
    night.monitor.before()
    batch = night.train(*["poison"] * 40)
    assert batch.state == "stopped"
    assert batch.steps_done < 10
    assert "facts: held-out loss 1.0000 -> " in batch.error
    report = night.monitor.after()
    assert not report.ok
    assert not report.may_go_on
    assert [breach.what for breach in report.breaches] == ["facts"]
    assert night.server.restores == []
    during = [one for one in History(night.store).list() if one.label == "during"]
    assert [one.action for one in during] == ["stopped"]
    # The next night begins with the same finding: it trains nothing, and makes this no new reference.
    again = night.watch()
    syncs = night.server.num_syncs
    report = again.before()
    assert not report.may_go_on
    assert again.baseline is None
    assert report.against.label == "before"
    assert night.server.num_syncs == syncs + 1


def test_poison_in_a_short_job_is_found_after_it_and_the_last_good_version_comes_back(night, caplog):
    caplog.set_level(logging.INFO)
    night.change(on_breach="restore")
    night.monitor.before()
    good = dict(night.server.losses)
    batch = night.train("poison", "fine")
    assert batch.state == "trained"
    assert night.labels() == ["before"]
    report = night.monitor.after()
    assert not report.ok
    assert report.may_go_on
    assert (report.restored_version, report.restored_as) == (0, 3)
    assert report.undone == [batch.batch_id]
    assert night.server.losses == good
    assert report.measurement.losses["facts"].loss == 1.0
    assert night.labels() == ["before", "after", "restored"]
    assert [one.action for one in History(night.store).list()] == [None, "restored", None]
    assert night.batches.list()[0].state == "undone"
    assert {moment.state for moment in night.moments.of_batch(batch.batch_id)} == {"undone"}
    assert "facts: held-out loss 1.0000 -> 1.5000 nats a token (+50.0%), at most 1.0500" in caplog.text
    assert "weight version 0 restored live as 3, 1 batches undone" in caplog.text


def test_after_a_restore_the_night_goes_on_and_the_second_poison_is_undone_alone(night):
    night.change(on_breach="restore")
    night.monitor.before()
    first = night.train("poison")
    assert night.monitor.after().undone == [first.batch_id]
    fine = night.train("fine")
    assert night.monitor.after().ok
    second = night.train("poison")
    report = night.monitor.after()
    # The reference is that of the night: what was fine went with the poison, and says so.
    assert report.undone == [fine.batch_id, second.batch_id]
    assert night.server.restores == [0, 2]
    assert report.may_go_on


def test_a_stop_by_the_guard_counts_even_if_the_last_steps_mended_it(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison", *["fine"] * 39)
    assert batch.state == "stopped"
    night.server.losses["facts"] = 1.0
    report = night.monitor.after()
    assert not report.ok
    assert report.restored_version == 0


def test_small_losses_that_add_up_in_a_night_are_a_breach(night):
    night.server.effects["creep"] = night.server.creep
    night.monitor.before()
    night.train("creep")
    assert night.monitor.after().ok
    night.train("creep")
    assert not night.monitor.after().ok


def test_what_creeps_from_night_to_night_is_reported_as_drift(night, caplog):
    night.server.effects["creep"] = night.server.creep
    for _ in range(3):
        night.monitor.before()
        night.train("creep")
        report = night.monitor.after()
        assert report.ok
    assert report.drift == {"chat": 0.0, "facts": pytest.approx(1.03**3 - 1)}
    assert "the loss of facts is 9.3 % higher than when it was first measured" in caplog.text


def test_a_loss_that_is_no_number_is_a_breach_whatever_was_before(night):
    night.server.losses["chat"] = math.nan
    report = night.monitor.before()
    assert [breach.kind for breach in report.breaches] == ["not_a_number"]
    assert not report.may_go_on
    assert History(night.store).list()[0].losses["chat"].loss is None
    assert night.monitor.baseline is None


def test_weights_that_became_nan_are_restored(night):
    night.change(on_breach="restore")
    night.server.effects["nan"] = lambda: night.server.losses.update(chat=math.nan, facts=math.nan)
    night.monitor.before()
    night.train("nan")
    report = night.monitor.after()
    assert [breach.kind for breach in report.breaches] == ["not_a_number", "not_a_number"]
    assert report.may_go_on
    assert report.measurement.loss == 1.5


def test_an_example_that_can_no_longer_be_measured_is_a_breach(night):
    night.monitor.before()
    answered = night.server.answer_logprobs

    def answer(context, answer, tools=None):
        if answer.content == "chat":
            raise UserError("the server answered 500: out of range float values")
        return answered(context, answer)

    night.server.answer_logprobs = answer
    report = night.monitor.after()
    assert [breach.kind for breach in report.breaches] == ["unmeasured"]
    assert "heldout.jsonl:1: the server answered 500" in report.breaches[0].sentence


def test_a_canary_that_is_lost_is_a_breach_unless_one_may_be(night):
    night.server.effects["forget"] = lambda: setattr(night.server, "knows_paris", False)
    night.monitor.before()
    night.train("forget")
    report = night.monitor.after()
    assert [breach.sentence for breach in report.breaches] == [
        "1 of the canaries that passed before fail now, at most 0 may: capital"
    ]
    night.server.knows_paris = True
    night.change(max_canaries_lost=1)
    night.monitor.before()
    night.train("forget")
    assert night.monitor.after().ok


def test_a_judge_that_is_down_is_counted_and_no_breach(night):
    night.monitor.before()
    night.judge.is_down = True
    night.train("fine")
    report = night.monitor.after()
    assert report.ok
    assert report.measurement.num_not_judged == 1


def test_noise_is_no_breach(night):
    night.server.losses["facts"] = 0.0001
    night.server.effects["noise"] = lambda: night.server.losses.update(facts=0.004, chat=2.02)
    night.monitor.before()
    night.train("noise")
    assert night.monitor.after().ok


def test_a_restore_that_is_refused_while_a_job_trains_is_said_and_made_up_for(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison")
    night.server.restore_error = ModelAway("refused while a job trains")
    report = night.monitor.after()
    assert report.restore_error == "refused while a job trains"
    assert not report.may_go_on
    assert report.undone == []
    assert night.batches.list()[0].state == "trained"
    # The next night, in another process, does it first.
    night.server.restore_error = None
    again = night.watch()
    assert again.before().may_go_on
    assert night.batches.list()[0].state == "undone"
    assert night.server.losses["facts"] == 1.0
    assert [moment.state for moment in night.moments.of_batch(batch.batch_id)] == ["undone"]
    assert night.labels()[-2:] == ["restored", "before"]


def test_the_training_interface_waits_for_a_job_before_it_restores(night, monkeypatch):
    answers = [Conflict("a job is being trained", code="job_running"), RestoreResult(3, 9, 1, 1, True, 0.1)]
    asked = []

    def call(socket_path, request, *, timeout_s):
        asked.append(request.weight_version)
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return Reply("", restore=answer)

    monkeypatch.setattr("apollo_ipc.client.call", call)
    monkeypatch.setattr("apollo_ipc.curation.training.RETRY_S", 0.0)
    patient = msgspec.structs.replace(night.config.curation, patience_s=60)
    training = Training(msgspec.structs.replace(night.config, curation=patient))
    assert training.restore(3).weight_version == 9
    assert asked == [3, 3]
    answers.append(Conflict("another", code="conflict"))
    with pytest.raises(Conflict):
        training.restore(3)
    answers.append(Conflict("a job is being trained", code="job_running"))
    with pytest.raises(ModelAway, match="a job is being trained"):
        Training(night.config).restore(3)


def test_a_version_that_is_no_longer_kept_is_said(night):
    night.change(on_breach="restore")
    night.monitor.before()
    night.train("poison")
    night.server.restore_error = UserError("version 0 is not kept; there are: 3, 4")
    report = night.monitor.after()
    assert report.restore_error == "version 0 is not kept; there are: 3, 4"
    assert not report.may_go_on
    assert [one.action for one in History(night.store).list()] == [None, "not_restored"]


def test_the_reference_is_pinned_and_a_worse_model_leaves_the_pin_where_it_was(night):
    night.monitor.before()
    night.train("fine", "fine")
    night.monitor.after()
    night.watch()
    night.monitor.before()
    assert night.server.pinned == night.monitor.baseline.durable_version == 2
    night.server.poison()
    night.train("fine")
    night.watch()
    assert not night.monitor.before().may_go_on
    assert night.server.pinned == 2


def test_a_reference_that_cannot_be_pinned_is_warned_of_and_training_goes_on(night, caplog):
    night.server.pin_error = NotReady("no model is being served here")
    assert night.monitor.before().may_go_on
    assert "could not be pinned (no model is being served here)" in caplog.text


def test_restoring_needs_versions_that_are_kept(night):
    few = msgspec.structs.replace(night.config.checkpoint, history=0)
    night.config = msgspec.structs.replace(night.config, checkpoint=few)
    night.watch()
    with pytest.raises(ConfigError, match=r"set checkpoint.history to 1 or more"):
        night.change(on_breach="restore")


def test_a_night_that_was_killed_before_its_last_check_is_settled_by_the_next(night):
    night.change(on_breach="restore")
    night.monitor.before()
    batch = night.train("poison")
    again = night.watch()  # the first process is gone, without `after`
    report = again.before()
    assert report.may_go_on
    assert night.batches.list()[0].state == "undone"
    assert night.server.losses["facts"] == 1.0
    assert night.labels() == ["before", "after", "restored", "before"]
    assert report.measurement.batch_ids == []
    assert batch.batch_id in History(night.store).list()[1].batch_ids


def test_a_killed_night_whose_batch_is_open_keeps_its_reference(night):
    night.monitor.before()
    reference = night.monitor.baseline

    def die(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        night.batches.train("bootstrap", night.add(*["poison"] * 30), each=die)
    night.monitor = night.watch()
    assert night.monitor.before().measurement == reference
    assert night.labels() == ["before"]
    assert [batch.state for batch in night.batches.resume(each=night.monitor.guard())] == ["stopped"]
    assert not night.monitor.after().may_go_on


def test_a_server_that_is_away_during_a_job_costs_a_check_and_not_the_job(night, caplog):
    night.monitor.before()
    night.server.effects["away"] = lambda: setattr(night.server, "is_away", True)
    night.server.effects["back"] = lambda: setattr(night.server, "is_away", False)
    batch = night.train("away", *["fine"] * 6, "back", "fine")
    assert batch.state == "trained"
    assert "no check during job" in caplog.text
    assert night.monitor.after().ok


def test_a_check_is_held_against_the_last_good_one_until_it_is_accepted(night):
    assert night.monitor.check().against is None
    night.server.poison()
    assert not night.monitor.check().ok
    assert not night.monitor.check().ok
    assert not night.monitor.check("good").ok
    report = night.monitor.check()
    assert report.ok
    assert report.against.label == "good"


def test_moments_of_the_held_out_set_are_named(night, caplog):
    added = night.add("fine")
    held = msgspec.structs.replace(added[0], context=[Message("user", "held facts")], moment_id="")
    held = msgspec.structs.replace(held, answer=Message("assistant", "facts"))
    known = night.moments.add([held])
    assert night.monitor.find_overlap([*added, held]) == [held]
    assert night.monitor.before().overlap == [known[0].moment_id]
    assert "1 moments are in the held-out set" in caplog.text


def test_an_empty_held_out_set_is_refused_before_anything_is_trained(night, tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty, so nothing would be watched"):
        night.watch()


def test_another_held_out_set_is_not_held_against_the_old_one(night, tmp_path):
    night.monitor.check()
    more = {"category": "facts", "messages": [{"role": "user", "content": "x"},
                                              {"role": "assistant", "content": "chat"}]}  # fmt: skip
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(more)}\n")
    report = night.watch().check()
    assert report.measurement.losses["facts"].loss == 1.5
    assert report.ok
    assert report.drift == {"chat": 0.0}


@pytest.fixture
def served(monkeypatch):
    """vLLM, without a worker behind it."""
    with FakeVllm() as vllm:
        vllm.content = "Paris"
        monkeypatch.setenv("APOLLO_CURATION__URL", vllm.url)
        monkeypatch.setattr("apollo_ipc.cli.quality.WORKER_PATIENCE_S", 0.0)
        yield vllm


def test_the_command_measures_a_server_and_exits_by_what_it_found(apollo, served, night, monkeypatch):
    monkeypatch.setenv("APOLLO_QUALITY__HELDOUT", night.config.quality.heldout)
    monkeypatch.setenv("APOLLO_QUALITY__CANARIES", night.config.quality.canaries)
    monkeypatch.setenv("APOLLO_JUDGE__ENABLED", "false")
    served.logprob = lambda token: -1.0
    told = apollo("quality", "check")
    assert (told.returncode, told.stderr) == (0, "")
    assert "canary kind: not judged: no judge is configured" in told.stdout
    assert "canaries: 1 of 2 pass, 1 not judged" in told.stdout
    assert "within the limits (held against nothing yet)" in told.stdout
    served.logprob = lambda token: -1.2
    told = apollo("quality", "check")
    assert told.returncode == 1
    assert "BREACH chat: held-out loss 1.0000 -> 1.2000 nats a token (+20.0%)" in told.stdout
    shown = json.loads(apollo("quality", "check", "--json").stdout)
    assert shown["ok"] is False
    assert shown["measurement"]["losses"]["facts"]["num_tokens"] == len("facts|")
    assert shown["measurement"]["weight_version"] is None
    assert apollo("quality", "check", "--accept").returncode == 0
    assert apollo("quality", "check").returncode == 0
