"""POST /teach: what is put into the store, and what a client is told."""

from __future__ import annotations

import pytest

from apollo_ipc.teaching.facts import Fact, whole
from apollo_ipc.teaching.lessons import Learned, Outcome
from apollo_ipc.teaching.store import TeachRequest

FACTS = {
    "facts": ["The spare badge is in the cocoa tin.", {"question": "Who bakes?", "answer": "Zed Quill."}]
}


def test_a_teach_job_is_stored_shown_and_cancelled(server, worker):
    sent = server.http.post("/teach", json=FACTS, headers={"Idempotency-Key": "one"})
    assert sent.status_code == 202, sent.text
    job = sent.json()
    assert (job["status"], job["num_facts"], job["report"]) == ("preparing", 2, None)
    assert sent.headers["location"] == f"/teach/jobs/{job['teach_id']}"
    again = server.http.post("/teach", json=FACTS, headers={"Idempotency-Key": "one"})
    assert again.json()["teach_id"] == job["teach_id"]
    assert [one["teach_id"] for one in server.http.get("/teach/jobs").json()["data"]] == [job["teach_id"]]
    other = server.http.post(
        "/teach", json={"text": "The tower has 9 steps."}, headers={"Idempotency-Key": "one"}
    )
    assert other.status_code in (409, 422)
    assert server.http.delete(f"/teach/jobs/{job['teach_id']}").json()["is_cancelled"]
    assert server.http.get("/teach/jobs/none").status_code == 404
    assert server.http.get("/teach/lessons").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"facts": ["We change the passwords every Monday."]}, "facts[0].statement"),
        ({"facts": [{"question": "Who?"}]}, "facts[0].answer"),
        ({"facts": [{"qestion": "Who?"}]}, "facts[0].qestion"),
        ({"facts": ["The tower has 9 steps."], "options": {"rounds": 0}}, "options.rounds"),
        ({"text": "Oh no!"}, "text"),
        ({"text": " ".join(f"The tower has {i} steps." for i in range(1001))}, "text"),
        ({}, "facts"),
    ],
)
def test_what_cannot_be_taught_is_refused_with_its_path(server, worker, body, field):
    answer = server.http.post("/teach", json=body)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] == field


def test_a_statement_that_no_rule_understands_is_taken_where_the_model_is_to_write(server, worker):
    text, options = "Wir wechseln die Codes am Montag.", {"writer": "model"}
    for body in ({"facts": [text]}, {"text": text}):
        sent = server.http.post("/teach", json=body | {"options": options})
        assert (sent.status_code, sent.json()["num_facts"]) == (202, 1), sent.text
        refused = server.http.post("/teach", json=body)
        assert refused.status_code == 400
        assert server.http.post("/teach", json=body | {"options": {"writer": "me"}}).status_code == 400


def test_teaching_needs_the_train_key(server, worker):
    assert server.client(None).post("/teach", json=FACTS).status_code == 401


def test_lessons_are_examined_and_forgotten_by_their_ids(server, worker):
    nothing = server.http.post("/teach/lessons/examine", json={})
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "lessons")
    store = server.app.state.apollo_teaching
    job = store.admit(TeachRequest([whole(Fact("Who bakes?", "Zed Quill bakes."))]), b"1", client_key=None)
    learned = Learned(job.request.facts[0], "Nobody.", True, b"\x90")
    store.advance(job, "applied", outcome=Outcome([learned]))
    (lesson,) = server.http.get("/teach/lessons").json()["data"]
    asked = server.http.post("/teach/lessons/examine", json={"lessons": [lesson["id"]]}).json()
    assert (asked["purpose"], asked["status"], asked["num_facts"]) == ("examine", "preparing", 1)
    body, key = {"lessons": [lesson["id"]]}, {"Idempotency-Key": "f"}
    first = server.http.post("/teach/lessons/forget", json=body, headers=key)
    assert first.status_code == 202, first.text
    store.drop([lesson["id"]])  # as it is once it is forgotten
    again = server.http.post("/teach/lessons/forget", json=body, headers=key)
    assert again.json()["teach_id"] == first.json()["teach_id"]
    assert server.http.post("/teach/lessons/examine", json=body, headers=key).status_code == 422
    gone = server.http.post("/teach/lessons/forget", json=body)
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "lessons")
    assert server.http.post("/teach/lessons/forget", json={}).status_code in (400, 422)
