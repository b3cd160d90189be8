"""The command line as a user meets it: real processes, a real worker socket, what is printed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from apollo_worker.front.server import Server
from apollo_worker.jobs.queue import JobQueue
from apollo_worker.link.status_board import Admission, StatusBoard
from planned import plan_of, text_of

from apollo_ipc.keys import key_path
from apollo_ipc.manifest import Manifest, start_ticks, write_manifest
from apollo_ipc.wire.replies import Progress, SyncResult

COMMAND = Path(sys.executable).with_name("apollo-ipc")
EXAMPLE = {"prompt": "2 + 2 =", "completion": " 4"}


@pytest.fixture
def worker(config):
    """A worker whose trainer only pretends: every job takes three steps and its loss falls."""
    board = StatusBoard(admit=lambda request: Admission(plan_of(request, 3), notes=["noted"]))
    board.state.attached, board.state.vllm_boot_id, board.state.vllm_pid = True, "boot", 4242
    board.state.model_path = "/models/small"
    queue = JobQueue(config.state_dir / "queue.sqlite", max_queued=100)
    service = Server(config, board, queue)
    service.start()
    over = threading.Event()

    def train():
        while not over.wait(0.01):
            while not board.asked.empty():
                board.asked.get().done.set_result(SyncResult(7, time.time(), 10, 3, 1, 2000, 600, 0.5))
            if job := queue.take():
                for step in (1, 2, 3):
                    board.state.progress = Progress("training", step, job.info.job_id, step, 3, 4.0 - step)
                    queue.record_step(job.info.job_id, step, 4.0 - step)
                fails = text_of(job) == "fail"
                queue.finish(
                    job.info.job_id,
                    "failed" if fails else "applied",
                    weight_version=None if fails else 7,
                    error="the loss is not finite" if fails else None,
                )

    trainer = threading.Thread(target=train)
    trainer.start()
    yield queue
    over.set()
    trainer.join()
    service.stop()
    queue.close()


@pytest.fixture
def model_dir(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return path


def jsonl(path, *examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


# --- with a worker ---


def test_train_accepts_the_job_and_returns_at_once(apollo, worker, tmp_path):
    done = apollo("train", jsonl(tmp_path / "x.jsonl", EXAMPLE, EXAMPLE), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_examples"] == 2
    [job] = worker.list()
    assert job.job_id == json.loads(done.stdout)["job_id"]


def test_train_waits_until_the_weights_have_it(apollo, worker):
    done = apollo("train", "-", "--wait", "--lr", "1e-4", stdin=json.dumps(EXAMPLE))
    assert done.returncode == 0, done.stderr
    for part in ("applied", "3 of 3 steps", "loss 3 -> 1", "weight version 7"):
        assert part in done.stdout
    assert "noted" in done.stderr


def test_a_failed_job_is_a_failed_command(apollo, worker):
    done = apollo("train", "-", "--wait", "--json", stdin=json.dumps({**EXAMPLE, "completion": "fail"}))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "the loss is not finite"


def test_the_same_key_gives_the_same_job_and_another_body_under_it_is_refused(apollo, worker):
    first, again, other = (
        apollo(
            "train", "-", "--json", "--idempotency-key", "k", stdin=json.dumps({**EXAMPLE, "prompt": text})
        )
        for text in ("a", "a", "b")
    )
    assert json.loads(first.stdout)["job_id"] == json.loads(again.stdout)["job_id"]
    assert other.returncode == 2
    assert json.loads(other.stdout)["error"]["code"] == "conflict"


def test_status_and_jobs_and_cancel_and_sync(apollo, worker):
    job_id = json.loads(apollo("train", "-", "--wait", "--json", stdin=json.dumps(EXAMPLE)).stdout)["job_id"]
    status = json.loads(apollo("status", "--json").stdout)
    assert (status["attached"], status["model_path"]) == (True, "/models/small")
    assert "/models/small" in apollo("status").stdout
    assert job_id in apollo("jobs").stdout
    assert json.loads(apollo("jobs", "--json", "--state", "failed").stdout) == []
    cancelled = apollo("cancel", job_id)
    assert cancelled.returncode == 2
    assert "Traceback" not in cancelled.stderr
    assert apollo("cancel", "job-none").returncode == 2
    assert json.loads(apollo("checkpoint", "sync", "--json").stdout)["bytes_written"] == 600
    assert "600 B written" in apollo("checkpoint", "sync").stdout


def test_status_watch_follows_the_worker_until_interrupted(environment, worker):
    command = [COMMAND, "status", "--watch", "--json"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        for _ in range(2):
            assert json.loads(watching.stdout.readline())["attached"]
        watching.send_signal(2)
        assert watching.wait(10) == 130
        assert watching.stderr is not None
        assert "Traceback" not in watching.stderr.read()
    finally:
        watching.kill()


# --- without one ---


@pytest.mark.parametrize("arguments", [("status",), ("jobs",), ("cancel", "x"), ("checkpoint", "sync")])
def test_without_a_worker_each_command_says_so_in_one_sentence(apollo, arguments):
    done = apollo(*arguments)
    assert done.returncode == 69
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "is it running?" in line
    as_json = apollo(*arguments, "--json")
    assert (as_json.returncode, as_json.stderr) == (69, "")
    assert json.loads(as_json.stdout)["error"]["code"] == "not_delivered"


# --- what people get wrong ---


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ('{"prompt": "x"}', "line 3: completion", "is missing"),
        ('{"messages": [{"role": "user", "contents": "x"}]}', "line 3: messages[0].contents", "did you mean"),
        ('{"prompt": "x", "completion": ""}', "line 3: completion", "nothing to learn"),
        ("{}", "line 3", "exactly one form"),
        ("{", "line 3", "one example is one line"),
        ("[{}]", "line 3", "jq -c"),
        ("[" * 100_000, "line 3", "not JSON"),
        ('{"prompt": 1, "completion": "x"}', "line 3: prompt", "Expected `str | null`, got `int`"),
        ("\x00", "line 3", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(apollo, line, field, words):
    done = apollo("train", "-", stdin=f"{json.dumps(EXAMPLE)}\n\n{line}\n")
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert said.startswith(f"apollo-ipc: {field}: ")
    assert words in said


def test_a_file_that_windows_wrote_is_read(apollo, worker, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(EXAMPLE).encode() + b"\r\n")
    assert apollo("train", path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "missing.jsonl"), "FILE: cannot read missing.jsonl: No such file"),
        (("train", "."), "Is a directory"),
        (("train", os.devnull), "no examples"),
        (("train", os.devnull, "--lr", "7"), "--lr: Expected `float` <= 0.1"),
        (("train", os.devnull, "--clip", "0"), "--clip: Expected"),
        (("train", os.devnull, "--beta", "-1"), "--beta: Expected `float` > 0"),
        (("train", os.devnull, "--max-steps", "0"), "--max-steps: Expected `int` >= 1"),
        (("train", os.devnull, "--offline", "nowhere"), "MODEL_DIR: nowhere: no such directory"),
        (("status", "--config", "missing.toml"), "cannot read missing.toml"),
        (("checkpoint", "verify"), "no model is being served, so name the directory"),
        (("checkpoint", "verify", "nowhere"), "nowhere: no such directory"),
        (("serve", "nowhere"), "nowhere: no such directory"),
        (("serve", "Qwen/Qwen3-8B"), "hf download Qwen/Qwen3-8B --local-dir Qwen3-8B"),
        (("serve", "--max-model-len", "64"), "comes first"),
        (("check", "nowhere"), "no such directory"),
    ],
)
def test_a_mistake_is_one_sentence_that_says_what_would_be_right(apollo, arguments, words):
    done = apollo(*arguments)
    assert done.returncode in (2, 78)
    [said] = done.stderr.splitlines()
    assert words in said


def test_what_is_not_a_models_directory_is_told_apart(apollo, tmp_path, model_dir):
    def said(path):
        done = apollo("serve", path)
        assert done.returncode == 2
        [line] = done.stderr.splitlines()
        return line

    assert f"did you mean {model_dir}?" in said(tmp_path)
    assert f"give the directory, {model_dir}" in said(model_dir / "config.json")
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert "no safetensors, but pytorch_model.bin" in said(model_dir)
    (model_dir / "pytorch_model.bin").unlink()
    assert "is the download complete?" in said(model_dir)
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(model_dir, snapshot)
    assert f"did you mean {snapshot}?" in said(cache)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--load-format", "dummy"), "--load-format: is apollo here"),
        (("--load_format=auto",), "--load-format: is apollo here"),
        (("--model", "x"), "--model: the model is the directory given first"),
    ],
)
def test_serve_refuses_flags_that_contradict_it(apollo, model_dir, flags, words):
    done = apollo("serve", model_dir, *flags)
    assert done.returncode == 2
    assert words in done.stderr


def test_serve_finds_a_taken_port_before_it_loads_a_model(apollo, model_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = apollo("serve", model_dir, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "--port: cannot listen on 127.0.0.1" in done.stderr


def test_serve_leaves_a_living_vllms_runtime_directory_alone(apollo, config, model_dir):
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    manifest = Manifest(
        1, "b", os.getpid(), ticks, 0, 1, "/m", "m", "0", "0", "shm", None, "bf16", 8, [], {}, {}, []
    )
    write_manifest(manifest, config.runtime_dir)
    done = apollo("serve", model_dir)
    assert done.returncode == 75
    assert f"process {os.getpid()}" in done.stderr


# --- the rest ---


def test_the_key_is_made_once_and_shown(apollo, config, monkeypatch):
    first = apollo("key").stdout.strip()
    assert first == key_path(config).read_text() == apollo("key").stdout.strip()
    assert apollo("key", "--path").stdout.strip() == str(key_path(config))
    monkeypatch.setenv("APOLLO_HTTP__TRAIN_KEY", "mine")
    assert json.loads(apollo("key", "--json").stdout) == {"train_key": "mine", "path": None}


def test_a_directory_that_was_never_synced_is_told_so(apollo, model_dir):
    assert "never synced" in apollo("checkpoint", "show", model_dir).stdout
    assert apollo("checkpoint", "show", model_dir, "--json").stdout.strip() == "null"
    assert "nothing to do" in apollo("checkpoint", "recover", model_dir).stdout
    verified = apollo("checkpoint", "verify", model_dir)
    assert verified.returncode == 1
    assert "nothing was synced here yet" in verified.stderr


def test_offline_training_hands_the_request_to_a_process_of_its_own(apollo, model_dir, tmp_path, monkeypatch):
    """Stands in for commands.offline: says what it was given, as the real one would say what it did."""
    package = tmp_path / "stand_in" / "apollo_worker" / "commands"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "offline.py").write_text(
        "import json, sys\n"
        "request = json.load(open(sys.argv[2]))\n"
        "print(json.dumps({'step': 1, 'num_steps': 1, 'loss': 0.5}), flush=True)\n"
        "if rank := request['options'].get('rank'):\n"
        "    if rank == 3: print(json.dumps({'error': dict(message='bad', field='rank', code='x')}))\n"
        "    sys.exit(2 if rank == 3 else 'it crashed')\n"
        "job = dict(job_id='offline', seq=0, state='durable', created_at=0, num_examples=1, num_steps=1,\n"
        "           steps_done=1, loss_last=request['options']['lr'],\n"
        "           notes=[sys.argv[1], json.dumps(request['options'])])\n"
        "print(json.dumps({'job': job}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{package.parent.parent}:{os.environ.get('PYTHONPATH', '')}")
    arguments = ("train", "-", "--offline", model_dir, "--lr", "0.01", "--loss", "grpo", "--clip", "0.2")
    arguments += ("--clip", "0.3", "--kl-to-reference", "0.1", "--json")
    done = apollo(*arguments, stdin=json.dumps(EXAMPLE))
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["state"], job["loss_last"], job["notes"][0]) == ("durable", 0.01, str(model_dir))
    options = {"lr": 0.01, "loss": "grpo", "clip": [0.2, 0.3], "kl_to_reference": 0.1}
    assert json.loads(job["notes"][1]) == options
    refused = apollo(*arguments, "--rank", "3", stdin=json.dumps(EXAMPLE))
    assert refused.returncode == 2
    assert json.loads(refused.stdout) == {"error": {"message": "bad", "param": "rank", "code": "x"}}
    crashed = apollo(*arguments, "--rank", "4", stdin=json.dumps(EXAMPLE))
    assert (crashed.returncode, crashed.stderr.strip()) == (1, "it crashed")
    assert json.loads(crashed.stdout)["error"]["code"] == "offline_failed"


def test_every_command_has_help(apollo):
    listing = apollo("--help").stdout
    for name in (
        "serve",
        "worker",
        "train",
        "status",
        "jobs",
        "cancel",
        "checkpoint",
        "check",
        "key",
        "demo",
    ):
        assert name in listing
        assert "Usage" in apollo(name, "--help").stdout
    assert apollo("trian").returncode == 2


def test_the_installed_command_is_this_one():
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("apollo-ipc 0.")
