"""OpenAI's fine-tuning API: its files, and wrong use, each by a sentence."""

from __future__ import annotations

import sqlite3

import httpx
import openai
import pytest
from apollo_router.fine_tuning import upload
from apollo_router.fine_tuning.store import FineTuningStore
from fine_tuning_calls import LINE, add_file, jsonl, sentence
from router_harness import MAX_BODY_BYTES

# --- files ---


def test_a_deleted_file_is_gone_from_the_disk(client, worker, config):
    secret = {"messages": [{"role": "assistant", "content": "the secret of the ages"}]}
    file = add_file(client, *[secret] * 500)
    path = config.state_dir / "fine_tuning.sqlite"
    held = [one for one in path.parent.glob("fine_tuning.sqlite*") if b"secret of the" in one.read_bytes()]
    assert held
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in path.parent.glob("fine_tuning.sqlite*"))
    assert client.files.delete(file).deleted
    for one in path.parent.glob("fine_tuning.sqlite*"):
        assert b"secret of the" not in one.read_bytes()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)


def test_a_file_that_expires_is_gone(client, worker, config):
    file = client.files.create(
        file=b"x", purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with sqlite3.connect(config.state_dir / "fine_tuning.sqlite") as db:
        db.execute("UPDATE files SET expires_at = 1")
    assert list(client.files.list()) == []


def test_all_files_together_are_bounded(client, worker, monkeypatch):
    monkeypatch.setattr("apollo_router.fine_tuning.store.MAX_STORED_BYTES", 100)
    client.files.create(file=b"x" * 60, purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as raised:
        client.files.create(file=b"x" * 60, purpose="fine-tune")
    assert "delete some" in sentence(raised)


def test_a_store_of_a_newer_program_is_left_alone(tmp_path):
    path = tmp_path / "fine_tuning.sqlite"
    FineTuningStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Exception, match="schema version 99"):
        FineTuningStore(path)


# --- wrong use, each by a sentence ---


def test_a_file_of_another_purpose_or_too_large_is_refused(client, worker):
    with pytest.raises(openai.BadRequestError) as raised:
        client.files.create(file=b"{}", purpose="assistants")
    assert raised.value.param == "purpose"
    assert "training alone reads it" in sentence(raised)
    with pytest.raises(openai.APIStatusError) as raised:
        client.files.create(file=b"x" * (MAX_BODY_BYTES + upload.FORM_BYTES + 1), purpose="fine-tune")
    assert raised.value.status_code == 413
    assert "send several" in sentence(raised)


@pytest.mark.parametrize(
    ("more", "param", "text"),
    [
        ({"model": "gpt-4o"}, "model", "the model that it serves: 'm'"),
        ({"training_file": "file-none"}, "training_file", "no file 'file-none'"),
        ({"method": {"type": "reinforcement"}}, "method.type", "'reinforcement' is not taken"),
        (
            {"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
            "method.supervised",
            "the method's type is 'dpo'",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}},
            "method.dpo.hyperparameters.beta",
            "> 0.0",
        ),
        ({"validation_file": "file-x"}, "validation_file", "no validation file"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "no integration"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ">= 1"),
        ({"extra_body": {"sufix": "x"}}, "sufix", "did you mean 'suffix'?"),
    ],
)
def test_what_one_live_model_cannot_do_is_refused_by_name(client, worker, more, param, text):
    file = add_file(client, LINE)
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
        client.fine_tuning.jobs.create(**{"model": "m", "training_file": file} | more)
    assert raised.value.param == param
    assert text in sentence(raised)
    assert worker.queue.list() == []
    assert list(client.fine_tuning.jobs.list()) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the training file is empty"),
        (jsonl(LINE) + b"\n{nonsense\n", "line 3: not JSON"),
        (jsonl(LINE, {"text": "x"}), "line 2: a line is an object like"),
        (jsonl(LINE, {"messages": [{"role": "user", "content": 5}]}), "line 2: messages[0].content"),
        (jsonl(LINE, {"messages": []}), "line 2: messages: messages is empty"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_at_its_line(client, worker, content, text):
    file = client.files.create(file=content, purpose="fine-tune").id
    with pytest.raises(openai.BadRequestError) as raised:
        client.fine_tuning.jobs.create(model="m", training_file=file)
    assert raised.value.param == "training_file"
    assert text in sentence(raised)
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_body_that_is_no_form_is_refused(server, worker):
    bad = server.http.post("/train/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_form")
    assert server.http.post("/train/v1/files", json={}).status_code == 415


def test_every_route_wants_the_train_key(server):
    for method, path in [("GET", "/files"), ("POST", "/fine_tuning/jobs"), ("POST", "/chat/completions")]:
        with httpx.Client(base_url=f"{server.url}/train/v1") as nobody:
            assert nobody.request(method, path).status_code == 401
