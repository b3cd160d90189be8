"""The steps of one dream, whoever dreams it: respond, judge, improve, learn.

Each is kept as soon as it is done: a run that dies goes on where it was, and nothing is trained twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from apollo_curation.chat_client import ChatClient, ServerRefused, judging, learner
from apollo_curation.dreams.judge import Dreamer, NoAnswer
from apollo_curation.dreams.table import Dream, Dreams
from apollo_curation.moments.moments import Moment, Moments, identify
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store
from apollo_curation.training.batch_table import TrainingBatch
from apollo_curation.training.batches import Batches, Each, NothingToTrain, StopTraining, ignore
from apollo_ipc.errors import NotReady

Train = Callable[[list[Moment]], TrainingBatch]  # `Batches.train` of the tier `dream`


class TrainingStopped(Exception):
    """The quality monitor, or a person, ended the training: nothing more is to be trained in this run."""


@dataclass
class Bridge:
    """train: trains approved moments of the tier `dream`, waits, and settles their states."""

    dreams: Dreams
    moments: Moments
    learner: ChatClient
    dreamer: Dreamer
    train: Train
    config: CurationConfig

    def respond(self, dream: Dream) -> Dream:
        """With the learner's response. Raises NoAnswer where the server refuses this situation, and as
        ChatClient.chat does."""
        own = self.config.dream
        try:
            answer = self.learner.answer(
                dream.situation, max_tokens=own.max_tokens, temperature=own.temperature
            )
        except ServerRefused as error:
            if not error.is_of_this_request:
                raise
            raise NoAnswer(f"the server refused the situation: {error.said}") from None
        return self.dreams.change(dream, response=answer.message, is_cut_off=answer.is_cut_off)

    def judge(self, dream: Dream) -> Dream:
        """Raises as Dreamer does."""
        verdict = self.dreamer.judge(dream)
        state = "good" if verdict.good else dream.state
        return self.dreams.change(dream, verdict=verdict, state=state)

    def improve(self, dream: Dream) -> Dream:
        """Raises as Dreamer does."""
        return self.dreams.change(dream, better=self.dreamer.improve(dream))

    def drop(self, dream: Dream, reason: str) -> Dream:
        return self.dreams.change(dream, state="dropped", reason=reason)

    def learn(self, dreams: Sequence[Dream]) -> list[Dream]:
        """The dreams, trained or failed. What an earlier run trained already is not trained again.

        Raises TrainingStopped, when what was done is kept; NotReady where server or worker are away, or a
        batch of another run is not settled.
        """
        done: list[Dream] = []
        at_once = self.config.tier_dream.max_examples
        for start in range(0, len(dreams), at_once):
            some = [self._with_moment(dream) for dream in dreams[start : start + at_once]]
            approved = [moment for dream in some if (moment := self._moment(dream)).state == "approved"]
            stopped: str | None = None
            try:
                batch = self.train(approved) if approved else None
                if batch is not None and batch.state == "stopped":
                    stopped = batch.error or "training was stopped"
            except StopTraining as stop:
                stopped = stop.reason
            except NothingToTrain:
                pass  # another process was faster; the moments say what became of them
            done += [self._settled(dream) for dream in some]
            if stopped is not None:
                raise TrainingStopped(stopped)
            if waiting := [dream for dream in done if dream.state in ("open", "good")]:
                raise NotReady(f"{len(waiting)} dreams wait for a batch that has not ended; try again later")
        return done

    def _with_moment(self, dream: Dream) -> Dream:
        moment = moment_of(dream)
        self.moments.add([moment])
        return self.dreams.change(dream, moment_id=identify(moment))

    def _moment(self, dream: Dream) -> Moment:
        assert dream.moment_id is not None
        return self.moments.get(dream.moment_id)

    def _settled(self, dream: Dream) -> Dream:
        """As its moment says that it went."""
        moment = self._moment(dream)
        match moment.state:
            case "trained" | "undone":
                return self.dreams.change(dream, state="trained", batch_id=moment.batch_id)
            case "approved" | "training":
                return dream
            case _:
                reason = moment.decided_reason or f"its moment is {moment.state}"
                return self.dreams.change(dream, state="failed", batch_id=moment.batch_id, reason=reason)


@contextmanager
def open_bridge(
    config: CurationConfig,
    store: Store,
    batches: Batches,
    *,
    each: Each = ignore,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Bridge]:
    """By the configuration. each: sees every job while it trains, and may raise StopTraining."""
    own, other = learner(config, stop), judging(config, stop)
    try:
        # Dreams are novel, so on_duplicate is never needed; with `skip` a moment that another process trained
        # in the meantime is not trained again.
        yield Bridge(
            dreams=Dreams(store),
            moments=Moments(store),
            learner=own,
            dreamer=Dreamer(other, config),
            train=lambda moments: batches.train("dream", moments, each),
            config=config,
        )
    finally:
        own.close()
        other.close()


def moment_of(dream: Dream) -> Moment:
    """What is learned from a dream: the response where it was good, the better one where it was not."""
    verdict = dream.verdict
    return Moment(
        kind="dream",
        tier="dream",
        context=dream.situation,
        answer=dream.learned,
        original=dream.response if dream.better else None,
        source=dream.source,
        topic=dream.topic,
        reason=verdict.reason if verdict else "",
        confidence=verdict.confidence if verdict else 1.0,
        lineage=dream.lineage,
        state="approved",
        decided_by="judge",
        decided_reason="dreamt",
    )
