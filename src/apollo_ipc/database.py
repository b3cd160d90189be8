"""An SQLite file of ours: private, flushed at every commit, open in several threads and processes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from apollo_ipc.config import make_private_dir
from apollo_ipc.errors import ApolloError


class DatabaseDamaged(ApolloError):
    """The file is no database, or a newer program wrote it."""

    code = "database_damaged"
    exit_code = 78  # EX_CONFIG of sysexits.h: a supervisor must not loop on it


class Database:
    """`with Database(path) as store: ...`; the file is made (mode 0600) where there is none. Every method
    blocks: off the event loop. Raises `damaged`.

    schema: statements with IF NOT EXISTS, each ended by a semicolon at the end of its line. advice: what to
    do about a damaged file. is_wiping: what is deleted leaves the file.
    """

    schema_version: ClassVar[int] = 1
    schema: ClassVar[str] = ""
    damaged: ClassVar[type[DatabaseDamaged]] = DatabaseDamaged
    advice: ClassVar[str] = "move the file away to start without what is in it"
    is_wiping: ClassVar[bool] = False
    busy_timeout_s: ClassVar[float] = 10.0

    def __init__(self, path: Path):
        make_private_dir(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self.path = path
        self._lock = threading.RLock()
        timeout_s = self.busy_timeout_s
        self.db = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        try:
            self._prepare()
        except sqlite3.OperationalError:  # locked, no permission, disk full: says what it is
            self.db.close()
            raise
        except sqlite3.DatabaseError as error:
            self.db.close()
            raise self.damaged(f"{path} is damaged ({error}): {self.advice}") from error
        except BaseException:
            self.db.close()
            raise

    def _prepare(self) -> None:
        if self.is_wiping:
            self.db.execute("PRAGMA auto_vacuum = FULL")
            self.db.execute("PRAGMA secure_delete = ON")
        _use_wal(self.db, self.busy_timeout_s)
        self.db.execute("PRAGMA synchronous = FULL")
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version > self.schema_version:
            raise self.damaged(
                f"{self.path} has schema version {version}, this apollo-ipc knows {self.schema_version}: "
                "a newer one wrote it"
            )
        self.declare(self.schema)
        if version < self.schema_version:
            self.db.execute(f"PRAGMA user_version = {self.schema_version}")

    def declare(self, schema: str) -> None:
        """More of the schema."""
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
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Without other threads of this process."""
        with self._lock:
            yield self.db

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self.reading() as db:
            return db.execute(sql, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _use_wal(db: sqlite3.Connection, busy_timeout_s: float) -> None:
    """SQLite does not wait, as it does elsewhere, where two open a new file at once and switch it to WAL."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
