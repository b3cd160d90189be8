"""What stands beside a bulk job: a measurement before, some during and one after, and the decision to stop.

before -> guard, while batches train -> after -> more of it
            `-> StopTraining              `-> nothing more; or restore, undo, measure again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from apollo_curation.chat_client import ChatClient, ModelAway
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.check import Checker, QualityReport, log
from apollo_curation.quality.history import Breach, Label, Measurement
from apollo_curation.quality.thresholds import find_drift
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches, StopTraining
from apollo_ipc.errors import ApolloError, ConfigError, NotReady
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo

MIN_HISTORY = 1  # older versions: a sync may come between the reference's own and the pin that holds it

__all__ = ["Monitor", "QualityReport"]


class Monitor:
    """model: the one that learns; judge: None where no canary can be judged; clock: seconds, for the
    interval of checks. Raises ConfigError where the held-out set or the canaries are wrong.

    What later measurements of a night are held against is what `before` found, and does not move with them:
    many small losses in a night add up to one that is seen. Checks raise ModelAway and ServerRefused.
    """

    def __init__(
        self,
        config: CurationConfig,
        store: Store,
        model: ChatClient,
        judge: ChatClient | None,
        training: TrainClient,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.checker = Checker(config, store, model, judge, training)
        self.history = self.checker.history
        self.baseline: Measurement | None = None
        self._quality = config.quality
        self._num_restorable = config.checkpoint.history
        if config.quality.on_breach == "restore" and self._num_restorable < MIN_HISTORY:
            raise ConfigError(
                f"restoring needs older weights on disk: set checkpoint.history to {MIN_HISTORY} or more",
                field="quality.on_breach",
            )
        self._store, self._training, self._clock = store, training, clock
        self._batches = Batches(store, Moments(store), training, config)

    def before(self) -> QualityReport:
        """The reference of what is trained next, with its weights on disk so that they can come back.

        What a killed process left comes first: while a batch of it is open, its reference holds on (resume it
        under `guard`, then call `after`); where none is, what `after` would have done is done here. Where the
        weights are already worse than the last good ones, the report is not `may_go_on`, and no reference.
        """
        if (left := self._left_over()) is not None:
            if self._batches.table.open():
                log.info("quality: the reference is still measurement %d", left.measurement_id)
                return QualityReport(left, None, drift=find_drift(left, self.history.list()))
            report = self.after()
            if not report.may_go_on:
                return report
        durable_version = self._training.sync().weight_version
        good = self.history.last_good()
        report = self.checker.check("before", good, durable_version=durable_version)
        if report.ok:
            self.baseline = report.measurement
            self._pin(durable_version)
        else:
            log.error(
                "quality: nothing is trained on weights that are worse than those of measurement %s: restore "
                "an older version (`apollo-ipc checkpoint restore VERSION --live`) or take them as they are "
                "(`apollo-ipc quality check --accept`)",
                good.measurement_id if good else "-",
            )
        return report

    def guard(self) -> Callable[[JobInfo], None]:
        """For `each` of Batches.train and .resume, after `before`: measures every check_interval_s while the
        job trains, and raises StopTraining when a threshold is broken."""
        assert self.baseline is not None
        checked_at = self._clock()

        def check(job: JobInfo) -> None:
            nonlocal checked_at
            if job.state in ENDED_STATES or not job.steps_done:
                return
            if self._clock() - checked_at < self._quality.check_interval_s:
                return
            try:
                report = self.checker.check("during", self.baseline, job_id=job.job_id)
            except ModelAway as error:  # who waits for the job waits for the server; `after` measures anyway
                log.warning("quality: no check during job %s: %s", job.job_id, error.message)
                return
            finally:
                checked_at = self._clock()
            if not report.ok:
                self._note(report.measurement, action="stopped")
                raise StopTraining("; ".join(breach.sentence for breach in report.breaches))

        return check

    def after(self) -> QualityReport:
        """Of all that was trained since `before`; measured also where every job was short. On a breach, found
        now or by the guard, it acts as quality.on_breach says; a breach is reported, not raised."""
        assert self.baseline is not None
        found_before = self._breaches_of_guard()
        report = self.checker.check("after", self.baseline)
        report = msgspec.structs.replace(report, breaches=report.breaches or found_before)
        if report.ok:
            return report
        if self._quality.on_breach == "restore":
            return self._restore(report)
        log.error("quality: nothing more is trained; the weights stay as they are (on_breach = stop)")
        kept = self._note(report.measurement, breaches=report.breaches, action="stopped")
        return msgspec.structs.replace(report, measurement=kept)

    def check(self, label: Label = "scheduled") -> QualityReport:
        """As it is now, against the reference of this night or else the last good measurement. With the
        label `good` later ones are held against it, whatever it shows."""
        return self.checker.check(label, self.baseline or self.history.last_good())

    def find_overlap(self, moments: Iterable[Moment]) -> list[Moment]:
        """Those that are in the held-out set: they must not be trained."""
        return self.checker.find_overlap(moments)

    def _pin(self, version: int) -> None:
        """However many syncs a night has, its reference stays restorable; that of the last night goes."""
        try:
            self._training.pin(version)
        except ApolloError as error:
            log.warning(
                "quality: version %d could not be pinned (%s): it stays restorable for %d more syncs, as "
                "checkpoint.history says",
                *(version, error.message, self._num_restorable),
            )

    def _restore(self, report: QualityReport) -> QualityReport:
        """The reference's weights live again, its batches undone, and the proof of it measured."""
        assert self.baseline is not None
        version = self.baseline.durable_version
        assert version is not None
        measurement = self._note(report.measurement, breaches=report.breaches, action="restoring")
        try:
            result = self._training.restore(version)
        except ApolloError as error:
            log.error("quality: version %d was not restored: %s", version, error.message)
            if not isinstance(error, NotReady):  # else the next `before` tries it again
                measurement = self._note(measurement, action="not_restored")
            return msgspec.structs.replace(report, measurement=measurement, restore_error=error.message)
        with self._store.transaction():
            undone = self._undo_since(self.baseline.at)
            self._note(measurement, action="restored")
        log.warning(
            "quality: weight version %d restored live as %d, %d batches undone",
            *(version, result.weight_version, len(undone)),
        )
        again = self.checker.check(
            "restored", self.baseline, durable_version=result.weight_version, restored_version=version
        )
        # The pin has moved to this one, which holds the same weights.
        self.baseline = msgspec.structs.replace(self.baseline, durable_version=result.weight_version)
        return msgspec.structs.replace(
            again,
            breaches=report.breaches,
            restored_version=version,
            restored_as=result.weight_version,
            undone=undone,
        )

    def _left_over(self) -> Measurement | None:
        """The reference of a process that was killed before its `after` was through, taken up again."""
        history = self.history.list()
        last = next((one for one in reversed(history) if one.label in ("before", "after", "restored")), None)
        if last is None:
            return None
        if last.label == "after" and last.breaches and last.action in (None, "restoring"):
            left = next((one for one in history if one.measurement_id == last.against), None)
        else:
            is_open = last.label == "before" and last.ok and self.checker.batches_since(last.at)
            left = last if is_open else None
        is_ours = left and self.baseline and left.measurement_id == self.baseline.measurement_id
        if left is None or (is_ours and last.label == "before"):
            return None
        self.baseline = left
        return left

    def _breaches_of_guard(self) -> list[Breach]:
        """For which it stopped a job since the last decision, also before this process."""
        for one in reversed(self.history.list()):
            if one.label in ("before", "restored") or (one.label == "after" and one.action != "restoring"):
                return []
            if one.breaches and one.action in ("stopped", "restoring"):
                return one.breaches
        return []

    def _undo_since(self, at: float) -> list[str]:
        batches = [batch for batch in self.checker.batches_since(at) if not batch.is_open]
        ids = [batch.batch_id for batch in batches if batch.state != "undone"]
        self._batches.undo(ids)
        return ids

    def _note(self, measurement: Measurement, **changes: object) -> Measurement:
        return self.history.replace(msgspec.structs.replace(measurement, **changes))
