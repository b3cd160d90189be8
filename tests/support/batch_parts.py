"""A store with moments, and the batches that train them."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

from batch_fixtures import moment

from apollo_curation.chat_client import learner
from apollo_curation.moments.moments import Moment, Moments
from apollo_curation.quality.held import what_is_held
from apollo_curation.settings import CurationConfig
from apollo_curation.store import Store, store_path
from apollo_curation.train_client import TrainClient
from apollo_curation.training.batches import Batches
from apollo_ipc.wire.requests import TrainRequest


class Parts(NamedTuple):
    store: Store
    moments: Moments
    batches: Batches
    config: CurationConfig

    def add(self, *answers: str, **changes) -> list[Moment]:
        return self.moments.add([moment(answer, **changes) for answer in answers])

    def request(self) -> TrainRequest:
        """Of all moments."""
        return TrainRequest([one.example() for one in self.moments.list()])

    def states(self) -> dict[str, str]:
        return {one.answer.content: one.state for one in self.moments.list() if one.answer}


@contextmanager
def opened(config: CurationConfig, stop=lambda: False, client: TrainClient | None = None, model=None):
    """client, model (a ChatClient): of the same server; making one takes a tenth of a second."""
    with ExitStack() as stack:
        own = client or stack.enter_context(closing(TrainClient(config, stop)))
        asked = model or stack.enter_context(closing(learner(config, stop)))
        store = stack.enter_context(Store(store_path(config)))
        moments = Moments(store)
        replay = what_is_held(config, asked)
        yield Parts(store, moments, Batches(store, moments, own, config, stop, replay), config)
