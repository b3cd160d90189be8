"""The one file in which curation remembers: state_dir/curation.sqlite.

Each module that keeps something declares its tables (CREATE TABLE IF NOT EXISTS) and is the only one to write
them. Losing the file loses decisions and history, never weights or jobs.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_curation.settings import CurationConfig
from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import ApolloError

FILE_NAME = "curation.sqlite"  # in the state directory
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0


class StoreDamaged(ApolloError):
    code = "store_damaged"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


def store_path(config: CurationConfig) -> Path:
    return config.state_dir / FILE_NAME


class Store:
    """`with Store(path) as store: ...`. Safe for several threads and processes; a commit is durable.

    Raises StoreDamaged where the file is no database or of a newer schema.
    """

    def __init__(self, path: Path):
        make_private_dir(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self.path = path
        self._lock = threading.RLock()
        self.db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        try:
            _use_wal(self.db)
            self.db.execute("PRAGMA synchronous = FULL")
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreDamaged(
                    f"{path} has schema version {version}, this apollo-ipc knows {SCHEMA_VERSION}: a newer "
                    "one wrote it"
                )
            if version < SCHEMA_VERSION:
                self.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.OperationalError:
            self.db.close()
            raise
        except sqlite3.DatabaseError as error:
            self.db.close()
            raise StoreDamaged(
                f"{path} is damaged ({error}); weights and jobs are not affected. Move the file away to "
                "start with no memory of what was read and decided"
            ) from error
        except BaseException:
            self.db.close()
            raise

    def declare(self, schema: str) -> None:
        """`schema`: statements with IF NOT EXISTS, each ended by a semicolon at the end of its line."""
        with self.transaction():
            for statement in schema.split(";\n"):
                self.db.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; the outermost one commits. Other threads and processes wait for their turn."""
        with self._lock:
            if self.db.in_transaction:
                yield self.db
                return
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self.db.execute(sql, values).fetchall()

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _use_wal(db: sqlite3.Connection) -> None:
    """SQLite does not wait, as it does elsewhere, where two open a new file at once and switch it to WAL."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
