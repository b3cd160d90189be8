"""Every command of docs/first-hour.md, one after the other, as a user would type them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import ROOT
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

from apollo_ipc.demo.real_model import copy_real_model
from apollo_ipc.process.serving import free_port, vllm_environment, worker_environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1700)]
PAGE = ROOT / "docs/first-hour.md"


def steps_of(run: Path) -> list[int]:
    """Of TensorBoard's files, by its own reader."""
    read = EventAccumulator(str(run), {TENSORS: 0}).Reload()
    return [one.step for one in read.Tensors("loss_last" if run.name == "jobs" else "loss")]


def test_the_first_hour_can_be_typed(real_model_dir: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) > 6
    (tmp_path / "typed.sh").write_text("set -euo pipefail -x\n" + "\n".join(blocks))
    with tempfile.TemporaryDirectory(prefix="apollo-t-", dir="/tmp") as base:
        environment = {
            **worker_environment(vllm_environment(Path(base, "run"), Path(base, "state"))),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MODEL": str(copy_real_model(tmp_path / "model")),
            "PORT": str(free_port()),
            "APOLLO_TRAIN__LOG_TO": '["tensorboard"]',
        }
        with (tmp_path / "said.log").open("wb") as log:
            typed = subprocess.Popen(
                ["bash", "typed.sh"],
                cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                status = typed.wait(1600)
            finally:
                if typed.poll() is None:
                    os.killpg(typed.pid, signal.SIGKILL)
        curves = {run.name: steps_of(run) for run in Path(base, "state/tensorboard").iterdir()}
    said = (tmp_path / "said.log").read_text()
    if kept := os.environ.get("APOLLO_TEST_LOGS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        for name in ("said.log", "serve.log"):
            (Path(kept) / f"first-hour-{name}").write_bytes((tmp_path / name).read_bytes())
    assert status == 0, said[-4000:]
    assert len(curves.pop("jobs")) >= 2, "each job is a point"
    assert [1, 2, 3, 4] in [steps[:4] for steps in curves.values()], "and each its own curve"
    assert all(steps == list(range(1, len(steps) + 1)) for steps in curves.values())
    answers = [line for line in said.splitlines() if "cocoa tin" in line and not line.startswith("+")]
    assert answers, "the fact is known after it was taught"
    assert "all quiet on the quay" in said
    assert "every digest is right" in said
    assert "version 0 restored as version" in said
