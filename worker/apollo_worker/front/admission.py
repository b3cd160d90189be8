"""Makes the plan of each job, at submit: tokens, steps, rates. The trainer executes it as it is stored."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from apollo_ipc.config import Train
from apollo_ipc.errors import NotReady, UserError
from apollo_ipc.manifest import Serving, read_manifest
from apollo_ipc.wire.replies import Previewed
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.job_plan import plan
from apollo_worker.jobs.queue import JobQueue, UnplannedJob
from apollo_worker.link.link import ModelFacts
from apollo_worker.link.status_board import Admission, StatusBoard

if TYPE_CHECKING:  # it imports transformers, which takes more than a second: in a thread, once it is needed
    from apollo_worker.jobs.tokenise import Tokeniser

logger = logging.getLogger(__name__)
LOAD_TIMEOUT_S = 60.0


class Busy:
    """`with busy:` around what takes long, `get_on` in it: whether it hangs is not how long it takes."""

    def __init__(self) -> None:
        self._moved_at: float | None = None  # time.monotonic(); None: nothing is being done

    def __enter__(self) -> None:
        self.get_on()

    def __exit__(self, *_: object) -> None:
        self._moved_at = None

    def get_on(self) -> None:
        self._moved_at = time.monotonic()

    def stands_since_s(self) -> float:
        moved_at = self._moved_at
        return 0.0 if moved_at is None else time.monotonic() - moved_at


class Admitter:
    """Knows the last model that a trainer attached to, also after vLLM or the trainer has gone."""

    def __init__(self, options: Train, board: StatusBoard, queue: JobQueue, runtime_dir: Path):
        self._options, self._board, self._queue = options, board, queue
        self._runtime_dir = runtime_dir
        self._serving = Serving()
        self._facts: ModelFacts | None = None
        self._tokeniser: Future[Tokeniser] | None = None
        self._loading = ThreadPoolExecutor(1, "apollo-tokeniser")
        self.busy = Busy()

    def learn(self, facts: ModelFacts) -> None:
        """Returns at once; the tokeniser is loaded beside, and then plans what an older program queued."""
        self._facts = facts
        self._loading.submit(self._plan_older_jobs, self._load(facts, self._told(facts) or Serving()))

    def _load(self, facts: ModelFacts, serving: Serving) -> Future[Tokeniser]:
        self._serving = serving
        self._tokeniser = loaded = self._loading.submit(load, facts, serving)
        loaded.add_done_callback(_log_failure)
        return loaded

    def _told(self, facts: ModelFacts) -> Serving | None:
        """How vLLM serves this model, as the manifest says now: the API server adds to it, late."""
        manifest = read_manifest(self._runtime_dir)
        return manifest.serving if manifest is not None and manifest.model_path == facts.model_dir else None

    def tokeniser(self) -> Tokeniser:
        """As vLLM serves the model now. Raises NotReady where no model is known yet."""
        facts, loaded = self._facts, self._tokeniser
        if facts is None or loaded is None:
            reason = self._board.state.attach_error or "attaching to vLLM"
            raise NotReady(f"the worker knows no model yet: {reason}")
        if (told := self._told(facts)) is not None and told != self._serving:
            loaded = self._load(facts, told)
        try:
            return loaded.result(LOAD_TIMEOUT_S)
        except TimeoutError:
            raise NotReady("the tokenizer is still loading; send it again") from None

    def preview(self, request: TrainRequest) -> list[Previewed]:
        """What would be trained. Raises NotReady."""
        from apollo_worker.jobs.preview import preview

        return preview(self.tokeniser(), request.examples)

    def admit(self, request: TrainRequest) -> Admission:
        """Raises UserError with the path of a wrong field; NotReady where no model is known yet."""
        loaded, facts = self.tokeniser(), self._facts
        assert facts is not None
        with self.busy:
            made = plan(
                request, loaded, self._options, self._queue.known_examples, on_progress=self.busy.get_on
            )
        notes = rank_notes(facts, request.options.rank or self._options.rank, self._options.rank)
        if made.num_skipped:
            notes.append(f"{made.num_skipped} of {made.num_examples} examples are in earlier jobs: skipped")
        notes += made.notes()
        notes += dict.fromkeys(note for sequence in made.examples for note in sequence.notes)
        return Admission(plan=made, notes=notes)

    def _plan_older_jobs(self, tokeniser: Future[Tokeniser]) -> None:
        for job in self._queue.unplanned():
            try:
                self._plan_older(job, tokeniser.result())
            except Exception as error:  # one job must not keep the next from its plan
                message = (
                    error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                )
                logger.error("job %s of an older program cannot be planned: %s", job.job_id, message)
                self._queue.refuse_unplanned(job.job_id, message)
        self._board.wake.set()

    def _plan_older(self, job: UnplannedJob, tokeniser: Tokeniser) -> None:
        request = msgspec.msgpack.decode(job.request, type=TrainRequest)
        # Its examples may be known by itself; and as many steps as were promised.
        made = plan(request, tokeniser, self._options, lambda _: set())
        self._queue.set_plan(job.job_id, msgspec.structs.replace(made, num_steps=job.num_steps))

    def stop(self) -> None:
        self._loading.shutdown(wait=False, cancel_futures=True)


def load(facts: ModelFacts, serving: Serving | None = None) -> Tokeniser:
    from apollo_worker.jobs.tokenise import load_tokeniser

    return load_tokeniser(
        facts.model_dir, vocab_size=facts.vocab_size, max_tokens=facts.max_tokens, serving=serving
    )


def _log_failure(loaded: Future[Tokeniser]) -> None:
    if not loaded.cancelled() and (error := loaded.exception()):
        logger.error("the tokenizer cannot be loaded: no job can be accepted", exc_info=error)


def rank_notes(facts: ModelFacts, rank: int, configured_rank: int) -> list[str]:
    """What a user should know about the rank that this job trains with."""
    notes = []
    if small := [name for name, dim in facts.smaller_dims.items() if dim < rank]:
        notes.append(
            f"rank {rank} is above the smaller dimension of {len(small)} matrices (e.g. {small[0]}): "
            "they fall back to Adam"
        )
    if rank != configured_rank:
        notes.append(f"rank {rank} is this job's own: its moments start at zero and end with it")
    return notes
