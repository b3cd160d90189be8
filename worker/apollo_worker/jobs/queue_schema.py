"""The queue's tables, and how those of an older program become them."""

from __future__ import annotations

import secrets
import sqlite3

SCHEMA_VERSION = 5  # the last of _SINCE

# `plans` apart from `jobs`: SQLite writes a changed row whole, and a plan may have 32 MB.
# `requests`: bodies of schema 1, until the front has made plans of them.
# `examples`: who has trained, or is going to train, the example with this hash.
# `losses`: of step 0, that of the text which the loss guard measures before a job.
# AUTOINCREMENT: a seq is never given twice.
_JOBS = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    num_examples INTEGER NOT NULL,
    num_steps INTEGER NOT NULL,
    steps_done INTEGER NOT NULL DEFAULT 0,
    loss_first REAL,
    loss_last REAL,
    weight_version INTEGER,
    num_skipped INTEGER NOT NULL,
    idempotency_key TEXT UNIQUE,
    request_digest BLOB NOT NULL,
    error TEXT,
    traceback TEXT,
    notes TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancel_requested REAL
);
CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE TABLE requests (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE losses (seq INTEGER, step INTEGER, loss REAL, PRIMARY KEY (seq, step)) WITHOUT ROWID;
"""
_EXAMPLES = """
CREATE TABLE examples (hash BLOB, seq INTEGER, PRIMARY KEY (hash, seq)) WITHOUT ROWID;
CREATE INDEX examples_by_seq ON examples (seq);
"""
# One job runs at a time, and none before an earlier one has ended: a commit's `applied_seq` stands for a
# prefix of the order, and a job outside of it would be trained twice.
_VERSION_2 = """
ALTER TABLE jobs ADD COLUMN blamed_step INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN undone_by INTEGER;
CREATE TABLE plans (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE UNIQUE INDEX one_job_runs ON jobs (state) WHERE state = 'running';
CREATE TRIGGER jobs_run_in_order BEFORE UPDATE OF state ON jobs
    WHEN NEW.state = 'running' AND OLD.state != 'running'
    AND EXISTS (SELECT 1 FROM jobs WHERE seq < NEW.seq AND state IN ('queued', 'running'))
    BEGIN SELECT RAISE(ABORT, 'an earlier job has not ended'); END;
"""
_VERSION_3 = "ALTER TABLE jobs ADD COLUMN paused_at REAL;"
# advantages: JSON; of grpo jobs only. reference_logprobs: fp32, little-endian, of each sequence of the plan.
_VERSION_4 = """
ALTER TABLE jobs ADD COLUMN loss TEXT NOT NULL DEFAULT 'cross_entropy';
CREATE TABLE advantages (seq INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE reference_logprobs (seq INTEGER, at INTEGER, logprobs BLOB NOT NULL, PRIMARY KEY (seq, at));
"""
# restores: JSON, the weight versions (those of restores) that took the job out of the weights and brought it
# back, in turn; NULL where an older program undid it.
_VERSION_5 = """
ALTER TABLE jobs ADD COLUMN restores TEXT DEFAULT '[]';
UPDATE jobs SET restores = NULL WHERE state = 'undone';
"""
_SINCE = {2: _VERSION_2, 3: _VERSION_3, 4: _VERSION_4, 5: _VERSION_5}
_FROM_1 = """
UPDATE jobs SET state = 'queued', steps_done = 0 WHERE state = 'running'
    AND EXISTS (SELECT 1 FROM jobs AS earlier WHERE earlier.seq < jobs.seq
                AND earlier.state IN ('queued', 'running'));
ALTER TABLE examples RENAME TO examples_1;
DROP INDEX examples_by_seq;
"""
_EXAMPLES_FROM_1 = """
INSERT INTO examples SELECT hash, seq FROM examples_1;
DROP TABLE examples_1;
UPDATE jobs SET attempts = 0 WHERE state != 'running';
"""


def migrate(db: sqlite3.Connection, version: int) -> None:
    """From `version` (0: an empty file) to this one, inside the open transaction."""
    first = {0: _JOBS + _EXAMPLES, 1: _FROM_1 + _EXAMPLES + _EXAMPLES_FROM_1}.get(version, "")
    _run(db, first + "".join(script for newer, script in _SINCE.items() if newer > version))
    if version == 0:
        db.execute(f"PRAGMA application_id = {1 + secrets.randbelow(2**31 - 1)}")


def _run(db: sqlite3.Connection, script: str) -> None:
    """`executescript` would commit the transaction first."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
    assert not statement.strip(), statement
