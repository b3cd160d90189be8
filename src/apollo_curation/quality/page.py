"""What was measured, for the server's page: mounted there by the entry point group `apollo_ipc.quality`."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from apollo_curation.quality.history import Measurement
from apollo_curation.store import FILE_NAME

MAX_SHOWN = 200


def measurements(state_dir: Path) -> list[dict[str, Any]]:
    """The newest, oldest of them first. Reads only: a server makes no store of curation's."""
    path = state_dir / FILE_NAME
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        try:
            rows = db.execute(
                "SELECT body FROM quality_measurements ORDER BY measurement_id DESC LIMIT ?", (MAX_SHOWN,)
            ).fetchall()
        except sqlite3.OperationalError:  # a store in which nothing was measured yet has no such table
            return []
    kept = [msgspec.json.decode(row[0], type=Measurement) for row in reversed(rows)]
    return [_shown(one) for one in kept]


def _shown(one: Measurement) -> dict[str, Any]:
    return {
        "at": one.at,
        "label": one.label,
        "weight_version": one.weight_version,
        "losses": {name: loss.loss for name, loss in one.losses.items()},
        "canaries": [{"name": canary.name, "passed": canary.passed} for canary in one.canaries],
        "breaches": [breach.sentence for breach in one.breaches],
        "action": one.action,
        "restored_version": one.restored_version,
    }
