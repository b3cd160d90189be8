"""gpu_loop.py's MPS daemon, a stand-in for NVIDIA's program: what it is told, that it always ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import BENCHMARKS
from served_model import make_tiny_model

# As the program is used here: `-d` leaves a daemon with its pid beside the sockets, else commands come on
# standard input. What it does and sees goes to $FAKE.
PROGRAM = """#!/bin/sh
pid_file="$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
if [ "$1" = -d ]; then
  env | grep ^CUDA_ > "$FAKE/environment"
  if [ -e "$FAKE/refuses" ]; then echo "no MPS today"; exit 1; fi
  sleep 300 &
  echo $! > "$pid_file"; echo $! > "$FAKE/pid"
  exit 0
fi
[ -e "$pid_file" ] || exit 1
while read command; do
  echo "$command" >> "$FAKE/asked"
  case "$command" in
    quit) [ -e "$FAKE/deaf" ] || kill "$(cat "$pid_file")" ;;
    get_server_list) echo 4711 ;;
    "get_client_list 4711") cat "$FAKE/clients" ;;
  esac
done
"""


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in os.environ:
        if name.startswith("CUDA_"):
            monkeypatch.delenv(name)
    import gpu_loop_mps  # pyright: ignore[reportMissingImports]

    return gpu_loop_mps


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The directory of the stand-in; it ends here, whatever the test did."""
    directory = tmp_path / "fake"
    directory.mkdir()
    program = directory / "nvidia-cuda-mps-control"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("FAKE", str(directory))
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    yield directory
    if (directory / "pid").exists() and runs(pid_of(directory)):
        os.kill(pid_of(directory), signal.SIGKILL)


def pid_of(fake: Path) -> int:
    return int((fake / "pid").read_text())


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def environment_of(fake: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (fake / "environment").read_text().splitlines())


@pytest.fixture
def base():
    """pytest's own directory may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        yield Path(directory)


def test_the_daemon_is_private_and_what_is_started_beside_it_is_its_client(mps, fake, base):
    with mps.MpsDaemon(base) as daemon:
        assert runs(pid_of(fake))
        told = environment_of(fake)
        assert told == {
            "CUDA_MPS_PIPE_DIRECTORY": str(base / "mps"),
            "CUDA_MPS_LOG_DIRECTORY": str(base / "mps-log"),
        }
        assert told.items() <= os.environ.items(), "a process started now is a client"
        assert (base / "mps").stat().st_mode & 0o777 == 0o700
        assert daemon.environment == told
    assert not runs(pid_of(fake))
    assert (fake / "asked").read_text().splitlines()[-1] == "quit"
    assert not set(told) & set(os.environ), "what comes after it runs without MPS"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_ends_with_an_error_too(mps, fake, base, error):
    with pytest.raises(error), mps.MpsDaemon(base):
        raise error
    assert not runs(pid_of(fake))
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_one_that_does_not_hear_quit_is_ended_by_its_pid(mps, fake, base, monkeypatch):
    monkeypatch.setattr(mps, "QUIT_S", 0.2)
    (fake / "deaf").touch()
    with mps.MpsDaemon(base):
        pass
    assert not runs(pid_of(fake))


def test_devices_by_number_are_not_numbered_twice(mps, fake, base, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with mps.MpsDaemon(base):
        assert "CUDA_VISIBLE_DEVICES" not in environment_of(fake)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1", "its clients choose as before"


def test_devices_by_uuid_are_the_daemons_too(mps, fake, base, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    with mps.MpsDaemon(base):
        assert environment_of(fake)["CUDA_VISIBLE_DEVICES"] == "GPU-1234"


def test_without_the_program_a_sentence_says_so(mps, base, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(mps.LoopFailed, match=r"--mps needs nvidia-cuda-mps-control.*not here"):
        mps.MpsDaemon(base).__enter__()
    assert list(base.iterdir()) == []
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_daemon_that_refuses_is_quoted(mps, fake, base):
    (fake / "refuses").touch()
    with pytest.raises(mps.LoopFailed, match=r"status 1.*no MPS today"):
        mps.MpsDaemon(base).__enter__()
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_directory_too_long_for_sockets_is_refused(mps, fake, base):
    with pytest.raises(mps.LoopFailed, match="shorter --dir"):
        mps.MpsDaemon(base / ("x" * 100)).__enter__()
    assert not (fake / "environment").exists()


def test_a_process_that_did_not_connect_is_named(mps, fake, base):
    serving, trainer = (
        subprocess.Popen(["sleep", "60"], start_new_session=True),
        subprocess.Popen(["sleep", "60"]),
    )
    try:
        with mps.MpsDaemon(base) as daemon:

            def number_of(*pids: int) -> int:
                (fake / "clients").write_text("".join(f"{pid}\n" for pid in pids))
                return daemon.require_clients([trainer.pid], serving.pid)

            assert number_of(serving.pid, trainer.pid) == 2
            for pids, who in (
                ((serving.pid,), "the worker did not"),
                ((trainer.pid,), "vLLM did not"),
                ((), "the worker and vLLM did not"),
            ):
                with pytest.raises(mps.LoopFailed, match=who):
                    number_of(*pids)
    finally:
        for process in (serving, trainer):
            process.kill()
            process.wait()


def test_the_limits_are_the_workers_alone(mps, tmp_path, monkeypatch):
    from gpu_loop_system import System  # pyright: ignore[reportMissingImports]

    limits = mps.client_environment(30, True)
    assert limits == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30", "CUDA_MPS_CLIENT_PRIORITY": "1"}
    assert mps.client_environment(None, False) == {}
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/some-mps")
    system = System(make_tiny_model(tmp_path / "model"), tmp_path, [], {}, limits)
    assert limits.items() <= system.env.items()
    assert not limits.keys() & system.server.env.keys()
    for env in (system.env, system.server.env):
        assert env["CUDA_MPS_PIPE_DIRECTORY"] == "/tmp/some-mps"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mps-priority"], "add --mps"),
        (["--mps-thread-percentage", "50"], "add --mps"),
        (["--mps", "--mps-thread-percentage", "0"], "from 1 to 100"),
        (["--mps", "--mps-thread-percentage", "101"], "from 1 to 100"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(mps, flags, words, capsys):
    import gpu_loop  # pyright: ignore[reportMissingImports]

    with pytest.raises(SystemExit) as ended:
        gpu_loop.parse_arguments(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_where_there_is_no_gpu_the_benchmark_says_so_before_anything_is_made(mps, tmp_path):
    from apollo_ipc.process.serving import serves_on_cpu

    if not serves_on_cpu():
        pytest.skip("this environment's vLLM is not the CPU build")
    command = [sys.executable, str(BENCHMARKS / "gpu_loop.py"), "--mps", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "--mps shares a GPU, and this environment's vLLM computes on the CPU" in done.stdout
    assert list(tmp_path.iterdir()) == []
