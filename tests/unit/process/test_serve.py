"""`apollo-ipc serve`: what vLLM and the worker are given, and that they live and die together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from waiting import wait_for

from apollo_curation.settings import load_curation_config
from apollo_ipc.cli import serve
from apollo_ipc.cli.processes import vllm_environment, worker_command, worker_environment
from apollo_ipc.cli.serve import local_url
from apollo_ipc.config import Config, Paths, Traffic, load_config
from apollo_ipc.errors import ConfigError
from apollo_ipc.process import serving, supervise
from apollo_ipc.process.serving import count_ranks, vllm_command

# Notes its pid, its own child's pid and its end. argv: directory, name, exit status or "-" for "goes on".
CHILD = """
import os, signal, subprocess, sys, time
directory, name, status = sys.argv[1:]
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
def note(text):
    with open(f"{directory}/{name}", "a") as file:
        file.write(text + "\\n")
def stop(number, frame):
    note(f"stopped at {time.monotonic()}")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note(f"started {os.getpid()} {helper.pid}")
if status != "-":
    sys.exit(int(status))
time.sleep(120)
"""

SUPERVISE = """
import sys
from apollo_ipc.process import supervise
from apollo_ipc.process.supervise import Child, Supervisor
import os
supervise.RESTART_AFTER_S = (0.1,)
def child(name, status):
    command = [sys.executable, "-c", sys.argv[2], sys.argv[1], name, status]
    return Child(name, command, dict(os.environ))
others = [child("teacher", sys.argv[5])] if len(sys.argv) > 5 else []
sys.exit(Supervisor(child("vllm", sys.argv[3]), *others, child("worker", sys.argv[4])).run())
"""


def notes(directory: Path, name: str) -> list[list[str]]:
    path = directory / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def supervised(directory: Path, vllm_status="-", worker_status="-", *others: str):
    statuses = [vllm_status, worker_status, *others]
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, directory, textwrap.dedent(CHILD), *statuses],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for name in ("vllm", "worker", "teacher"):
            for line in notes(directory, name):
                for pid in line[1:3] if line[0] == "started" else []:
                    if is_alive(int(pid)):
                        os.kill(int(pid), signal.SIGKILL)


def all_pids(directory: Path) -> list[int]:
    lines = notes(directory, "vllm") + notes(directory, "worker")
    return [int(pid) for line in lines if line[0] == "started" for pid in line[1:3]]


def both_started(directory: Path) -> bool:
    return bool(notes(directory, "vllm") and notes(directory, "worker"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_the_worker_then_vllm_and_leaves_nothing(tmp_path, number, status):
    with supervised(tmp_path) as process:
        wait_for(lambda: both_started(tmp_path))
        process.send_signal(number)
        assert process.wait(20) == status
        assert float(notes(tmp_path, "worker")[-1][2]) < float(notes(tmp_path, "vllm")[-1][2])
        assert not any(map(is_alive, all_pids(tmp_path)))


def test_vllms_end_stops_the_worker_and_its_status_becomes_ours(tmp_path):
    with supervised(tmp_path, vllm_status="7") as process:
        assert process.wait(20) == 7
        assert not any(map(is_alive, all_pids(tmp_path)))


def test_a_worker_that_dies_is_started_again(tmp_path):
    with supervised(tmp_path, worker_status="3") as process:
        wait_for(lambda: len(notes(tmp_path, "worker")) >= 3)
        assert process.poll() is None
        assert len(notes(tmp_path, "vllm")) == 1


def test_a_trainer_outlives_a_front_that_dies_and_not_the_supervisor(tmp_path):
    """It ends by itself, after its step: killed in it, it would leave torn weights."""
    with supervised(tmp_path, worker_status="3") as process:
        wait_for(lambda: len(notes(tmp_path, "worker")) >= 3)
        trainers = [int(line[2]) for line in notes(tmp_path, "worker")]
        assert all(map(is_alive, trainers[:3]))
        os.kill(trainers[0], signal.SIGKILL)
        process.terminate()
        assert process.wait(20) == 0
        wait_for(lambda: not any(map(is_alive, all_pids(tmp_path))))


def test_a_child_that_ended_is_reaped_once_its_group_is_empty(tmp_path):
    child = supervise.Child("it", [sys.executable, "-c", "raise SystemExit(5)"], dict(os.environ))
    for _ in range(3):
        child.start()
        wait_for(lambda: not child.is_running)
        assert child.status == 5
    assert len(child._earlier) <= 1
    child.kill()
    assert child.status == 5


@pytest.mark.parametrize("status", ["78", "75"])
def test_a_worker_that_cannot_work_is_not_started_again(tmp_path, status):
    with supervised(tmp_path, worker_status=status) as process:
        wait_for(lambda: both_started(tmp_path))
        time.sleep(1)
        assert len(notes(tmp_path, "worker")) == 1
        assert process.poll() is None  # vLLM serves on


def test_a_teacher_that_dies_is_started_again_and_the_worker_stays(tmp_path):
    with supervised(tmp_path, "-", "-", "1") as process:
        wait_for(lambda: both_started(tmp_path) and len(notes(tmp_path, "teacher")) >= 2)
        assert len(notes(tmp_path, "worker")) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_teacher_is_told_where_this_server_is(config):
    assert local_url("0.0.0.0", 8123, []) == "http://127.0.0.1:8123"
    assert local_url("::1", 8123, ["--ssl-certfile", "x"]) == "https://[::1]:8123"
    environment = vllm_environment(config, None) | {"APOLLO_CURATION__URL": local_url("localhost", 81, [])}
    assert load_curation_config(None, environ=environment).curation.url == "http://localhost:81"


def test_nothing_is_left_when_serve_is_killed(tmp_path):
    with supervised(tmp_path) as process:
        wait_for(lambda: both_started(tmp_path))
        process.send_signal(signal.SIGKILL)
        leaders = [int(notes(tmp_path, name)[0][1]) for name in ("vllm", "worker")]
        wait_for(lambda: not any(map(is_alive, leaders)))
        assert notes(tmp_path, "worker")[-1][0] == "stopped"  # asked, not killed: it saves


def test_a_second_signal_does_not_wait():
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    command = [sys.executable, "-c", stubborn]
    vllm, worker = (supervise.Child(name, command, dict(os.environ)) for name in ("vLLM", "the worker"))
    started = time.monotonic()
    for at in (1.0, 2.0):
        threading.Timer(at, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert supervise.Supervisor(vllm, worker).run() == 130
    assert 2.0 <= time.monotonic() - started < 10


# --- what the children are given ---


@pytest.fixture
def config(tmp_path):
    return Config(paths=Paths(str(tmp_path / "run"), str(tmp_path / "state")))


def test_both_processes_read_the_configuration_that_serve_read(config, tmp_path, monkeypatch):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nlr = 5e-5\n")
    monkeypatch.setenv("APOLLO_TRAIN__RANK", "32")
    config = load_config(file, {"paths.runtime_dir": str(tmp_path / "run")})
    for environment in (vllm_environment(config, file), worker_environment(config, file)):
        read = load_config(environ=environment)
        assert (read.train.lr, read.train.rank) == (5e-5, 32)
        assert (read.runtime_dir, read.state_dir) == (config.runtime_dir, config.state_dir)
    assert worker_command(file)[1:] == ["-m", "apollo_worker", "--config", str(file)]


@pytest.mark.parametrize(("before", "after"), [(None, "apollo"), ("", "apollo"), ("a,b", "a,b,apollo")])
def test_our_plugins_join_an_allowlist_that_is_there(config, monkeypatch, before, after):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if before is not None:
        monkeypatch.setenv("VLLM_PLUGINS", before)
    assert vllm_environment(config, None)["VLLM_PLUGINS"] == after


def test_what_the_user_set_in_the_environment_stays(config, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment = worker_environment(config, None)
    assert (environment["HF_HUB_OFFLINE"], environment["OMP_WAIT_POLICY"]) == ("0", "ACTIVE")


@pytest.mark.parametrize("set_by_user", [None, "1"])
def test_vllm_on_a_cpu_gets_no_second_process_to_spin_for(config, monkeypatch, set_by_user):
    monkeypatch.setattr("apollo_ipc.process.serving.serves_on_cpu", lambda: True)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    if set_by_user:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", set_by_user)
    environment = vllm_environment(config, None)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == (set_by_user or "0")
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_vllm_on_a_gpu_keeps_its_own_processes(config, monkeypatch):
    monkeypatch.setattr("apollo_ipc.process.serving.serves_on_cpu", lambda: False)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in vllm_environment(config, None)


def test_vllms_own_flags_go_to_it_unchanged():
    flags = ["--max-model-len", "2048", "-O3", "--compilation-config={}"]
    command = vllm_command(Path("/m"), "127.0.0.1", 8001, serve.check_vllm_flags(flags))
    assert command[-4:] == flags
    assert command[command.index("--load-format") + 1] == "apollo"


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        (["--enable-sleep-mode"], "--enable-sleep-mode"),
        (["-q", "fp8"], "--quantization"),
        (["-pp", "2"], "--pipeline-parallel-size"),
        (["--pipeline_parallel_size=2"], "--pipeline-parallel-size"),
        (["--pipeline-parallel-size", "1"], None),
        (["--tensor-parallel-size", "2"], None),
        (["--enable-eplb"], "--enable-eplb"),
        (["--dtype", "bfloat16"], None),
    ],
)
def test_flags_under_which_training_cannot_work_are_named(capsys, flags, warned):
    serve.check_vllm_flags(flags)
    said = capsys.readouterr().err
    assert (f"with {warned} training will be refused" in said) if warned else said == ""


@pytest.mark.parametrize("flags", [["--api-server-count", "2"], ["-asc=2"], ["--api_server_count=2"]])
def test_a_flag_that_has_no_effect_is_told(capsys, flags):
    serve.check_vllm_flags(flags)
    assert "--api-server-count has no effect: one API server is started" in capsys.readouterr().err


def test_vllms_front_end_in_rust_is_refused_by_name():
    serve.check_front_end({"VLLM_USE_RUST_FRONTEND": "0"})
    with pytest.raises(ConfigError, match="that front end has no /train") as refused:
        serve.check_front_end({"VLLM_USE_RUST_FRONTEND": "1"})
    assert refused.value.field == "VLLM_USE_RUST_FRONTEND"


def test_start_up_is_told_as_it_goes(capsys):
    answers = [
        (503, b'{"error": {"message": "not attached yet"}}'),
        (503, b'{"error": {"message": "not attached yet"}}'),
        (404, b"{}"),
        (200, b"{}"),
    ]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start_up = serve.StartUp(local_url("0.0.0.0", server.server_port, []))
        while answers:
            start_up._next_at = 0
            start_up()
        start_up()  # ready: asks no more
        server.shutdown()
    said = [line.partition("serves")[2] or line for line in capsys.readouterr().err.splitlines()]
    assert said[0] == "; no training yet: not attached yet"
    assert "WITHOUT /train" in said[1]
    assert "ready: http://127.0.0.1" in said[2]
    assert len(said) == 3


def test_the_directory_of_traffic_reaches_vllm(config, tmp_path):
    assert "APOLLO_TRAFFIC__DIRECTORY" not in vllm_environment(config, None)
    traffic = Traffic(directory=str(tmp_path / "spool"))
    environment = vllm_environment(msgspec.structs.replace(config, traffic=traffic), None)
    assert load_config(environ=environment).traffic == traffic


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 1),
        (["-tp", "2"], 2),
        (["--tensor_parallel_size=4"], 4),
        (["-pp", "2", "-tp", "3"], 6),
        (["-tp"], 1),
    ],
)
def test_how_many_processes_hold_the_weights_is_read_from_the_flags(flags, expected):
    assert count_ranks(flags) == expected


def test_ranks_share_the_cores_of_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "serves_on_cpu", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    one, four = (serving.vllm_environment(tmp_path, tmp_path, {}, num_ranks=num) for num in (1, 4))
    assert (one["OMP_NUM_THREADS"], one.get("VLLM_CPU_OMP_THREADS_BIND")) == ("8", None)
    assert (four["OMP_NUM_THREADS"], four["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "nobind")
