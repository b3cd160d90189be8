"""The nightly run, unattended: what happened today into the weights, watched, written to disk, reported.

    watch -> resume -> read -> hindsight -> judge -> score -> dream -> train -> watch again -> checkpoint ->
    report

Each stage stands alone: one whose server stays away is noted, and what came before it is kept. The next night
goes on with whatever this one left, and trains nothing twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from apollo_curation.chat_client import ChatClient, judging, learner
from apollo_curation.dreams import dream as dreaming
from apollo_curation.dreams.bridge import open_bridge
from apollo_curation.dreams.seeds import Seed, read_seeds
from apollo_curation.lock import alone
from apollo_curation.logs.conversation import Broken
from apollo_curation.moments.hindsight.better import check_better
from apollo_curation.moments.hindsight.score import look_back
from apollo_curation.moments.judge import approve_confident, judge
from apollo_curation.moments.moments import Moments
from apollo_curation.moments.notice import notice
from apollo_curation.moments.surprise import score
from apollo_curation.quality.held import what_is_held
from apollo_curation.quality.monitor import Monitor
from apollo_curation.quality.report import write_html
from apollo_curation.quality.watch import describe_breaches
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches, Each, TrainingBatch, ignore
from apollo_curation.training.schedule import TIERS, Learning
from apollo_ipc.errors import AlreadyRunning, ApolloError, NotReady
from apollo_ipc.process.progress import Doing, say_nothing

log = logging.getLogger(__name__)

MAX_JOBS = 100  # of one tier in a night


class Stage(msgspec.Struct):
    """num_done: what the stage is there for (moments, verdicts, dreams, examples, ...); facts: its figures;
    problem: why it did not get through, None where it did."""

    name: str
    num_done: int = 0
    duration_s: float = 0.0
    facts: dict[str, Any] = {}
    problem: str | None = None


class NightReport(msgspec.Struct):
    """ended: a sentence; exit_code: 0; 1 where quality was broken or training failed; 69 where a server
    stayed away."""

    started_at: float
    stages: list[Stage] = []
    ended: str = "everything was done"
    exit_code: int = 0
    html: str | None = None
    duration_s: float = 0.0

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


class _Ended(Exception):
    """Nothing more is trained tonight."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


def run_night(
    config: CurationConfig,
    store: Store,
    *,
    is_auto: bool,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    doing: Doing = say_nothing,
) -> NightReport:
    """is_auto: moments are approved from config.curation.auto_confidence on; else a person's approvals of
    the day are trained, and what is noticed tonight waits for one. say: hears of each stage that has ended;
    doing: of each that begins.

    Raises AlreadyRunning where another night is under way, ConfigError where the configuration is wrong
    (without a held-out set nobody would notice harm: quality.enabled = false says that this is meant), and
    UserError where a server refuses us as a whole. Servers that stay away are in the report.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(config.state_dir / "curation.night.lock", stop=lambda: True))
        except NotReady:
            raise AlreadyRunning("another night is under way in this state directory") from None
        model, other, training = learner(config, stop), judging(config, stop), TrainClient(config, stop)
        for part in (model, other, training):
            stack.callback(part.close)
        night = _Night(config, store, model, other, training, is_auto, stop, say, doing)
        return night.run()


class _Night:
    def __init__(
        self,
        config: CurationConfig,
        store: Store,
        model: ChatClient,
        other: ChatClient,
        training: TrainClient,
        is_auto: bool,
        stop: Callable[[], bool],
        say: Callable[[str], None],
        doing: Doing,
    ):
        self._config, self._store, self._is_auto = config, store, is_auto
        self._model, self._other, self._training = model, other, training
        self._stop, self._say, self._doing = stop, say, doing
        self._moments = Moments(store)
        self._batches = Batches(store, self._moments, training, config, stop, what_is_held(config, model))
        self._learning = Learning(store, self._moments, self._batches, training, config, model)
        judge = other if config.judge.enabled else None
        self._monitor = Monitor(config, store, model, judge, training) if config.quality.enabled else None
        self._guard: Each = ignore
        self._report = NightReport(started_at=time.time())

    def run(self) -> NightReport:
        report, started = self._report, time.monotonic()
        try:
            # What was read and judged is kept also where a later stage fails.
            self._do("watch", self._watch)
            self._do("resume", self._resume)
            self._do("read", self._read)
            self._do("hindsight", self._look_back)
            self._do("judge", self._judge)
            self._do("score", self._score)
            try:
                self._do("dream", self._dream)
                self._do("train", self._train)
            finally:
                self._do("watch again", self._watch_again)
            self._do("checkpoint", self._checkpoint)
        except _Ended as error:
            report.ended, report.exit_code = str(error), error.exit_code
        except NotReady as error:
            report.ended, report.exit_code = error.message, error.exit_code
        self._do("report", self._write)
        report.duration_s = time.monotonic() - started
        return report

    def _do(self, name: str, work: Callable[[Stage], None]) -> None:
        """A stage that fails is in the report like one that does not; what it raises goes on."""
        stage, started = Stage(name), time.monotonic()
        self._report.stages.append(stage)
        self._doing(name)
        try:
            if self._stop() and name not in ("watch again", "report"):
                raise _Ended("it was asked to stop", 0)
            work(stage)
        except (_Ended, ApolloError) as error:
            stage.problem = str(error)
            raise
        finally:
            stage.duration_s = time.monotonic() - started
            self._say(describe_stage(stage))

    def _watch(self, stage: Stage) -> None:
        if self._monitor is None:
            stage.facts["monitor"] = "off (quality.enabled = false)"
            return
        report = self._monitor.before()
        stage.num_done = len(report.measurement.losses)
        stage.facts = _losses(report.measurement)
        if not report.may_go_on:
            raise _Ended(f"worse than when it was last good: {describe_breaches(report)}", 1)
        self._guard = self._monitor.guard()

    def _resume(self, stage: Stage) -> None:
        if num_forgotten := self._batches.forget():
            stage.facts["forgotten"] = num_forgotten
        self._count(stage, self._batches.resume(self._guard))

    def _read(self, stage: Stage) -> None:
        noticed = notice(self._config, self._store)
        both = (noticed.flagged, noticed.followed)
        flagged, followed = (taken.added.total() for taken in both)
        stage.num_done = flagged + followed
        stage.facts = {
            "conversations": sum(taken.num_conversations for taken in both),
            "flagged": flagged,
            "followed": followed,
            "broken": sum(taken.broken.total() for taken in both),
        }
        for taken in both:
            for one in taken.first_broken.values():
                log.warning("%s: %s", one.source, one.message)

    def _look_back(self, stage: Stage) -> None:
        counts = look_back(self._store, self._model, stop=self._stop)
        stage.num_done = counts.num_scored
        stage.facts = {"scored": counts.num_scored, **counts.facts}
        if counts.num_away:  # they stay candidates
            stage.problem = counts.problem
            self._report.exit_code = NotReady.exit_code

    def _judge(self, stage: Stage) -> None:
        if not self._config.judge.enabled:
            stage.facts["judge"] = "off (judge.enabled = false)"
            return
        counts = judge(self._moments, self._other, self._config.judge)
        stage.num_done = counts.num_judged
        stage.facts = {"to learn": counts.num_to_learn, "to skip": counts.num_to_skip}
        for name in ("num_dropped", "num_refused", "num_away"):
            if num := getattr(counts, name):
                stage.facts[name.removeprefix("num_")] = num
        if counts.num_away:  # they wait for the next night
            stage.problem = counts.problem
            self._report.exit_code = NotReady.exit_code

    def _score(self, stage: Stage) -> None:
        better = check_better(self._store, self._model, self._stop)
        if better.num_set_aside:
            stage.facts["better answers set aside"] = better.num_set_aside
        if self._is_auto:
            approved = approve_confident(
                self._moments, self._config.curation.auto_confidence, only_judged=self._config.judge.enabled
            )
            stage.facts["approved"] = len(approved)
        # Of all that may be trained, also what has a score of an earlier day: the model has learned since.
        counts = score(self._moments, self._model, self._moments.list("approved"))
        stage.num_done = counts.num_scored
        stage.facts["scored"] = counts.num_scored
        if counts.num_refused:
            stage.facts["refused"] = counts.num_refused
        if counts.num_away:
            raise NotReady(counts.problem or "the served model is away")

    def _dream(self, stage: Stage) -> None:
        paths = [Path(path) for path in self._config.dream.seeds]
        if not paths or not self._config.judge.enabled:
            stage.facts["dreams"] = "none: " + ("no seeds" if not paths else "no judge")
            return
        found = list(read_seeds(paths, max_record_bytes=self._config.curation.max_record_bytes))
        seeds = [one for one in found if isinstance(one, Seed)]
        for one in found:
            if isinstance(one, Broken):
                log.warning("%s: %s", one.source, one.message)
        with open_bridge(
            self._config, self._store, self._batches, each=self._guard, stop=self._stop
        ) as bridge:
            night = dreaming.dream(seeds, bridge, stop=self._stop)
        stage.num_done = night.num_dreams
        stage.facts = {
            "seeds": len(night.seeds),
            "held": night.num_seeds("held"),
            "good": night.num_good,
            "bad": night.num_bad,
            "trained": night.num_trained,
        }
        if night.ended_by == "stopped":
            raise _Ended(night.ended, 1)
        if night.ended_by == "away":  # the judge, perhaps: what is approved can be trained all the same
            stage.problem = night.ended
            self._report.exit_code = NotReady.exit_code

    def _train(self, stage: Stage) -> None:
        """All tiers, direct too: what was approved since it last trained waits for nobody."""
        for tier in TIERS:
            for _ in range(MAX_JOBS):
                choice = self._learning.choose(tier)
                if self._monitor is not None and (overlap := self._monitor.find_overlap(choice.chosen)):
                    for moment in overlap:
                        reason = "it is in the held-out set"
                        self._moments.change(moment.moment_id, state="dropped", decided_reason=reason)
                    continue
                if not choice.chosen or self._stop():
                    for reason, moments in choice.left.items():
                        name = f"left, {reason}"
                        stage.facts[name] = stage.facts.get(name, 0) + len(moments)
                    break
                self._count(stage, [self._batches.train(tier, choice.chosen, self._guard)])

    def _count(self, stage: Stage, batches: list[TrainingBatch]) -> None:
        """Raises _Ended where the quality monitor stopped one."""
        for batch in batches:
            stage.num_done += batch.num_trained
            stage.facts["jobs"] = stage.facts.get("jobs", 0) + 1
            stage.facts[batch.tier] = stage.facts.get(batch.tier, 0) + batch.num_trained
            if batch.num_held:
                stage.facts["answers held"] = stage.facts.get("answers held", 0) + batch.num_held
            if batch.state == "failed":
                self._report.exit_code = ApolloError.exit_code
                stage.facts["failed"] = stage.facts.get("failed", 0) + 1
                log.error("batch %s failed: %s", batch.batch_id, batch.error)
            if batch.state == "stopped":
                raise _Ended(f"the quality monitor stopped batch {batch.batch_id}: {batch.error}", 1)

    def _watch_again(self, stage: Stage) -> None:
        if self._monitor is None or self._monitor.baseline is None:
            return
        report = self._monitor.after()
        stage.num_done = len(report.measurement.losses)
        stage.facts = _losses(report.measurement)
        if report.restored_version is not None:
            stage.facts["restored version"] = report.restored_version
            stage.facts["batches undone"] = len(report.undone)
        if not report.ok:
            raise _Ended(describe_breaches(report), 1)

    def _checkpoint(self, stage: Stage) -> None:
        sync = self._training.sync()
        stage.num_done = sync.weight_version
        stage.facts = {"weight version": sync.weight_version, "tensors changed": sync.num_tensors_changed}

    def _write(self, stage: Stage) -> None:
        directory = self._config.state_dir / "reports"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = time.strftime("night-%Y%m%d-%H%M%S", time.localtime(self._report.started_at))
        html = directory / f"{name}.html"
        write_html(html, self._store)
        self._report.html = str(html)
        stage.num_done = 1
        (directory / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(self._report)))


def describe_stage(stage: Stage) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in stage.facts.items())
    parts = [f"{stage.name}: {facts or stage.num_done}", *([stage.problem] if stage.problem else [])]
    return f"{'; '.join(parts)} ({stage.duration_s:.1f} s)"


def _losses(measurement: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        name: "-" if loss.loss is None else round(loss.loss, 4) for name, loss in measurement.losses.items()
    }
    if measurement.canaries:
        facts["canaries"] = f"{measurement.num_passed} of {len(measurement.canaries)}"
    return facts
