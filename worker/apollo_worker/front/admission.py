"""What the front says of a request before it is queued: tokenised as the trainer will do it."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_ipc.config import Train
from apollo_ipc.errors import NotReady
from apollo_ipc.wire.requests import TrainRequest
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.link import ModelFacts
from apollo_worker.link.status_board import Admission, Shared

if TYPE_CHECKING:  # it imports transformers, which takes more than a second: in a thread, once it is needed
    from apollo_worker.jobs.tokenise import Tokeniser

logger = logging.getLogger(__name__)
LOAD_TIMEOUT_S = 60.0


class Admitter:
    """Knows the last model that a trainer attached to, also after vLLM or the trainer has gone."""

    def __init__(self, options: Train, shared: Shared, queue: JobQueue):
        self._options, self._shared, self._queue = options, shared, queue
        self._facts: ModelFacts | None = None
        self._tokeniser: Future[Tokeniser] | None = None
        self._loading = ThreadPoolExecutor(1, "apollo-tokeniser")

    def learn(self, facts: ModelFacts) -> None:
        """Returns at once; the tokeniser is loaded beside."""
        self._facts = facts
        self._tokeniser = self._loading.submit(load, facts)
        self._tokeniser.add_done_callback(_log_failure)

    def admit(self, request: TrainRequest) -> Admission:
        """Raises UserError with the path of a wrong field; NotReady where no model is known yet."""
        facts, tokeniser = self._facts, self._tokeniser
        if facts is None or tokeniser is None:
            reason = self._shared.attach_error or "attaching to vLLM"
            raise NotReady(f"the worker knows no model yet: {reason}")
        from apollo_worker.jobs.job_plan import plan

        try:
            loaded = tokeniser.result(LOAD_TIMEOUT_S)
        except TimeoutError:
            raise NotReady("the tokenizer is still loading; send it again") from None
        made = plan(request, loaded, self._queue, self._options)
        notes = rank_notes(facts, request.options.rank or self._options.rank, self._options.rank)
        return Admission(num_steps=made.num_steps, num_skipped=made.num_skipped, notes=notes)

    def stop(self) -> None:
        self._loading.shutdown(wait=False, cancel_futures=True)


def load(facts: ModelFacts) -> Tokeniser:
    from apollo_worker.jobs.tokenise import load_tokeniser

    return load_tokeniser(Path(facts.model_dir), vocab_size=facts.vocab_size, max_tokens=facts.max_tokens)


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
