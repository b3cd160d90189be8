"""One check: the held-out set and the canaries measured, held against an earlier time, kept and logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import msgspec

from apollo_curation.chat_client import ChatClient, ModelAway
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.announce import announce_breaches
from apollo_curation.quality.canaries import ask_all, load_canaries
from apollo_curation.quality.heldout import load_heldout
from apollo_curation.quality.history import Breach, Label, Measurement, QualityHistory
from apollo_curation.quality.measure import measure_losses
from apollo_curation.quality.thresholds import find_breaches, find_drift
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batch_table import BatchTable, TrainingBatch

log = logging.getLogger("apollo_curation.quality")


class QualityReport(msgspec.Struct, frozen=True):
    """What a check found and what followed. measurement: the last one, so after a restore the one that shows
    that the loss is back; breaches: of the one that led to it.

    drift: see find_drift. overlap: moments that are in the held-out set, and so tell nothing about it any
    more. restored_version: brought back as weight version restored_as; restore_error: why it was not.
    undone: batches whose effect went with it.
    """

    measurement: Measurement
    against: Measurement | None
    breaches: list[Breach] = []
    drift: dict[str, float] = {}
    overlap: list[str] = []
    restored_version: int | None = None
    restored_as: int | None = None
    restore_error: str | None = None
    undone: list[str] = []

    @property
    def ok(self) -> bool:
        return not self.breaches

    @property
    def may_go_on(self) -> bool:
        """Whether more may be trained: all is well, or is well again."""
        return self.ok or (self.restored_as is not None and self.measurement.ok)


class Checker:
    """judge: None where nobody judges. Raises ConfigError for a wrong held-out set or wrong canaries."""

    def __init__(
        self,
        config: CurationConfig,
        store: Store,
        model: ChatClient,
        judge: ChatClient | None,
        training: TrainClient,
    ):
        self._config, self.quality = config, config.quality
        self.held_out = load_heldout(config.quality.heldout)
        self.canaries = load_canaries(config.quality.canaries)
        self.history = QualityHistory(store)
        self._batches = BatchTable(store)
        self._moments = Moments(store)
        self._judge_max_tokens = config.judge.max_tokens
        self._model, self._judge, self._training = model, judge, training

    def check(
        self,
        label: Label,
        against: Measurement | None,
        *,
        job_id: str | None = None,
        durable_version: int | None = None,
        restored_version: int | None = None,
    ) -> QualityReport:
        """Of the weights that are served while it runs. Raises ModelAway, ServerRefused."""
        earlier = self.history.list()
        at, started = time.time(), time.monotonic()
        measurement = Measurement(
            label=label,
            at=at,
            duration_s=0.0,
            weight_version=self._weight_version(),
            losses=measure_losses(self.held_out, self._model),
            canaries=ask_all(
                self.canaries,
                self._model,
                self._judge,
                max_tokens=self.quality.max_tokens,
                judge_max_tokens=self._judge_max_tokens,
            ),
            batch_ids=[batch.batch_id for batch in self.batches_since(earlier[-1].at if earlier else 0.0)],
            durable_version=durable_version,
            job_id=job_id,
            against=against.measurement_id if against else None,
            restored_version=restored_version,
        )
        breaches = find_breaches(measurement, against, self.quality)
        measurement = self.history.add(
            msgspec.structs.replace(measurement, breaches=breaches, duration_s=time.monotonic() - started)
        )
        announce_breaches(self._config, self.history)
        trained = self._moments.list("approved", "training", "trained")
        overlap = [moment.moment_id for moment in self.find_overlap(trained)]
        report = QualityReport(measurement, against, breaches, find_drift(measurement, earlier), overlap)
        self._log(report)
        return report

    def find_overlap(self, moments: Iterable[Moment]) -> list[Moment]:
        return [one for one in moments if one.answer is not None and self.held_out.contains(one.example())]

    def batches_since(self, at: float) -> list[TrainingBatch]:
        """Those that may have changed the weights after `at`: ended since, or under way."""
        return [batch for batch in self._batches.list() if batch.ended_at is None or batch.ended_at > at]

    def _weight_version(self) -> int | None:
        try:
            return self._training.status()["weight_version"]
        except ModelAway as error:
            log.warning("quality: the weight version is not known: %s", error.message)
            return None

    def _log(self, report: QualityReport) -> None:
        one = report.measurement
        losses = ", ".join(
            f"{name} {'-' if loss.loss is None else f'{loss.loss:.4f}'}" for name, loss in one.losses.items()
        )
        log.info(
            "quality %s, weight version %s: held-out loss %s (nats a token); canaries %d of %d passed, "
            "%d not judged; %.1f s",
            *(one.label, one.weight_version, losses, one.num_passed, len(one.canaries)),
            *(one.num_not_judged, one.duration_s),
        )
        for breach in report.breaches:
            log.error("quality: %s", breach.sentence)
        for category, share in report.drift.items():
            if share > self.quality.max_loss_increase:
                log.warning(
                    "quality: the loss of %s is %.1f %% higher than when it was first measured",
                    *(category, 100 * share),
                )
        if report.overlap:
            log.warning(
                "quality: %d moments are in the held-out set and should not be trained: %s",
                *(len(report.overlap), ", ".join(report.overlap[:5])),
            )
