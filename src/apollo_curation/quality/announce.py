"""Breaches of the quality thresholds, to those whom `[webhooks]` names."""

from __future__ import annotations

from apollo_curation.quality.history import QualityHistory
from apollo_ipc.config import Config
from apollo_ipc.webhooks.outbox import Outbox, event, outbox_path

MARK = "quality_measurement"


def announce_breaches(config: Config, history: QualityHistory) -> None:
    """Of every measurement that was kept since the last call, also by a process that was killed after it.
    What was measured before the outbox was made is no news."""
    if not config.webhooks.urls:
        return
    outbox = Outbox(outbox_path(config), config.webhooks.urls)
    try:
        with outbox.transaction():
            told = outbox.mark(MARK)
            kept = history.list()
            for one in kept if told is not None else kept[-1:]:
                if one.breaches and one.measurement_id > (told or 0):
                    what = {
                        "measurement_id": one.measurement_id,
                        "label": one.label,
                        "weight_version": one.weight_version,
                        "job_id": one.job_id,
                        "breaches": [breach.sentence for breach in one.breaches],
                    }
                    event_id = f"evt_breach_{int(one.at * 1000)}_{one.measurement_id}"
                    outbox.add(event("quality.breach", "quality", what, one.at, event_id))
            if kept:
                outbox.set_mark(MARK, kept[-1].measurement_id)
    finally:
        outbox.close()
