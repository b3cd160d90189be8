"""What the commands share: the parts that they work on, and how they end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apollo_curation.settings import CurationConfig
from apollo_ipc.errors import UserError
from apollo_ipc.process.flag import Flag

if TYPE_CHECKING:
    from apollo_curation.moments.moments import Moments
    from apollo_curation.store import Store
    from apollo_curation.training.schedule import Learning

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATH", help="Files and directories. Default: curation.sources."),
]


def sources(paths: list[Path] | None, config: CurationConfig) -> list[Path]:
    """What the command line names, else what the configuration does. Raises UserError where neither does."""
    found = paths or [Path(source).expanduser() for source in config.curation.sources]
    if not found:
        raise UserError(
            "nothing to read: name files or directories, or set `sources` in [curation] of the configuration",
            field="PATH",
        )
    return found


def short(text: str, num_characters: int = 60) -> str:
    """On one line of a table."""
    text = " ".join(text.split())
    return text if len(text) <= num_characters else text[: num_characters - 3] + "..."


@contextmanager
def open_moments(config: CurationConfig) -> Iterator[tuple[Store, Moments]]:
    from apollo_curation.moments.moments import Moments
    from apollo_curation.store import Store, store_path

    with Store(store_path(config)) as store:
        yield store, Moments(store)


@contextmanager
def open_learning(config: CurationConfig, stop: Callable[[], bool] = lambda: False) -> Iterator[Learning]:
    """Store, batches, training interface and the served model, by the configuration."""
    from apollo_curation.chat_client import learner
    from apollo_curation.quality.held import what_is_held
    from apollo_curation.train_client import TrainClient
    from apollo_curation.training.batches import Batches
    from apollo_curation.training.schedule import Learning

    with (
        open_moments(config) as (store, moments),
        closing(TrainClient(config, stop)) as training,
        closing(learner(config, stop)) as model,
    ):
        batches = Batches(store, moments, training, config, stop, what_is_held(config, model))
        yield Learning(store, moments, batches, training, config, model)


@contextmanager
def stop_by_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts."""
    asked = Flag()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
