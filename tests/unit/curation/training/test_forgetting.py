"""What ended long ago loses its texts, and nothing of what was decided."""

from __future__ import annotations

import time

import pytest
from batch_fixtures import moment
from batch_parts import Parts

from apollo_curation.moments.moments import Moment
from apollo_curation.moments.review import approve
from apollo_curation.moments.review_view import view
from apollo_curation.training.choose import choose
from apollo_ipc.errors import UserError
from apollo_ipc.wire.requests import Message

MONTH = 31 * 86400.0


def months_later(parts: Parts, num: int = 1) -> int:
    """Everything that is kept is so much older; then what is old is forgotten."""
    with parts.store.transaction() as db:
        for table, column in (("batches", "ended_at"), ("batches", "created_at"), ("moments", "created_at")):
            db.execute(f"UPDATE {table} SET {column} = {column} - ?", (num * MONTH,))
    return parts.batches.forget()


def texts_of(parts: Parts) -> bytes:
    rows = parts.store.query("SELECT body AS text FROM moments UNION ALL SELECT request FROM batches")
    return b" ".join(bytes(row["text"]) for row in rows)


def test_what_was_trained_is_forgotten_after_its_time_and_not_before(server, parts):
    (kept,) = parts.add("a secret word")
    batch = parts.batches.train("direct", [kept])
    assert parts.batches.forget() == 0
    assert b"a secret word" in texts_of(parts)
    assert months_later(parts) == 1
    assert b"secret" not in texts_of(parts)
    assert parts.batches.forget() == 0, "once is enough"
    left = parts.moments.get(kept.moment_id)
    assert (left.state, left.batch_id, left.reason) == ("trained", batch.batch_id, "the user corrected it")
    assert parts.batches.table.get(batch.batch_id).job == batch.job


@pytest.mark.parametrize("state", ["rejected", "dropped"])
def test_what_was_set_aside_is_forgotten_too(server, parts, state):
    parts.add("not wanted", state=state)
    assert months_later(parts) == 1
    assert b"not wanted" not in texts_of(parts)


@pytest.mark.parametrize("state", ["flagged", "approved"])
def test_what_waits_keeps_its_texts(server, parts, state):
    parts.add("waits", state=state)
    assert months_later(parts, 12) == 0
    assert b"waits" in texts_of(parts)


def test_a_log_that_is_read_again_and_equal_content_are_still_known(server, parts):
    (kept,) = parts.add("a")
    parts.batches.train("direct", [kept])
    months_later(parts)
    assert parts.moments.add([moment("a")]) == [], "the same decision"
    (again,) = parts.moments.add([moment("a", original=Message("assistant", "b"))])
    choice = choose([again], parts.store, "direct", parts.config, time.time())
    assert {reason: [one.moment_id for one in left] for reason, left in choice.left.items()} == {
        "trained before": [again.moment_id]
    }


def test_a_wrong_answer_without_a_better_one_is_known_again(server, parts):
    wrong = moment(None, original=Message("assistant", "wrong"))
    (away,) = parts.moments.add([wrong])
    digest = away.digest
    parts.batches.train("direct", [away])
    months_later(parts)
    assert parts.moments.get(away.moment_id).digest == digest


def test_what_was_forgotten_is_shown_as_such_and_cannot_be_approved(server, parts):
    server.job_end = "failed"
    (kept,) = parts.add("a")
    parts.batches.train("direct", [kept])
    assert parts.moments.get(kept.moment_id).state == "failed"
    months_later(parts)
    left = parts.moments.get(kept.moment_id)
    with pytest.raises(UserError, match="no text any more"):
        approve(parts.moments, left)
    assert "dropped after their time" in shown(left)


def test_a_forgotten_batch_can_be_undone(server, parts):
    (kept,) = parts.add("a")
    batch = parts.batches.train("direct", [kept])
    months_later(parts)
    parts.batches.undo([batch.batch_id])
    assert parts.moments.get(kept.moment_id).state == "undone"


def shown(left: Moment) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=200)
    console.print(view(left))
    return console.file.getvalue()
