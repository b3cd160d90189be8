"""A job whose effect a restore took away says so, with the version, wherever jobs are shown.

The page: test_ui.py. What the trainer does: trainer/test_restore_live.py.
"""

from __future__ import annotations

import json

import openai
import pytest
from rich.console import Console
from router_harness import ONE, TRAIN_KEY, error_of

from apollo_ipc.cli.output import describe_job, jobs_table, status_table
from apollo_ipc.wire.client import call
from apollo_ipc.wire.messages import GetStatus, ListJobs
from apollo_ipc.wire.replies import RestoreResult

WHY = "weight version 3 was restored"


@pytest.fixture
def undone(server, worker) -> str:
    """The id of a job that was applied, under the key `one`, before version 3 came back."""
    response = server.http.post("/train", json=ONE, headers={"Idempotency-Key": "one"})
    worker.train_one()
    worker.queue.restored(0, 1000, 3, 4)
    worker.board.state.last_restore = RestoreResult(3, 9, 56, 1, 0, True, 1.2)
    return response.json()["job_id"]


def test_over_http_in_jobs_status_events_and_to_who_waits(server, undone):
    job = server.http.get(f"/train/jobs/{undone}").json()
    assert (job["state"], job["undone_by"], job["notes"][-1]) == ("undone", 3, f"undone: {WHY}")
    (listed,) = server.http.get("/train/jobs?state=undone").json()["data"]
    assert (listed["job_id"], listed["undone_by"]) == (undone, 3)
    status = server.http.get("/train/status").json()
    assert status["num_jobs"] == {"undone": 1}
    assert (status["last_restore"]["restored_version"], status["last_restore"]["num_jobs_undone"]) == (3, 1)
    *_, last = server.http.get(f"/train/jobs/{undone}/events").text.strip().split("\n\n")
    data = json.loads(next(line for line in last.splitlines() if line.startswith("data:"))[5:])
    assert (data["state"], data["undone_by"]) == ("undone", 3)
    waited = server.http.post("/train?wait=true", json=ONE, headers={"Idempotency-Key": "one"})
    assert (waited.status_code, error_of(waited)["code"]) == (422, "job_undone")
    assert error_of(waited)["message"] == f"job {undone} undone: {WHY}"


def test_on_the_command_line_in_jobs_and_status(config, undone):
    jobs = call(config.socket_path, ListJobs("")).jobs
    status = call(config.socket_path, GetStatus("")).status
    assert jobs is not None
    assert status is not None
    assert describe_job(jobs[0]).startswith(f"job {undone}: undone, ")
    assert describe_job(jobs[0]).endswith(WHY)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(jobs_table(jobs), status_table(status))
    assert WHY in shown.get()
    assert "version 3 came back as version 9, 1 jobs undone" in shown.get()


def test_to_openais_client_in_the_job_and_its_events(server, worker):
    lines = json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}).encode()
    with openai.OpenAI(base_url=f"{server.url}/train/v1", api_key=TRAIN_KEY) as client:
        file = client.files.create(file=("a.jsonl", lines), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="m", training_file=file.id)
        worker.train_one()
        assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
        worker.queue.restored(0, 1000, 3, 4)
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert (found.status, found.fine_tuned_model) == ("failed", None)
        assert found.error is not None
        assert (found.error.code, found.error.message) == ("job_undone", WHY)
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert f"The job ended: undone: {WHY}" in messages
