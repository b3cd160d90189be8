"""Syncs that fail, for webhooks: also where what fails them keeps the trainer from saying so.

An intent is in the outbox before a sync begins, and goes with its end. Whoever finds one that stands (the
next trainer, or this one after a disk that was full) looks into the commit record: where no commit came, the
sync has failed and is told, under the same id however often.
"""

from __future__ import annotations

import logging
import secrets
import time
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
        self._begun: Intent | None = None
        self._failed: list[Intent] = []  # that the outbox does not have
        self._settle()

    def begin(self, model_dir: Path | None, weight_version: int, durable_version: int) -> None:
        """Before the first write. model_dir: None where nothing is attached, and the sync will fail of it."""
        event_id, where = f"evt_{secrets.token_hex(16)}", str(model_dir or "")
        self._begun = Intent(event_id, time.time(), where, _serial(where), weight_version, durable_version)
        self._settle(then=self._begun)

    def end(self, error: str | None) -> None:
        """error: None where it was written."""
        begun, self._begun = self._begun, None
        if begun is not None and error is not None:
            self._failed.append(msgspec.structs.replace(begun, error=error))
        self._settle(written=begun if error is None else None)

    def _settle(self, *, then: Intent | None = None, written: Intent | None = None) -> None:
        """What has failed is in the outbox then, and no intent but `then`; or all is as it was."""
        if not self._config.webhooks.urls:
            self._failed.clear()
            return
        try:
            outbox = Outbox(outbox_path(self._config), self._config.webhooks.urls)
            with outbox, outbox.transaction():
                for failed in self._found(outbox, written):
                    told = {
                        "error": failed.error or CUT_OFF,
                        "weight_version": failed.weight_version,
                        "durable_version": failed.durable_version,
                    }
                    outbox.add(event("sync.failed", "checkpoint", told, failed.begun_at, failed.event_id))
                outbox.set_intent(INTENT, msgspec.json.encode(then) if then else None)
        except Exception:
            log.exception("webhooks: a failed sync is told later")
            return
        self._failed.clear()

    def _found(self, outbox: Outbox, written: Intent | None) -> list[Intent]:
        body = outbox.intent(INTENT)
        stored = msgspec.json.decode(body, type=Intent) if body else None
        known = {one.event_id for one in (*self._failed, *([written] if written else []))}
        if stored is None or stored.event_id in known or _is_committed(stored):
            return self._failed
        return [stored, *self._failed]


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
