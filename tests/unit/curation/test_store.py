"""The file in which curation remembers: opened by many at once, and what is said where it cannot be used."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from apollo_curation import store as stores
from apollo_curation.moments.moments import Moments
from apollo_curation.store import Store, StoreDamaged
from apollo_ipc import database


def test_many_may_open_a_new_file_at_once(tmp_path):
    def open_and_close(path):
        with Store(path) as store:
            return Moments(store).counts()

    with ThreadPoolExecutor(8) as pool:
        for i in range(30):
            path = tmp_path / f"{i}" / "curation.sqlite"
            path.parent.mkdir(mode=0o700)
            assert list(pool.map(open_and_close, [path] * 8)) == [{}] * 8


def test_a_file_that_another_process_is_making_is_tried_again():
    class Contended:
        """Two that switch to WAL at once: SQLite refuses one of them without waiting."""

        def __init__(self, *errors):
            self.errors = list(errors)
            self.num_tries = 0

        def execute(self, sql):
            self.num_tries += 1
            if self.errors:
                raise sqlite3.OperationalError(self.errors.pop(0))

    contended = Contended("database is locked", "database is locked")
    database._use_wal(contended, 10.0)
    assert contended.num_tries == 3
    full = Contended("database or disk is full")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        database._use_wal(full, 10.0)
    assert full.num_tries == 1


def test_a_file_that_stays_locked_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.Store, "busy_timeout_s", 0.05)
    path = tmp_path / "curation.sqlite"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Store(path)
    other.close()


def test_a_transaction_is_all_or_nothing_and_the_outermost_one_commits(tmp_path):
    with Store(tmp_path / "curation.sqlite") as store:
        store.declare("CREATE TABLE IF NOT EXISTS t (x INTEGER);\n")

        def insert_and_fail():
            with store.transaction() as db:
                db.execute("INSERT INTO t VALUES (1)")
                with store.transaction() as inner:
                    inner.execute("INSERT INTO t VALUES (2)")
                raise KeyError

        with pytest.raises(KeyError):
            insert_and_fail()
        assert store.query("SELECT * FROM t") == []


def test_a_damaged_file_and_one_of_a_newer_program_say_so(tmp_path):
    path = tmp_path / "curation.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 30)
    with pytest.raises(StoreDamaged, match="Move the file away"):
        Store(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreDamaged, match="schema version 99"):
        Store(path)
