"""Batches: moments of one tier that become one training job, each trained once whatever dies on the way.

The batch, with the exact request, and its moments' state `training` are written in one transaction before
anything is sent. The batch's id is the job's idempotency key, so the server keeps what became of it: whoever
goes on with an open batch sends it again, and gets the same job. What the job came to is written in one
transaction too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from apollo_curation.chat_client import ServerRefused
from apollo_curation.lock import alone
from apollo_curation.moments.moments import Moment, Moments, State
from apollo_curation.settings import CurationConfig, TierName
from apollo_curation.store import Store
from apollo_curation.teach.job import OwnAnswer
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batch_table import BatchTable, TrainingBatch, new_batch_id
from apollo_curation.training.replay import Replay, held_in, held_request, is_held
from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.wire.replies import JobInfo
from apollo_ipc.wire.requests import TrainOptions, TrainRequest

Each = Callable[[JobInfo], None]

MAX_ATTEMPTS = 3  # at what the server answers with a defect of its own, or forgets
RETRY_S = 2.0

_EXAMPLE = re.compile(r"examples\[(\d+)\]")
# No fault of the request: our key, a server without /train, a body that got stuck on its way.
_NOT_OF_REQUEST = (401, 403, 404, 405, 408)


class StopTraining(Exception):
    """Raised by `each`: the job is cancelled. reason: a sentence for the batch and its moments."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class NothingToTrain(UserError):
    """None of the moments is approved (any more) and teaches something."""

    code = "nothing_to_train"


def ignore(job: JobInfo) -> None:
    pass


class Batches:
    """Trains moments, one batch at a time on this machine's state directory: another process waits.

    replay: what is held beside the moments, of tiers with `hold`; None for who does not train.
    stop: asked while waiting for that other process; when it answers true, NotReady is raised.
    `train` and `resume` raise ModelAway where the server stays away for curation.patience_s, and
    ServerRefused where it does not take our key or has no /train. A batch then stays open, and `resume`
    goes on with it; where what is to be held could not be asked, there is none yet and its moments wait.
    """

    def __init__(
        self,
        store: Store,
        moments: Moments,
        training: TrainClient,
        config: CurationConfig,
        stop: Callable[[], bool] = lambda: False,
        replay: Replay | None = None,
    ):
        self.table = BatchTable(store)
        self._replay = replay
        self._store = store
        self._moments = moments
        self._training = training
        self._config = config
        self._lock = config.state_dir / "curation.train.lock"  # every open batch is one that somebody left
        self._stop = stop

    def train(
        self,
        tier: TierName,
        moments: Sequence[Moment],
        each: Each = ignore,
    ) -> TrainingBatch:
        """Trains those of `moments` that are still approved, as they now are in the store, and waits for it.

        each: sees the job now and then; it may raise StopTraining. Whatever else it raises leaves the job
        running and the batch open. An example that the worker has in its weights already is left out.

        The result has ended. Where the server refused examples, their moments are dropped with its words,
        and the result is the batch of the rest. Raises NothingToTrain.
        """
        ids = list(dict.fromkeys(moment.moment_id for moment in moments))
        with alone(self._lock, self._stop):
            batch = self._prepare(tier, ids, "approved", self._ask(tier, ids))
            if batch is None:
                raise NothingToTrain("none of these moments is approved and has an answer")
            return self._finish(batch, each)

    def resume(self, each: Each = ignore) -> list[TrainingBatch]:
        """Goes on with every open batch, the oldest first, and returns them as they ended."""
        with alone(self._lock, self._stop):
            return [self._finish(batch, each) for batch in self.table.open()]

    def undo(self, batch_ids: Iterable[str]) -> None:
        """These batches and their moments become `undone`: an older version of the weights came back.

        Raises NotFound; UserError, and changes nothing, where one of them is still open.
        """
        with self._store.transaction():
            for batch_id in batch_ids:
                batch = self.table.get(batch_id)
                if batch.is_open:
                    raise UserError(f"{batch_id} is still being trained; wait for it, or cancel its job")
                self.table.change(batch_id, state="undone")
                self._move(batch, "undone", batch.error, expected=("trained", "failed"))

    def forget(self) -> int:
        """Drops the texts of what ended more than worker.keep_examples_s ago: requests of batches, moments of
        these, and moments that were rejected or dropped. What became of them stays, and a digest by which
        equal content is known. Returns the number of moments."""
        before = time.time() - self._config.worker.keep_examples_s
        with self._store.transaction():
            old = [
                moment
                for batch_id in self.table.forget_requests(before)
                for moment in self._moments.of_batch(batch_id)
                if moment.state in ("trained", "undone", "failed")
            ]
            old += self._moments.set_aside(before)
            for moment in old:
                self._moments.forget(moment)
        return len(old)

    def _ask(self, tier: TierName, ids: Sequence[str]) -> list[OwnAnswer]:
        """What is to be held beside these, by the weights that are served now. Asked outside of any
        transaction: it may take minutes."""
        own, some = self._config.tier(tier), self._trainable(ids, "approved")
        if not own.hold or not some or some[0].moves_away:
            return []
        assert self._replay is not None
        return self._replay.ask([one.example() for one in some], own, _seed(some))

    def _trainable(self, ids: Sequence[str], expected: State) -> list[Moment]:
        taken: list[Moment] = []
        for moment in map(self._moments.get, ids):
            is_alike = not taken or moment.moves_away == taken[0].moves_away  # a job has one loss
            if moment.state == expected and moment.teaches and is_alike:
                taken.append(moment)
        return taken

    def _prepare(
        self, tier: TierName, ids: Sequence[str], expected: State, held: Sequence[OwnAnswer]
    ) -> TrainingBatch | None:
        """Nothing of it has been sent yet. held: what stands beside its moments. None where no moment is left
        to train."""
        batch_id, own = new_batch_id(), self._config.tier(tier)
        with self._store.transaction():
            taken = self._trainable(ids, expected)
            if not taken:
                return None
            moves_away = taken[0].moves_away  # by a loss of its own, with which nothing else can be trained
            if expected == "approved" and own.hold and not moves_away and not held:
                raise NotReady("these moments were changed while the model was asked what to hold; try again")
            for moment in taken:
                self._moments.change(moment.moment_id, state="training", batch_id=batch_id)
            examples = [one.example() for one in taken]
            if held and own.hold and not moves_away:
                return self.table.add(tier, taken, held_request(examples, held, own, _seed(taken)), batch_id)
            options = TrainOptions(
                lr=own.lr,
                # Once is enough: four passes took a wrong answer from 1.7 to 15 nats a token (docs/log.md).
                epochs=1 if moves_away else own.epochs,
                schedule=own.schedule,
                on_duplicate="skip",
            )
            return self.table.add(tier, taken, TrainRequest(examples, options), batch_id)

    def _finish(self, batch: TrainingBatch, each: Each) -> TrainingBatch:
        """From wherever the batch is to its end."""
        num_lost = 0
        while batch.is_open:
            batch, job_id = self._submit(batch)
            if job_id is None:
                continue
            try:
                return self._settle(batch, self._follow(batch, job_id, each))
            except ServerRefused as error:
                if error.code != "not_found":
                    raise
            num_lost += 1  # its queue was lost, and with it whether this was trained
            if num_lost == MAX_ATTEMPTS:
                return self._end(batch, "failed", f"the server forgot the job {num_lost} times")
        return batch

    def _submit(self, batch: TrainingBatch) -> tuple[TrainingBatch, str | None]:
        """The batch and its job, the same one as often as it is sent; without a job where the server refuses
        it: the batch has failed, or is another one without the example that was refused."""
        request = self.table.request(batch.batch_id)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return batch, self._training.submit(request, batch.batch_id)
            except ServerRefused as error:
                if error.status in _NOT_OF_REQUEST:
                    raise
                found = _EXAMPLE.match(error.field or "") if error.status == 400 else None
                if found and int(found[1]) < len(request.examples):
                    return self._without(batch, request, int(found[1]), error.said), None
                if error.code == "conflict":
                    said = (
                        f"the server knows the key {batch.batch_id} with another request, and may have "
                        "trained that: see `apollo-ipc jobs --json` before you approve these again. It said: "
                        f"{error.said}"
                    )
                    return self._end(batch, "failed", said), None
                if error.status < 500 or attempt == MAX_ATTEMPTS:
                    return self._end(batch, "failed", error.said), None
                time.sleep(RETRY_S)  # a defect may be a passing one
        raise AssertionError("the last attempt returns")

    def _without(self, batch: TrainingBatch, request: TrainRequest, at: int, said: str) -> TrainingBatch:
        """The moment of example number `at` is dropped, or an answer that was to be held beside; the rest is
        a batch, and so a key, of its own."""
        bad, held = request.examples[at], held_in(request)
        with self._store.transaction():
            rest = list(batch.moment_ids)
            if is_held(bad):
                held = [one for one in held if one.context_ids != bad.context_ids]
                if not held:
                    return self._end(batch, "failed", f"none of the answers to be held was taken: {said}")
            else:
                refused = next((one for one in rest if self._moments.get(one).example() == bad), None)
                if refused is None:  # edited since: nobody knows whose it was
                    return self._end(batch, "failed", said)
                rest.remove(refused)
                reason = f"not trainable: {said}"
                self._moments.change(refused, state="dropped", decided_by="rule", decided_reason=reason)
            after = self._prepare(batch.tier, rest, "training", held)
            if after is None:
                return self._end(batch, "failed", said)
            self.table.remove(batch.batch_id)
        return after

    def _follow(self, batch: TrainingBatch, job_id: str, each: Each) -> JobInfo:
        """The job when it has ended. A stop is written before it is asked for, so that it holds."""
        try:
            if batch.error is None:
                return self._training.wait(job_id, each)
        except StopTraining as stop:
            self.table.change(batch.batch_id, error=stop.reason)
        self._training.cancel(job_id)
        return self._training.wait(job_id)

    def _settle(self, batch: TrainingBatch, job: JobInfo) -> TrainingBatch:
        """What the job came to, in the batch and in its moments."""
        with self._store.transaction():
            batch = self.table.change(batch.batch_id, job=job)
            reason = batch.error  # of a stop
            if job.state in ("applied", "durable"):
                # One that had done its last step when it was stopped is in the weights all the same.
                return self._end(batch, "stopped" if reason else "trained", reason, moments="trained")
            how = f"after {job.steps_done} of {job.num_steps} steps"
            if reason is not None:
                return self._end(batch, "stopped", f"stopped {how}: {reason}")
            why = f"the job was {job.state} {how}: {job.error or 'no reason given'}"
            if batch.num_held and "options.accumulate_steps" in why:
                why += f"; hold = 0 in [tier_{batch.tier}] trains one example an update and holds nothing"
            return self._end(batch, "failed", why)

    def _end(
        self,
        batch: TrainingBatch,
        state: Literal["trained", "failed", "stopped"],
        error: str | None = None,
        moments: State = "failed",
    ) -> TrainingBatch:
        with self._store.transaction():
            self._move(batch, moments, error if moments == "failed" else None, expected=("training",))
            return self.table.change(batch.batch_id, state=state, ended_at=time.time(), error=error)

    def _move(
        self, batch: TrainingBatch, state: State, reason: str | None, expected: Sequence[State]
    ) -> None:
        for moment in self._moments.of_batch(batch.batch_id):
            if moment.state in expected:
                why = moment.decided_reason if reason is None else reason
                self._moments.change(moment.moment_id, state=state, decided_reason=why)


def _seed(moments: Sequence[Moment]) -> int:
    return int.from_bytes(moments[0].moment_id.encode()[-8:])
