"""One event into the outbox, from a process that has other things to do than to send it."""

from __future__ import annotations

import logging
import time
from typing import Any

from apollo_ipc.config import Config
from apollo_ipc.webhooks.outbox import EventType, Outbox, event, outbox_path

log = logging.getLogger(__name__)


def tell(config: Config, type: EventType, subject: str, data: dict[str, Any]) -> None:
    """On disk when it returns; nothing where no URL is configured. Never raises: what it tells of goes on."""
    if not config.webhooks.urls:
        return
    try:
        outbox = Outbox(outbox_path(config), config.webhooks.urls)
        try:
            outbox.add(event(type, subject, data, time.time()))
        finally:
            outbox.close()
    except Exception:
        log.exception("webhooks: %s of %s is not told", type, subject)
