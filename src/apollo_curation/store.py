"""The one file in which curation remembers: state_dir/curation.sqlite.

Each module that keeps something declares its tables (CREATE TABLE IF NOT EXISTS) and is the only one to write
them. Losing the file loses decisions and history, never weights or jobs.
"""

from __future__ import annotations

from pathlib import Path

from apollo_curation.settings import CurationConfig
from apollo_ipc.database import Database, DatabaseDamaged

FILE_NAME = "curation.sqlite"  # in the state directory
SCHEMA_VERSION = 1


class StoreDamaged(DatabaseDamaged):
    code = "store_damaged"


def store_path(config: CurationConfig) -> Path:
    return config.state_dir / FILE_NAME


class Store(Database):
    """What curation has read and decided. Each part declares its own tables. Raises StoreDamaged."""

    schema_version = SCHEMA_VERSION
    busy_timeout_s = 30.0
    damaged = StoreDamaged
    advice = (
        "weights and jobs are not affected. Move the file away to start with no memory of what was read and "
        "decided"
    )
