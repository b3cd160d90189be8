"""Training that is watched outside of a night as well, wherever a held-out set is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from apollo_curation.chat_client import ChatClient, judging, learner
from apollo_curation.quality.monitor import Monitor, QualityReport
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Each, ignore
from apollo_ipc.errors import ApolloError


class QualityBroken(ApolloError):
    """The model is worse than quality allows; the message holds the numbers, and what was done about it."""

    code = "quality_broken"


@contextmanager
def watched(
    config: CurationConfig, store: Store, training: TrainClient, stop: Callable[[], bool] = lambda: False
) -> Iterator[Each]:
    """`each` for what is trained within: measured before, during and after, as quality.* says.

    Without quality.heldout, or with quality.enabled = false, nothing is. Raises QualityBroken before anything
    is trained or after; where the block raises, the next one that watches makes up for it.
    """
    with closing(learner(config, stop)) as model, closing(judging(config, stop)) as other:
        judge = other if config.judge.enabled else None
        with Watching(config, store, model, judge, training).turn() as each:
            yield each


class Watching:
    """Of a loop of small jobs: measured before the first one and after each, against the same reference for
    curation.window_s, so that many small losses add up to one that is seen. A breach of a job brings back the
    reference, as quality.on_breach says.

    model: the one that learns; judge: None where no canary can be judged.
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
        is_on = config.quality.enabled and bool(config.quality.heldout)
        self._monitor = Monitor(config, store, model, judge, training) if is_on else None
        self._window_s, self._clock = config.curation.window_s, clock
        self._since: float | None = None  # None: no reference stands

    @contextmanager
    def turn(self) -> Iterator[Each]:
        """`each` for what is trained within. Raises QualityBroken, before anything is trained or after; where
        the block raises, or the server is away, the next turn makes up for it."""
        if self._monitor is None:
            yield ignore
            return
        since, self._since = self._since, None
        if since is None or self._clock() - since >= self._window_s:
            self._monitor.baseline = None  # so that `before` sees what a turn that raised has left
            before = self._monitor.before()
            if not before.may_go_on:
                raise QualityBroken(f"worse than when it was last good: {describe_breaches(before)}")
            since = self._clock()
        yield self._monitor.guard()
        after = self._monitor.after()
        if not after.ok:
            raise QualityBroken(describe_breaches(after))
        self._since = since


def describe_breaches(report: QualityReport) -> str:
    parts = [breach.sentence for breach in report.breaches] or ["no reason was kept"]
    if report.restored_as is not None:
        parts.append(f"weight version {report.restored_version} is restored as {report.restored_as}")
    elif report.restore_error is not None:
        parts.append(f"version not restored: {report.restore_error}")
    return "; ".join(parts)
