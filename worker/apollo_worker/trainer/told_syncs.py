"""Syncs that fail, for webhooks: also where what fails them keeps the trainer from saying so.

An intent is in the outbox before a sync begins, and goes with its end. Whoever finds one that stands (the
next trainer, or this one after a disk that was full) looks into the commit record: where no commit came, the
sync has failed and is told, under the same id however often.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from apollo_ipc.checkpoint.record import read_commit
from apollo_ipc.config import Config
from apollo_ipc.errors import CheckpointError
from apollo_ipc.webhooks.outbox import Outbox, event, outbox_path

log = logging.getLogger(__name__)
INTENT = "sync"
CUT_OFF = "the trainer ended before the checkpoint was written"


class Intent(msgspec.Struct, frozen=True):
    """A sync that has begun. serial: of the commit that it follows. error: what failed it, where known."""

    event_id: str
    begun_at: float
    model_dir: str
    serial: int | None
    weight_version: int
    durable_version: int
    error: str | None = None


class ToldSyncs:
    """Nothing where no URL is configured. Nothing raises: a sync goes on without its webhook."""

    def __init__(self, config: Config):
        self._config = config
        self._intent: Intent | None = None  # as it should stand in the outbox
        self._guarded(self._settle)

    def begin(self, model_dir: Path | None, weight_version: int, durable_version: int) -> None:
        """Before the first write. model_dir: None where nothing is attached, and the sync will fail of it."""
        event_id, where = f"evt_{secrets.token_hex(16)}", str(model_dir or "")
        begun = Intent(event_id, time.time(), where, _serial(where), weight_version, durable_version)

        def note(outbox: Outbox) -> None:
            self._settle(outbox)  # one before could not be told
            outbox.set_intent(INTENT, msgspec.json.encode(begun))

        self._guarded(note)
        self._intent = begun

    def end(self, error: str | None) -> None:
        """error: None where it was written."""
        if self._intent is None:
            return
        if error is not None:
            self._intent = msgspec.structs.replace(self._intent, error=error)
            self._guarded(self._settle)
        else:
            self._intent = None
            self._guarded(lambda outbox: outbox.set_intent(INTENT, None))

    def _settle(self, outbox: Outbox) -> None:
        if (body := outbox.intent(INTENT)) is None:
            found = self._intent if self._intent and self._intent.error else None
        else:
            found = msgspec.json.decode(body, type=Intent)
        if found is None:
            return
        if self._intent is not None and self._intent.event_id == found.event_id:
            found = self._intent
        if found.error is not None or not _is_committed(found):
            told = {
                "error": found.error or CUT_OFF,
                "weight_version": found.weight_version,
                "durable_version": found.durable_version,
            }
            outbox.add(event("sync.failed", "checkpoint", told, found.begun_at, found.event_id))
        outbox.set_intent(INTENT, None)
        self._intent = None

    def _guarded(self, action: Callable[[Outbox], None]) -> None:
        """In one transaction."""
        if not self._config.webhooks.urls:
            return
        try:
            with (
                Outbox(outbox_path(self._config), self._config.webhooks.urls) as outbox,
                outbox.transaction(),
            ):
                action(outbox)
        except Exception:
            log.exception("webhooks: a failed sync is told later")


def _is_committed(intent: Intent) -> bool:
    serial = _serial(intent.model_dir)
    return serial is not None and serial != intent.serial


def _serial(model_dir: str) -> int | None:
    """Of the last commit; None where there is none that can be read."""
    try:
        commit = read_commit(Path(model_dir)) if model_dir else None
    except CheckpointError:
        return None
    return commit and commit.serial
