"""When each tier trains: as soon as something is approved, once nobody asks the model, or at night.

A job that runs is not stopped when somebody comes: the worker trains at idle priority and gives way itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import msgspec

from apollo_curation.chat_client import ChatClient
from apollo_curation.moments.moments import Moments
from apollo_curation.settings import CurationConfig, TierName
from apollo_curation.store import Store
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches, Each, NothingToTrain, TrainingBatch, ignore
from apollo_curation.training.choose import Choice, choose
from apollo_curation.training.idle import Idleness
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.replies import ENDED_STATES, JobInfo, SyncResult

TIERS: tuple[TierName, ...] = ("direct", "dream", "bootstrap")  # in the order in which they take their turn
POLL_S = 2.0  # between two looks at the store and at vLLM's metrics
CHOOSE_AGAIN_S = 60.0  # what was left is looked at again after so long: the window may have moved on


class Trained(msgspec.Struct, frozen=True):
    """One turn of a tier. batch: None where nothing was chosen; sync: the checkpoint after a nightly one."""

    tier: TierName
    choice: Choice
    batch: TrainingBatch | None = None
    sync: SyncResult | None = None


class Learning:
    """The parts that a turn needs; the caller opens and closes them. model: the one that learns."""

    def __init__(
        self,
        store: Store,
        moments: Moments,
        batches: Batches,
        training: TrainClient,
        config: CurationConfig,
        model: ChatClient,
    ):
        self.store = store
        self.moments = moments
        self.batches = batches
        self.training = training
        self.config = config
        self.model = model

    def choose(self, tier: TierName, limit: int | None = None) -> Choice:
        approved = self.moments.list("approved", tier=tier)
        return choose(approved, self.store, tier, self.config, time.time(), limit=limit)

    def train(self, tier: TierName, limit: int | None = None, each: Each = ignore) -> Trained:
        """Chooses and trains one batch of a tier, now. After one of a nightly tier the weights are written to
        disk; when that is due for the others, the worker's own policy says ([checkpoint]).

        Raises as Batches.train does, and whatever a checkpoint that fails raises.
        """
        choice = self.choose(tier, limit)
        if not choice.chosen:
            return Trained(tier, choice)
        try:
            batch = self.batches.train(tier, choice.chosen, each)
        except NothingToTrain:  # somebody decided otherwise while we chose
            return Trained(tier, choice)
        is_nightly = self.config.tier(tier).when == "nightly"
        sync = self.training.sync() if is_nightly and batch.state == "trained" else None
        return Trained(tier, choice, batch, sync)


@contextmanager
def unwatched() -> Iterator[Each]:
    yield ignore


class _Leave(Exception):
    """We are asked to end while a job runs: it goes on without us, `resume` settles it."""


def run(
    learning: Learning,
    idleness: Idleness,
    tiers: Sequence[TierName] = TIERS,
    stop: Callable[[], bool] = lambda: False,
    *,
    watch: Callable[[], AbstractContextManager[Each]] = unwatched,
    on_batch: Callable[[TrainingBatch], None] = lambda batch: None,
    on_away: Callable[[NotReady], None] = lambda error: None,
) -> None:
    """Trains the continuous and idle ones of `tiers` until `stop()`; nightly tiers wait for `curate night`.

    First, and whenever a server was away, what was left open is gone on with. A server that is away is waited
    for without end, and said to `on_away`. A job that runs when `stop()` becomes true is left to `resume`: it
    is not cancelled. Raises UserError where the server refuses us as a whole (key, no /train, no metrics).
    watch: opened around whatever is trained; what it yields sees each job, and may raise StopTraining, which
    ends one batch; what it raises itself ends the loop.
    """

    def followed(each: Each) -> Each:
        def follow(job: JobInfo) -> None:
            each(job)
            if stop() and job.state not in ENDED_STATES:
                raise _Leave

        return follow

    waiting = _Waiting()
    learning.batches.forget()
    while not stop():
        try:
            if learning.batches.table.open():
                with watch() as each:
                    for batch in learning.batches.resume(followed(each)):
                        on_batch(batch)
            has_trained = False
            for tier in tiers:
                if stop() or not _is_due(learning, tier, idleness, waiting):
                    continue
                choice = learning.choose(tier)
                if not choice.chosen:
                    waiting.remember(tier, choice)
                    continue
                with watch() as each:
                    done = learning.train(tier, each=followed(each))
                    if done.batch is None:
                        continue
                    has_trained = True
                    on_batch(done.batch)
                learning.batches.forget()
        except NotReady as error:
            if stop():
                return
            on_away(error)
            has_trained = False
        except _Leave:
            return
        if not has_trained:
            _sleep(POLL_S, stop)


class _Waiting:
    """Moments of which none could be chosen lately: choosing among them at each look would be in vain."""

    def __init__(self) -> None:
        self._seen: dict[TierName, tuple[frozenset[str], float]] = {}

    def remember(self, tier: TierName, choice: Choice) -> None:
        ids = frozenset(moment.moment_id for left in choice.left.values() for moment in left)
        self._seen[tier] = (ids, time.monotonic())

    def is_only(self, tier: TierName, ids: frozenset[str]) -> bool:
        seen, at = self._seen.get(tier, (frozenset[str](), 0.0))
        return ids == seen and time.monotonic() - at < CHOOSE_AGAIN_S


def _is_due(learning: Learning, tier: TierName, idleness: Idleness, waiting: _Waiting) -> bool:
    when = learning.config.tier(tier).when
    # Each look counts for the time that nobody has asked, also while nothing is there to train.
    if when == "nightly" or (when == "idle" and not idleness.is_idle()):
        return False
    ids = frozenset(moment.moment_id for moment in learning.moments.list("approved", tier=tier))
    return bool(ids) and not waiting.is_only(tier, ids)


def _sleep(duration_s: float, stop: Callable[[], bool]) -> None:
    until = time.monotonic() + duration_s
    while (left_s := until - time.monotonic()) > 0 and not stop():
        time.sleep(min(0.2, left_s))
