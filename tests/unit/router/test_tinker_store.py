"""What the file of Tinker's futures forgets, and what it keeps."""

from __future__ import annotations

import pytest
from apollo_router.tinker.store import CLIENT_KEPT_S, KEPT_S, TinkerStore


@pytest.fixture
def store(tmp_path):
    with TinkerStore(tmp_path / "tinker.sqlite") as store:
        yield store


def make_model(store: TinkerStore, model_id: str) -> str:
    session_id = store.add_session()
    store.take_lease(model_id, session_id, None)
    return session_id


def settled(store: TinkerStore, scope: str, seq_id: int, kind: str, *, is_open: bool = False) -> str:
    request_id = store.ask(scope, seq_id, kind, b"body", is_open=is_open)
    store.settle(store.asked(request_id), "done", b"result", is_closing=kind == "optim_step")
    return request_id


def grow_older(store: TinkerStore, seconds: float) -> None:
    with store.transaction() as db:
        db.execute("UPDATE requests SET created_at = created_at - ?", (seconds,))
        db.execute("UPDATE sessions SET seen_at = seen_at - ?", (seconds,))


def test_answers_of_a_day_ago_go_while_the_same_session_goes_on(store):
    make_model(store, "m")
    old = settled(store, "m", 1, "forward_backward", is_open=True)
    step = settled(store, "m", 2, "optim_step")
    grow_older(store, KEPT_S + 1)
    new = settled(store, "m", 3, "optim_step")
    assert [store.asked(one) is None for one in (old, step, new)] == [True, False, False]
    assert store.has_stepped("m")


def test_what_a_step_is_still_to_take_stays_however_old(store):
    make_model(store, "m")
    kept = settled(store, "m", 1, "forward_backward", is_open=True)
    waiting = store.ask("m", 2, "forward_backward", b"body", is_open=True)
    grow_older(store, 10 * KEPT_S)
    store.add_session()
    assert store.asked(kept).body == b"body"
    assert store.next_waiting().id == waiting


def test_clients_of_long_ago_go_but_for_who_trains_the_weights(store):
    first = make_model(store, "first")
    settled(store, "first", 1, "optim_step")
    make_model_later(store)
    grow_older(store, CLIENT_KEPT_S + 1)
    store.add_session()
    assert [row["id"] for row in store.query("SELECT id FROM models")] == ["second"]
    assert not store.see_session(first)
    store.require_owner("second")
    store.add_session()
    assert not store.has_stepped("first")


def make_model_later(store: TinkerStore) -> None:
    """The first one's lease is over."""
    with store.transaction() as db:
        db.execute("UPDATE sessions SET seen_at = seen_at - 100")
    make_model(store, "second")
