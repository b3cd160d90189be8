"""The dream loop: of each seed situations are dreamt until the learner answers novel ones well.

    imagine -> respond -> judge -> good: count it; num_variations good ones in a row: the pattern holds
                                -> bad:  improve -> train -> imagine a variation -> ...

A good response is not trained at once: the next situation would then test the training on the one before it,
not what the model is. Those of a seed are trained together when the seed ends, as one job. So `in a row`
means: novel situations answered well by weights into which nothing was trained in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from apollo_curation.dreams.bridge import Bridge, TrainingStopped
from apollo_curation.dreams.judge import Imagined, NoAnswer, NothingNew
from apollo_curation.dreams.night import Budget, EndedBy, Night, SeedResult, in_turn
from apollo_curation.dreams.seeds import Seed
from apollo_curation.dreams.table import Dream, SeedRecord, SeedState
from apollo_curation.lock import alone
from apollo_ipc.errors import NotReady, UserError

MAX_DROPPED = 3  # dreams of one seed in a row that come to nothing: it is left for the next run


class _LeaveSeed(Exception):
    """This seed stays open, for a reason of its own: the next one has its turn."""


class _EndNight(Exception):
    """The run is over; the seed is gone on with next time."""

    def __init__(self, by: EndedBy, reason: str):
        super().__init__(reason)
        self.by: EndedBy = by
        self.reason = reason


def dream(
    seeds: Iterable[Seed],
    bridge: Bridge,
    *,
    again: bool = False,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    each: Callable[[Dream], None] = lambda dream: None,
) -> Night:
    """Works through the seeds within config.dream's budgets. each: sees every dream that has ended.

    again: seeds that were held or given up are taken up anew. Batches that an earlier run left open must be
    resumed before (`Batches.resume`). Where learner, judge or trainer stay away, the run ends with what it
    has. Raises UserError where the judge is switched off, and ServerRefused where a server refuses us.
    """
    if not bridge.config.judge.enabled:
        raise UserError("dreams need a judge; switch it on", field="judge.enabled")
    with alone(bridge.config.state_dir / "curation.dream.lock", stop):
        return _dream(list(seeds), bridge, again, stop, clock, each)


def _dream(
    seeds: list[Seed],
    bridge: Bridge,
    again: bool,
    stop: Callable[[], bool],
    clock: Callable[[], float],
    each: Callable[[Dream], None],
) -> Night:
    night = Night()
    settings = bridge.config.dream
    budget = Budget(settings, stop, clock)
    turns = in_turn(seeds, bridge.dreams, again=again)
    night.num_skipped_seeds = len(seeds) - len(turns)
    for i, record in enumerate(turns):
        reason = f"max_seeds ({settings.max_seeds}) had their turn" if i == settings.max_seeds else None
        if reason := reason or budget.ended():
            night.ended, night.ended_by = reason, "budget"
            break
        if record.state != "open":
            record = bridge.dreams.take_up_again(record)
        run = _SeedRun(record, bridge, budget, night, each)
        try:
            run.run()
        except _EndNight as error:
            night.ended, night.ended_by = error.reason, error.by
            break
        finally:
            night.seeds.append(run.result())
            night.num_repeats = bridge.dreamer.num_repeats
    return night


class _SeedRun:
    """One seed's turn. All that decides is in the table: a run that died is gone on with."""

    def __init__(
        self, record: SeedRecord, bridge: Bridge, budget: Budget, night: Night, each: Callable[[Dream], None]
    ):
        self._bridge = bridge
        self._settings = bridge.config.dream
        self._budget = budget
        self._night = night
        self._each = each
        self._num_dreams = 0
        self._num_dropped = 0  # in a row
        self._record = bridge.dreams.keep_seed(msgspec.structs.replace(record, reason=""))
        self._seed = record.seed
        every = bridge.dreams.of_seed(self._seed.seed_id)
        self._earlier = [one.situation for one in every]
        self._dreams = [one for one in every if one.position > record.since]

    @property
    def num_rounds(self) -> int:
        return sum(dream.better is not None and dream.state == "trained" for dream in self._dreams)

    @property
    def num_held(self) -> int:
        """Situations answered well since the last one that was not."""
        num_held = 0
        for dream in self._dreams:
            if dream.verdict is not None:
                num_held = num_held + 1 if dream.verdict.good else 0
        return num_held

    def run(self) -> None:
        """Raises _EndNight."""
        try:
            while not self._has_ended():
                last = self._dreams[-1] if self._dreams else None
                dream = last if last is not None and last.state == "open" else self._imagine()
                if dream is not None:
                    self._carry_on(dream)
        except _LeaveSeed as error:
            self._keep("open", str(error))
        except TrainingStopped as error:
            self._keep("open", f"training was stopped: {error}")
            raise _EndNight("stopped", f"training was stopped: {error}") from None
        except NotReady as error:
            raise _EndNight("away", error.message) from None

    def result(self) -> SeedResult:
        record = self._record
        return SeedResult(
            self._seed.seed_id,
            self._seed.topic,
            record.state,
            record.reason,
            self._num_dreams,
            self.num_rounds,
        )

    def _has_ended(self) -> bool:
        if self.num_held >= self._settings.num_variations:
            self._learn_good_ones()
            self._keep("held", "")
            return True
        if self._dreams and self._dreams[-1].state == "bad":
            self._learn_good_ones()
            self._keep("given_up", f"answered badly after {self.num_rounds} rounds of training")
            return True
        return False

    def _imagine(self) -> Dream | None:
        """A new dream, kept; None where the dreamer had no usable one."""
        if reason := self._budget.ended():
            raise _EndNight("budget", reason)
        self._budget.take()
        self._num_dreams += 1
        self._night.num_dreams += 1
        parent = next((dream for dream in reversed(self._dreams) if dream.verdict is not None), None)
        try:
            if self._seed.situation is not None and not self._dreams:
                imagined = Imagined(self._seed.situation, self._seed.good)
            else:
                imagined = self._bridge.dreamer.imagine(
                    self._seed.text, parent.situation if parent else None, self._earlier
                )
        except NothingNew as error:
            raise _LeaveSeed(error.reason) from None
        except NoAnswer as error:
            self._count_dropped(error.reason)
            return None
        kept = self._bridge.dreams.add(
            Dream(
                seed_id=self._seed.seed_id,
                situation=imagined.situation,
                lesson=self._seed.text,
                good=imagined.good,
                topic=self._seed.topic,
                source=self._seed.source,
                round=self.num_rounds,
                ancestors=[*parent.ancestors, parent.dream_id] if parent else [],
            )
        )
        self._earlier.append(kept.situation)
        self._dreams.append(kept)
        return kept

    def _carry_on(self, dream: Dream) -> None:
        """From wherever the dream is to its end."""
        bridge = self._bridge
        try:
            if dream.response is None:
                dream = self._note(bridge.respond(dream))
            if dream.verdict is None:
                dream = self._note(bridge.judge(dream))
                good = dream.state == "good"
                self._night.num_good += good
                self._night.num_bad += not good
            if dream.state == "open" and dream.better is None:
                if self.num_rounds >= self._settings.max_rounds:
                    reason = "no round of training is left"
                    dream = self._note(bridge.dreams.change(dream, state="bad", reason=reason))
                else:
                    dream = self._note(bridge.improve(dream))
        except NoAnswer as error:
            self._each(self._note(bridge.drop(dream, error.reason)))
            self._count_dropped(error.reason)
            return
        self._num_dropped = 0
        if dream.state == "open":
            dream = self._learn([dream])[0]
        self._each(dream)
        if dream.state == "failed":
            raise _LeaveSeed(f"training failed: {dream.reason}")

    def _learn_good_ones(self) -> None:
        """That a job of good responses fails is no fault of the pattern, which holds all the same."""
        if good := [dream for dream in self._dreams if dream.state == "good"]:
            self._learn(good)

    def _learn(self, dreams: list[Dream]) -> list[Dream]:
        try:
            done = self._bridge.learn(dreams)
        finally:
            every = self._bridge.dreams.of_seed(self._seed.seed_id, self._record.since)
            before = {dream.dream_id: dream.state for dream in self._dreams}
            changed = [dream for dream in every if before.get(dream.dream_id) != dream.state]
            self._night.num_trained += sum(dream.state == "trained" for dream in changed)
            self._night.num_failed += sum(dream.state == "failed" for dream in changed)
            self._dreams = every
        return done

    def _note(self, dream: Dream) -> Dream:
        """The newest dream, as it is now."""
        self._dreams[-1] = dream
        return dream

    def _count_dropped(self, reason: str) -> None:
        self._night.num_dropped += 1
        self._num_dropped += 1
        if self._num_dropped >= MAX_DROPPED:
            raise _LeaveSeed(f"{MAX_DROPPED} dreams in a row came to nothing, the last because {reason}")

    def _keep(self, state: SeedState, reason: str) -> None:
        changed = msgspec.structs.replace(self._record, state=state, reason=reason)
        self._record = self._bridge.dreams.keep_seed(changed)
